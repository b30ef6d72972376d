"""``ncclbench report``: render run directories in a report format."""

from pathlib import Path
from types import ModuleType

import click

from ncclbench import api
from ncclbench.cli.options import HELP, complete


@click.command("report", context_settings=HELP)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "fmt",
    metavar="NAME",
    shell_complete=complete("reports"),
    help="Report format; see `ncclbench list reports`.  [default: by the suffix of -o, or table]",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE", help="Output file instead of stdout.")
def command(runs: tuple[Path, ...], fmt: str | None, out: Path | None) -> None:
    """Show one or more run directories, finished or interrupted.

    Several runs are shown side by side, with the medians across them.

    \b
    Examples:
      ncclbench report runs/first
      ncclbench report runs/first -o first.html
      ncclbench report runs/monday runs/tuesday --format csv -o both.csv
    """
    from ncclbench.cli.output import emit, refuse_terminal
    from ncclbench.config.plugins import load

    fmt = fmt or _from_suffix(out)
    module = load("reports", fmt)
    if getattr(module, "FOR_FILES", False):
        refuse_terminal(fmt, module.SUFFIX, out)
    emit(api.report(api.load_runs(runs), fmt), out)


def _from_suffix(out: Path | None) -> str:
    """The format with the suffix of `out`; the table for any other suffix."""
    from ncclbench.config.plugins import load, names

    if out is None or not out.suffix:
        return "table"
    modules: dict[str, ModuleType] = {name: load("reports", name) for name in names("reports")}
    return next((name for name, found in modules.items() if getattr(found, "SUFFIX", None) == out.suffix), "table")
