"""HTML: one file that opens in any browser with no network, prints, and stays readable without a mouse."""

from collections.abc import Sequence

from ncclbench.store.run_directory import Run

SUFFIX = ".html"
FOR_FILES = True


def render(runs: Sequence[Run]) -> str:
    """The whole document."""
    from ncclbench_reports.html_page.page import make_page
    from ncclbench_reports.html_page.render import render_page

    page = make_page(runs)
    return render_page("report.html.j2", page=page, figures=page.figures, tables=page.tables)
