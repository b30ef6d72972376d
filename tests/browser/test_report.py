"""The report as a browser shows it: nothing fetched, everything drawn, and usable by hover, keyboard and printer."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ncclbench.analysis.comparison import compare
from ncclbench.analysis.run_sets import read_side
from ncclbench.config.plugins import load
from ncclbench.store.run_directory import read_run
from ncclbench_reports.common.comparison_formats import RENDERERS
from tests.helpers.cluster_runs import HOSTILE, rich_run, small_run

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

HEAT_MAP = "nics-0"


def written(path: Path, runs: Sequence[Path]) -> Path:
    path.write_text(load("reports", "html").render([read_run(run) for run in runs]), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return written(folder / "report.html", [rich_run(folder / "run")])


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    return written(folder / "report.html", [rich_run(folder / "run", hosts=("n0", HOSTILE, "<b>n2</b>"))])


@pytest.fixture(scope="session")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    runs = [rich_run(folder / "a", word="PASS"), rich_run(folder / "b", word=None), small_run(folder / "c", scale=1.3)]
    return written(folder / "report.html", runs)


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    for side, scale in (("base", 1.0), ("new", 1.2)):
        for k in range(3):
            small_run(folder / side / str(k), scale=scale * (1 + k / 500))
    found = compare(read_side(folder / "base"), read_side(folder / "new"))
    (folder / "compare.html").write_text(RENDERERS["html"](found), encoding="utf-8")
    return folder / "compare.html"


@pytest.fixture(params=["report", "hostile", "several", "comparison"])
def page(request: pytest.FixtureRequest) -> Path:
    file = request.getfixturevalue(request.param)
    assert isinstance(file, Path)
    return file


@pytest.mark.parametrize(
    ("page", "width"),
    [("report", 400), ("report", 1600), ("hostile", 400), ("several", 1600), ("comparison", 400)],
    indirect=["page"],
)
def test_page_fetches_nothing_and_draws_every_plot(browser: Any, page: Path, width: int) -> None:
    browser.open(page, width=width)
    assert browser.requests() == [page.as_uri()]
    assert browser.console() == []
    drawn = browser.js(
        """return [...document.querySelectorAll(".canvas")].map((canvas) => {
          const box = canvas.querySelector("svg.main-svg").getBoundingClientRect();
          const marks = canvas.querySelectorAll(".cartesianlayer path, .cartesianlayer image").length;
          return [canvas.dataset.figure, box.width, box.height, marks];
        });"""
    )
    assert len(drawn) >= 1
    for name, across, down, marks in drawn:
        assert across > 0.8 * min(width, 560) - 60, name
        assert down >= 240, name  # three bars
        assert marks > 5, name
    # The page does not scroll sideways; wide tables do so in their own frames.
    assert browser.js("return document.documentElement.scrollWidth <= window.innerWidth")
    clipped = browser.js(
        """return [...document.querySelectorAll(".canvas")].filter((canvas) =>
          canvas.querySelector("svg.main-svg").getBoundingClientRect().right
            > canvas.closest(".plot").getBoundingClientRect().right + 1).length"""
    )
    assert clipped == 0


def test_resizing_draws_again_and_covers_no_caption(browser: Any, report: Path) -> None:
    """plotly.js alone keeps the old height, and would draw over the caption."""
    browser.open(report, width=1200)
    for width in (420, 1600):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.wait(
            """return [...document.querySelectorAll(".canvas")].every((canvas) => {
              const inner = canvas.querySelector("svg.main-svg").getBoundingClientRect();
              const outer = canvas.getBoundingClientRect();
              return canvas.dataset.width === String(canvas.clientWidth) && Math.abs(inner.width - outer.width) < 2
                && inner.bottom <= outer.bottom + 1;
            });"""
        )
    covered = browser.js(
        """return [...document.querySelectorAll(".canvas")].filter((canvas) => {
          const legend = canvas.querySelector("g.legend")?.getBoundingClientRect();
          const title = canvas.querySelector(".xtitle")?.getBoundingClientRect();
          const box = canvas.getBoundingClientRect();
          return legend && (legend.bottom > box.bottom + 1 || legend.right > box.right + 1
            || title?.bottom > legend.top + 1);
        }).map((canvas) => canvas.dataset.figure)"""
    )
    assert covered == []


def test_a_request_is_refused_and_noticed(browser: Any, report: Path, tmp_path: Path) -> None:
    """The mutation that the test before must catch: a page with a picture from elsewhere."""
    worse = tmp_path / "worse.html"
    text = report.read_text(encoding="utf-8").replace(
        "</header>", '<img src="https://ncclbench.invalid/x.png"></header>', 1
    )
    worse.write_text(text, encoding="utf-8")
    browser.open(worse)
    assert any("Content Security Policy" in line for line in browser.console())


def hovered(browser: Any, figure: str, column: int, row: int) -> str:
    """The text at a cell of a heat map."""
    point = browser.js(
        """const canvas = document.querySelector(`[data-figure="${arguments[0]}"]`);
        canvas.scrollIntoView({ block: "center", behavior: "instant" });
        const { xaxis, yaxis } = canvas._fullLayout;
        const box = canvas.getBoundingClientRect();
        const [x, y] = [xaxis._offset + xaxis.c2p(arguments[1]), yaxis._offset + yaxis.c2p(arguments[2])];
        return [box.left + x, box.top + y];""",
        figure,
        column,
        row,
    )
    browser.pointer(*point)
    query = f'[data-figure="{figure}"] .hoverlayer .hovertext'
    browser.wait("return document.querySelector(arguments[0]) !== null", query)
    return str(browser.js("return document.querySelector(arguments[0]).textContent", query))


def test_hover_names_the_pair(browser: Any, report: Path) -> None:
    browser.open(report)
    text = hovered(browser, HEAT_MAP, column=0, row=3)
    assert "n1 rail 1 rail1 → n0 rail 0 rail0" in text
    assert "5.2" in text  # half of the others' 10.4 GB/s
    assert "(rank 3) → n0 rail 0 rail0 (rank 0)" in text
    rails = hovered(browser, "rails-0", column=1, row=0)
    assert "rail 0 → rail 1" in rails


def test_hostile_names_are_shown_as_text(browser: Any, hostile: Path) -> None:
    browser.open(hostile)
    assert browser.js("return window.owned === undefined")
    shown = browser.js("return document.body.innerText")
    assert "<script>alert('owned')</script>\"'&\\u202egnp.exe" in shown
    assert "<b>n2</b>" in shown
    assert "\u202e" not in shown
    text = hovered(browser, HEAT_MAP, column=0, row=3)
    assert "<script>alert('owned')</script>" in text
    assert browser.js("return document.querySelectorAll('script:not([type])').length") == 2  # plotly.js and report.js
    assert browser.console() == []


def column(browser: Any, table: str, k: int) -> list[str]:
    rows = "[...document.getElementById(arguments[0]).tBodies[0].rows]"
    code = f"return {rows}.map((row) => row.cells[arguments[1]].textContent)"
    found: list[str] = browser.js(code, table, k)
    return found


def press(browser: Any, table: str, k: int) -> str:
    """Sort by a column with the keyboard; returns the state that a screen reader reads."""
    from selenium.webdriver.common.keys import Keys

    button = browser.js(
        "return document.getElementById(arguments[0]).tHead.rows[0].cells[arguments[1]].firstChild", table, k
    )
    button.send_keys(Keys.ENTER)
    code = "return document.getElementById(arguments[0]).tHead.rows[0].cells[arguments[1]].getAttribute('aria-sort')"
    return str(browser.js(code, table, k))


def test_tables_sort_with_the_keyboard(browser: Any, report: Path) -> None:
    browser.open(report)
    heads = browser.js("return [...document.querySelectorAll('#results thead th')].map((th) => th.textContent)")
    time_column, case_column = heads.index("p50 (us)"), heads.index("case")
    assert press(browser, "results", time_column) == "ascending"
    times = [float(cell) for cell in column(browser, "results", time_column) if cell]
    assert times == sorted(times)
    assert times != sorted(times, key=str)  # sorted as text the order differs
    assert press(browser, "results", time_column) == "descending"
    cells = column(browser, "results", time_column)
    assert [float(cell) for cell in cells if cell] == sorted(times, reverse=True)
    assert cells[-1] == ""  # cells without a figure are last in both directions
    assert press(browser, "results", case_column) == "ascending"
    names = column(browser, "results", case_column)
    assert names[-1].startswith("moe_dispatch")


def test_tables_filter_by_words(browser: Any, report: Path) -> None:
    browser.open(report)
    everything = len(column(browser, "results", 0))
    field = browser.js("return document.getElementById('filter-results')")
    field.send_keys("MOE hierarchical")
    assert column(browser, "results", 0) == ["moe_dispatch/bfloat16/4194304/isolated/variant=hierarchical"]
    assert browser.js("return document.getElementById('count-results').textContent") == f"1 of {everything} rows"
    field.clear()
    field.send_keys("<script>")
    assert len(column(browser, "results", 0)) == 1


def luminance(colour: str) -> float:
    """Of ``rgb(r, g, b)``, as WCAG defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


CONTRASTS = """
const backdrop = (e) => {
  for (; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (colour !== "rgba(0, 0, 0, 0)") return colour;
  }
  return "rgb(255, 255, 255)";
};
const kinds = "h1, h2, h3, p, li, dt, dd, td, th button, figcaption, caption, a, summary, button, label";
return [...document.querySelectorAll(kinds)]
  .filter((e) => e.textContent.trim() && e.getClientRects().length)
  .map((e) => [getComputedStyle(e).color, backdrop(e), e.textContent.slice(0, 40)]);
"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast_in_light_and_dark(browser: Any, report: Path, dark: bool) -> None:
    browser.open(report, dark=dark)
    page = browser.js("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(page) < 0.05) is dark
    for text, ground, words in browser.js(CONTRASTS):
        assert contrast(text, ground) >= 4.5, (words, text, ground)
    plots = browser.js("return [...document.querySelectorAll('.canvas')].map((c) => c._fullLayout.paper_bgcolor)")
    assert len(set(plots)) == 1
    labels = browser.js("return getComputedStyle(document.querySelector('.canvas .xtick text')).fill")
    assert contrast(labels, page) >= 4.5


def test_the_button_changes_to_dark_and_back(browser: Any, report: Path) -> None:
    browser.open(report)
    grounds = []
    for _ in range(3):
        grounds.append(browser.js("return document.querySelector('.canvas')._fullLayout.paper_bgcolor"))
        browser.js("document.getElementById('theme').click()")
    assert grounds[0] == grounds[2] == "#ffffff"
    assert grounds[1] == "#14181e"
    assert browser.js("return document.getElementById('theme').getAttribute('aria-pressed')") == "true"


def test_page_is_accessible_to_screen_readers(browser: Any, page: Path) -> None:
    browser.open(page)
    assert browser.js("return document.documentElement.lang") == "en"
    assert browser.js("return document.querySelectorAll('h1, main').length") == 2
    bare = browser.js(
        """return [
          ...[...document.querySelectorAll("[role=img]")].filter((e) => !/.{40}/.test(e.getAttribute("aria-label"))),
          ...[...document.querySelectorAll("th")].filter((e) => e.scope !== "col" || !e.hasAttribute("aria-sort")),
          ...[...document.querySelectorAll("table")].filter((e) => !e.caption?.textContent),
          ...[...document.querySelectorAll("input")].filter((e) => !e.labels.length),
          ...[...document.querySelectorAll("button")].filter((e) => !e.textContent.trim()),
        ].map((e) => e.outerHTML.slice(0, 100))"""
    )
    assert bare == []
    doubled = (
        "const ids = [...document.querySelectorAll('[id]')].map((e) => e.id); return ids.length - new Set(ids).size"
    )
    assert browser.js(doubled) == 0


PAPER = {"A4": (8.27, 11.69), "Letter": (8.5, 11.0)}


def cut_on_paper(browser: Any, paper: str) -> list[str]:
    """The plots that do not fit, when the page as it was drawn for the screen is laid out for paper."""
    wide, tall = ((inches - 0.95) * 96 for inches in PAPER[paper])
    # Printing lays out again without a resize event: plotly must not draw again here.
    browser.js(
        """for (const canvas of document.querySelectorAll('.canvas')) {
          window.removeEventListener('resize', canvas._responsiveChartHandler);
        }"""
    )
    size = {"width": int(wide), "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    boxes = browser.js(
        """return [...document.querySelectorAll("figure.plot")].map((figure) => {
          const outer = figure.getBoundingClientRect();
          const inner = figure.querySelector("svg.main-svg").getBoundingClientRect();
          const below = inner.bottom - outer.bottom;
          return [figure.id, outer.left, outer.right, outer.height, inner.left, inner.right, below];
        })"""
    )
    assert len(boxes) > 10
    return [
        key
        for key, left, right, height, inner_left, inner_right, below in boxes
        if min(left, inner_left - left) < -1
        or max(right - wide, inner_right - right, below, height - tall) > 1
        or inner_right - inner_left < 300
    ]


@pytest.mark.parametrize(("paper", "dark"), [("A4", False), ("Letter", True)])
def test_print_cuts_no_plot(browser: Any, report: Path, paper: str, dark: bool) -> None:
    browser.open(report, width=1600, dark=dark)
    assert cut_on_paper(browser, paper) == []
    assert browser.js("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_without_scaling_paper_would_cut_plots(browser: Any, report: Path, tmp_path: Path) -> None:
    """The mutation that the test before must catch."""
    worse = tmp_path / "worse.html"
    rule = ".canvas .svg-container svg.main-svg { width: 100% !important; height: 100% !important; }"
    text = report.read_text(encoding="utf-8")
    assert rule in text
    worse.write_text(text.replace(rule, ""), encoding="utf-8")
    browser.open(worse, width=1600)
    assert cut_on_paper(browser, "A4")


@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="pdftotext is not here; on Debian: poppler-utils")
def test_pdf_has_each_plot_on_one_page(browser: Any, report: Path, tmp_path: Path) -> None:
    """The title of each plot and its axis are on the same page of the PDF, for plots that have one."""
    browser.open(report, width=1600)
    (tmp_path / "report.pdf").write_bytes(browser.pdf(*PAPER["A4"]))
    done = subprocess.run(
        ["pdftotext", "-layout", str(tmp_path / "report.pdf"), "-"], capture_output=True, text=True, check=True
    )
    pages = done.stdout.split("\f")
    assert "FAIL" in pages[0]
    for title, axis in (
        ("all_reduce: bus bandwidth", "bus bandwidth (GB/s)"),
        ("cross_rail/float32/1048576/isolated: rail by rail", "receiving rail"),
        ("moe_dispatch: time of each phase", "time (us)"),
        ("Every NIC, sorted", "position in the sorted order"),
    ):
        assert any(title in page and axis in page for page in pages), title


def test_printing_leaves_the_page_unchanged(browser: Any, report: Path) -> None:
    browser.open(report, dark=True)
    browser.pdf(*PAPER["A4"])
    browser.wait("return document.querySelector('.canvas')._fullLayout.paper_bgcolor === '#14181e'")
