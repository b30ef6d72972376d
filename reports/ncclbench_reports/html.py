"""HTML: one file that opens in any browser with no network, prints, and stays readable without a mouse."""

from collections.abc import Sequence

from ncclbench.store.directory import Run

SUFFIX = ".html"
FOR_FILES = True


def render(runs: Sequence[Run]) -> str:
    """The whole document."""
    from ncclbench_reports._html.document import render_page
    from ncclbench_reports._html.page import make_page

    page = make_page(runs)
    return render_page("report.html.j2", page=page, figures=page.figures, tables=page.tables)
