"""A comparison for the terminal, as Markdown, as JSON and as an HTML page; the same figures in all."""

import msgspec
from rich import box
from rich.table import Table
from rich.text import Text

from ncclbench.analysis.comparison import CaseComparison, Comparison
from ncclbench_reports.common.run_summary import FORCED
from ncclbench_reports.common.text_format import microseconds, visible
from ncclbench_reports.markdown import escaped, grid
from ncclbench_reports.table import as_text

_HEADER = ("case", "verdict", "BASE (us)", "NEW (us)", "ratio", "95%", "p", "p (KW)", "delta", "starts")
_NOTE = (
    "ratio is NEW over BASE, above 1 is slower; its interval is a bootstrap over process starts; p is adjusted for "
    "all cases (Holm); KW is Kruskal-Wallis by itself; delta is Cliff's"
)


def summary(found: Comparison) -> str:
    """The verdict in one line."""
    counts = ", ".join(
        f"{found.count(word)} {word}" for word in ("worse", "better", "same", "not comparable") if found.count(word)
    )
    return f"{found.verdict}: {counts or 'no cases'}"


def render_table(found: Comparison) -> str:
    """For the terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in _HEADER:
        table.add_column(name, justify="left" if name in ("case", "verdict") else "right")
    for case in found.cases:
        table.add_row(*(Text(cell) for cell in _cells(case)))
    lines = [f"# BASE {visible(found.base)}", f"# NEW  {visible(found.new)}", f"# {_NOTE}"]
    lines += [f"# {FORCED}: {visible(what)}" for what in found.forced]
    lines += [f"# note: {visible(what)}" for what in found.remarks]
    reasons = [f"! {visible(case.case)}: {case.verdict}: {visible(case.reason)}" for case in _remarkable(found)]
    return "\n".join([*lines, "", as_text(table), *reasons, "", summary(found)])


def render_markdown(found: Comparison) -> str:
    """For an issue."""
    parts = [
        f"## {escaped(summary(found))}",
        f"BASE {escaped(found.base)}, NEW {escaped(found.new)}; {escaped(_NOTE)}",
        *(f"> {escaped(FORCED)}: {escaped(what)}" for what in found.forced),
        *(f"> note: {escaped(what)}" for what in found.remarks),
        grid(_HEADER, ([escaped(cell) for cell in _cells(case)] for case in found.cases), 2),
    ]
    reasons = [f"- {escaped(case.case)}: {case.verdict}: {escaped(case.reason)}" for case in _remarkable(found)]
    return "\n\n".join([*parts, *(["\n".join(reasons)] if reasons else [])])


def render_json(found: Comparison) -> str:
    """For a program."""
    content = {"schema": 1, "verdict": found.verdict, **msgspec.to_builtins(found)}
    return msgspec.json.format(msgspec.json.encode(content), indent=2).decode()


def render_html(found: Comparison) -> str:
    """One self-contained page."""
    from ncclbench_reports.html_page.comparison_page import comparison_page
    from ncclbench_reports.html_page.inline_template import render_page

    return render_page(comparison_page(found, summary(found), _NOTE, [FORCED] if found.forced else []))


def _remarkable(found: Comparison) -> list[CaseComparison]:
    """The cases whose reason adds something to the figures."""
    return [case for case in found.cases if case.verdict != "same"]


def _cells(case: CaseComparison) -> list[str]:
    interval = "-" if case.ratio_lo is None else f"{case.ratio_lo:.3f}..{case.ratio_hi:.3f}"
    return [
        visible(case.case),
        case.verdict,
        microseconds(case.base_us),
        microseconds(case.new_us),
        "-" if case.ratio is None else f"{case.ratio:.3f}",
        interval,
        *("-" if value is None else f"{value:.2g}" for value in (case.p, case.p_kruskal, case.delta)),
        f"{case.base_starts}/{case.new_starts}",
    ]


RENDERERS = {"table": render_table, "markdown": render_markdown, "html": render_html, "json": render_json}
