"""HTML: one file that opens in any browser with no network, prints, and stays readable without a mouse."""

from collections.abc import Sequence

from ncclbench.store.run_directory import Run

SUFFIX = ".html"
FOR_FILES = True


def render(runs: Sequence[Run]) -> str:
    """The whole document."""
    from ncclbench_reports.html_page.inline_template import render_page
    from ncclbench_reports.html_page.page_content import page_of

    return render_page(page_of(runs))
