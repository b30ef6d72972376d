"""``ncclbench report``: show run directories."""

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
    help="See `ncclbench list reports`.  [default: what the suffix of -o says, or table]",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write here instead of to stdout.")
def command(runs: tuple[Path, ...], fmt: str | None, out: Path | None) -> None:
    """Show one or more run directories, finished or cut off.

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
    """The format whose suffix `out` has; the table for every other."""
    from ncclbench.config.plugins import load, names

    if out is None or not out.suffix:
        return "table"
    modules: dict[str, ModuleType] = {name: load("reports", name) for name in names("reports")}
    return next((name for name, found in modules.items() if getattr(found, "SUFFIX", None) == out.suffix), "table")
