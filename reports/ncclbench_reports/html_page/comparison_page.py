"""The page of a comparison: the verdict, every ratio with its interval, and the table."""

from collections.abc import Sequence

from ncclbench.analysis.comparison import CaseComparison, Comparison
from ncclbench_reports.common.text_format import visible
from ncclbench_reports.html_page.figures import Figure, Plot, error_bars, plot_text, rounded
from ncclbench_reports.html_page.page_model import Page, RunCard, Section
from ncclbench_reports.html_page.tables import DataTable, TableColumn, number

_COLOURS = {"worse": "#d55e00", "better": "#00916a", "same": "#7b8494"}
_MARKS = {"worse": "x", "better": "diamond", "same": "circle"}
_MOST_CASES = 60
# For the colours of the page, which are those of verdicts.
_AS_VERDICT = {"worse": "fail", "better": "pass", "same": "pass", "not comparable": "inconclusive"}


def comparison_page(found: Comparison, summary: str, note: str, stamps: Sequence[str]) -> Page:
    """Everything that the page shows."""
    word, _, counts = summary.partition(": ")
    card = RunCard(
        name=visible(found.new),
        path=visible(found.new),
        verdict=_AS_VERDICT[found.verdict],
        headline=word,
        reasons=[
            counts,
            *(f"{visible(case.case)}: {visible(case.reason)}" for case in found.cases if case.verdict == "worse"),
        ],
        profile="",
        starts="",
        actions=[],
        facts=[
            ("BASE", visible(found.base)),
            ("NEW", visible(found.new)),
            ("margin", f"{found.margin:.3g}"),
            ("reading", note),
        ],
        warnings=[*(visible(what) for what in found.forced), *(visible(what) for what in found.remarks)],
    )
    timed = [case for case in found.cases if case.ratio is not None]
    return Page(
        title=f"ncclbench: {visible(found.new)} against {visible(found.base)}",
        stamps=stamps,
        cards=[card],
        sections=[
            Section(
                id="ratios",
                title="NEW over BASE",
                intro=note[:1].upper() + note[1:] + ".",
                figures=[_ratios(timed)] if timed else [],
                tables=[_table(found.cases)],
            )
        ],
    )


def _ratios(cases: Sequence[CaseComparison]) -> Figure:
    shown = sorted(cases, key=lambda case: -abs((case.ratio or 1) - 1))[:_MOST_CASES]
    shown.sort(key=lambda case: case.ratio or 1)
    data: list[Plot] = []
    for word, colour in _COLOURS.items():
        chosen_rows = [k for k, case in enumerate(shown) if case.verdict == word]
        if not chosen_rows:
            continue
        chosen = [shown[k] for k in chosen_rows]
        ratio = [case.ratio or 1.0 for case in chosen]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": word,
                "x": rounded(ratio),
                "y": chosen_rows,
                "error_x": error_bars([(case.ratio, case.ratio_lo, case.ratio_hi) for case in chosen], 1.5),
                "marker": {"color": colour, "symbol": _MARKS[word], "size": 9},
                "text": [
                    f"<b>{plot_text(case.case, 64)}</b><br>{case.verdict}: {plot_text(case.reason, 90)}<br>"
                    f"{case.ratio:.4f} ({case.ratio_lo:.4f} to {case.ratio_hi:.4f})"
                    for case in chosen
                ],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    layout: Plot = {
        "xaxis": {"title": {"text": "time of NEW / time of BASE"}, "type": "log"},
        "yaxis": {"tickvals": list(range(len(shown))), "ticktext": [plot_text(case.case, 40) for case in shown]},
        "shapes": [
            {
                "type": "line",
                "x0": 1,
                "x1": 1,
                "yref": "paper",
                "y0": 0,
                "y1": 1,
                "line": {"color": "#7b8494", "dash": "dot"},
            }
        ],
        "bars": len(shown),
    }
    worst = shown[-1]
    alt = (
        f"ratio of NEW to BASE for {len(shown)} cases with intervals; "
        f"the slowest change is {worst.ratio:.3f} in {worst.case}."
    )
    caption = f"The {len(shown)} of {len(cases)} cases that changed most. Right of 1 is slower; bars are 95% intervals."
    return Figure(id="ratios-plot", title="Ratios", alt=visible(alt), caption=caption, data=data, layout=layout)


def _table(cases: Sequence[CaseComparison]) -> DataTable:
    heads = (
        ("case", False), ("verdict", False), ("BASE (us)", True), ("NEW (us)", True), ("ratio", True), ("low", True),
        ("high", True), ("p", True), ("p (KW)", True), ("delta", True), ("BASE starts", True), ("NEW starts", True),
        ("reason", False),
    )  # fmt: skip
    rows = [
        [
            visible(case.case),
            case.verdict,
            *(number(value) for value in (case.base_us, case.new_us, case.ratio, case.ratio_lo, case.ratio_hi)),
            *(number(value) for value in (case.p, case.p_kruskal, case.delta, case.base_starts, case.new_starts)),
            visible(case.reason),
        ]
        for case in cases
    ]
    columns = [TableColumn(name, is_number, name not in ("p (KW)", "delta")) for name, is_number in heads]
    return DataTable(id="cases", title="Every case", caption="One row per case.", columns=columns, rows=rows)
