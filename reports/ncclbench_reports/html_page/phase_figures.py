"""Cases of several phases: where the time goes, and where the bytes go."""

from collections.abc import Sequence

from ncclbench.store.records import PhaseResult, Record
from ncclbench.store.run_directory import Run
from ncclbench_reports.common.text_format import visible
from ncclbench_reports.html_page.case_labels import facets_of_record, short_labels
from ncclbench_reports.html_page.figures import COLOURS, Figure, Plot, plot_text, rounded
from ncclbench_reports.html_page.tables import DataTable, TableColumn, number

_MOST_BARS = 16
# A longer legend is unreadable, and short phases cannot be seen in the bars.
_MOST_PHASES = 9
_PATTERNS = ("", "/", "x", ".", "\\", "-", "+", "|")
_LINKS = ("node", "domain", "same_rail", "cross_rail", "cross_site")


def phased(run: Run) -> dict[str, list[Record]]:
    """The records with at least two phases that were timed one by one, by pattern."""
    found: dict[str, list[Record]] = {}
    for record in run.records:
        if sum(phase.time_us is not None for phase in record.phases) > 1 and not alternatives(record):
            found.setdefault(record.pattern, []).append(record)
    return found


def alternatives(record: Record) -> bool:
    """Whether iterations rotate through variants, so that no iteration has all phases."""
    counts = [phase.time_us.n for phase in record.phases if phase.time_us]
    return record.time_us is not None and any(count < record.time_us.n for count in counts)


def phase_figures(run: Run, prefix: str) -> list[Figure]:
    """For each pattern: times of the phases, stacked, and bytes by link class, stacked."""
    figures = []
    for index, (pattern, records) in enumerate(phased(run).items()):
        shown = records[-_MOST_BARS:]
        names = _bar_names(shown)
        figures.append(_times(f"{prefix}phases-{index}", pattern, shown, names))
        if any(_sent(phase) for record in shown for phase in record.phases):
            figures.append(_bytes(f"{prefix}bytes-{index}", pattern, shown, names))
    return figures


def _bar_names(records: Sequence[Record]) -> list[str]:
    """What distinguishes the cases."""
    labels = short_labels([facets_of_record(record) for record in records])
    return [plot_text(label or record.timing, 40) for label, record in zip(labels, records, strict=True)]


def _labels(records: Sequence[Record]) -> tuple[list[str], list[str]]:
    """The phases that are long in some record, in the order of the schedule, and all the others."""
    longest: dict[str, float] = {}
    for record in records:
        times = {phase.label: phase.time_us.p50 for phase in record.phases if phase.time_us}
        for label, time in times.items():
            longest[label] = max(longest.get(label, 0.0), time / (sum(times.values()) or 1.0))
    if len(longest) <= _MOST_PHASES:
        return list(longest), []
    chosen = set(sorted(longest, key=lambda label: -longest[label])[: _MOST_PHASES - 1])
    return [label for label in longest if label in chosen], [label for label in longest if label not in chosen]


def _times(key: str, pattern: str, records: Sequence[Record], names: list[str]) -> Figure:
    chosen, others = _labels(records)
    data = [_stack(label, names, _sums(records, [label]), index, "us") for index, label in enumerate(chosen)]
    if others:
        name = f"{len(others)} short phases"
        data.append(_stack(name, names, _sums(records, others), len(chosen), "us"))
    totals = [record.time_us.p50 if record.time_us else float("nan") for record in records]
    data.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": "whole case",
            "y": list(range(len(names))),
            "x": rounded(totals),
            "marker": {"symbol": "line-ns-open", "size": 22, "color": "#d1483f", "line": {"width": 3}},
            "hovertemplate": "whole case: %{x:.4g} us<extra></extra>",
        }
    )
    longest = max(
        ((p.label, p.time_us.p50, r.case) for r in records for p in r.phases if p.time_us), key=lambda one: one[1]
    )
    alt = (
        f"phases of {pattern}, stacked, for {len(records)} cases; "
        f"the longest is {longest[0]} of {longest[2]} with {longest[1]:.4g} microseconds."
    )
    caption = (
        "Median of the slowest rank, phase by phase. Phases overlap between ranks, so their sum differs from the whole "
        "case (the mark)."
    )
    caption += f" Short phases: {', '.join(visible(label, 40) for label in others)}." if others else ""
    return Figure(
        id=key,
        title=f"{visible(pattern)}: time of each phase",
        alt=visible(alt),
        caption=caption,
        data=data,
        layout=_layout("time (us)", names),
    )


def _sums(records: Sequence[Record], labels: Sequence[str]) -> list[float]:
    """The medians of the phases of each record, added up; NaN where it has none of them."""
    times = [[p.time_us.p50 for p in r.phases if p.label in labels and p.time_us] for r in records]
    return [sum(found) if found else float("nan") for found in times]


def _bytes(key: str, pattern: str, records: Sequence[Record], names: list[str]) -> Figure:
    data: list[Plot] = []
    for index, link in enumerate(_LINKS):
        sent = [sum(_sent(phase).get(link, 0) for phase in record.phases) for record in records]
        if any(sent):
            data.append(_stack(link.replace("_", " "), names, [float(value) for value in sent], index, "B"))
    alt = f"bytes of {pattern} by link class, stacked, for {len(records)} cases."
    caption = "Sent by all ranks over links of each class, as the schedule states; what stays on its rank is not drawn."
    return Figure(
        id=key,
        title=f"{visible(pattern)}: byte ledger",
        alt=visible(alt),
        caption=caption,
        data=data,
        layout=_layout("bytes", names),
    )


def _sent(phase: PhaseResult) -> dict[str, int]:
    sent = phase.ledger.sent_bytes
    return {link: sent.get(link, 0) for link in _LINKS if sent.get(link)}


def _stack(name: str, names: list[str], values: list[float], index: int, unit: str) -> Plot:
    return {
        "type": "bar",
        "orientation": "h",
        "name": plot_text(name),
        "y": list(range(len(names))),
        "x": rounded(values),
        "text": [f"{bar}<br>{plot_text(name)}" for bar in names],
        "textposition": "none",
        "hovertemplate": f"%{{text}}: %{{x:.4g}} {unit}<extra></extra>",
        "marker": {
            "color": COLOURS[index % len(COLOURS)],
            "pattern": {"shape": _PATTERNS[index // len(COLOURS) % len(_PATTERNS)]},
        },
    }


def _layout(title: str, names: list[str]) -> Plot:
    return {
        "barmode": "stack",
        "legend": {"traceorder": "normal"},
        "showlegend": True,
        "xaxis": {"title": {"text": title}, "rangemode": "tozero"},
        "yaxis": {"tickvals": list(range(len(names))), "ticktext": names, "autorange": "reversed", "automargin": True},
        "bars": len(names),
    }


def derived_tables(runs: Sequence[Run]) -> list[DataTable]:
    """What patterns derive from their phases: sums such as ``roundtrip``, and ratios such as ``skew_penalty``."""
    sums, ratios = [], []
    for run in runs:
        for record in run.records:
            for name, total in record.subtotals.items():
                times = (total.time_us.p50, total.time_us.p50_lo, total.time_us.p50_hi)
                sums.append(
                    [visible(record.case), visible(name), visible(", ".join(total.labels)), *map(number, times)]
                )
            ratios += [[visible(record.case), visible(name), number(ratio)] for name, ratio in record.ratios.items()]
    tables = []
    if ratios:
        heads = (TableColumn("case"), TableColumn("ratio"), TableColumn("value", number=True))
        caption = "Quotients of medians: a skew_penalty is the time over that of the same bytes in equal splits."
        tables.append(DataTable(id="ratios", title="Ratios", caption=caption, columns=heads, rows=ratios))
    if sums:
        heads = (TableColumn("case"), TableColumn("sum"), TableColumn("phases"))
        figures = (TableColumn(f"{name} (us)", number=True) for name in ("p50", "low", "high"))
        caption = "Phases added up on each rank; then the slowest rank of each iteration."
        tables.append(
            DataTable(id="subtotals", title="Sums of phases", caption=caption, columns=(*heads, *figures), rows=sums)
        )
    return tables
