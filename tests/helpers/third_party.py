"""The files of another distribution as pip installs them, so that its plug-ins are found."""

from pathlib import Path

from ncclbench.config import plugins


def install(site: Path, entry_points: str, **modules: str) -> None:
    """Write modules into `site`, and a dist-info with the entry points; `site` is on sys.path."""
    info = site / "outsider-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outsider\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    for name, text in modules.items():
        (site / f"{name}.py").write_text(text)
    plugins.forget_distributions()
