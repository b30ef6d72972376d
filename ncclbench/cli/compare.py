"""``ncclbench compare``: find the cases in which NEW is slower than BASE."""

from pathlib import Path

import click

from ncclbench import api
from ncclbench.cli.options import HELP
from ncclbench.errors import Exit, UsageError

_FORMATS = ("table", "markdown", "html", "json")
_SUFFIXES = {".md": "markdown", ".html": "html", ".json": "json"}


@click.command("compare", context_settings=HELP)
@click.argument("base", type=click.Path(path_type=Path), metavar="BASE")
@click.argument("new", type=click.Path(path_type=Path), metavar="NEW")
@click.option(
    "--format", "fmt", metavar="NAME", help=f"{', '.join(_FORMATS)}.  [default: by the suffix of -o, or table]"
)
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE", help="Output file instead of stdout.")
@click.option(
    "--margin", type=float, default=0.01, show_default=True, help="Relative change below which a case counts as equal."
)
@click.option("--force", is_flag=True, help="Compare even if fabric, record version or settings differ.")
def command(base: Path, new: Path, fmt: str | None, out: Path | None, margin: float, force: bool) -> None:
    """Compare two runs, or two directories of runs, case by case.

    Each process start counts as one value. Make at least three on both sides, better five: process starts differ by
    more than the iterations within one show.

    \b
    Exit codes: 0 no case is worse, 1 a case is worse, 5 no case is comparable, 2 unlike sides.

    \b
    Examples:
      for k in 1 2 3 4 5; do ncclbench run --plan quick -o runs/base/$k; done
      ncclbench compare runs/base runs/new
      ncclbench compare runs/monday runs/tuesday -o change.html
    """
    from ncclbench.cli.output import emit, refuse_terminal
    from ncclbench.config.refusals import unknown
    from ncclbench_reports.common.comparison_formats import RENDERERS

    fmt = fmt or _SUFFIXES.get(out.suffix if out else "", "table")
    if fmt not in _FORMATS:
        raise UsageError(unknown("format", fmt, _FORMATS))
    if fmt == "html":
        refuse_terminal(fmt, ".html", out)
    found = api.compare(base, new, force=force, margin=margin)
    emit(RENDERERS[fmt](found), out)
    codes = {"worse": Exit.FAIL, "not comparable": Exit.INCONCLUSIVE}
    click.get_current_context().exit(int(codes.get(found.verdict, Exit.GOOD)))
