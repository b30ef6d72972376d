"""The content of the HTML report: which cards and which sections it has, and what is in each."""

import math
from collections.abc import Mapping, Sequence

from ncclbench.analysis.residuals import EndpointResidual, RankResiduals, nic_residuals, percent
from ncclbench.store.records import Json
from ncclbench.store.run_directory import Run
from ncclbench.store.verdict import RunVerdict
from ncclbench_reports.common.process_starts import across_starts, by_date
from ncclbench_reports.common.record_rows import RecordRow, phase_rows, record_rows
from ncclbench_reports.common.run_summary import stamps, times_are, verdicts_of
from ncclbench_reports.common.text_format import visible
from ncclbench_reports.html_page.endpoint_names import EndpointNames
from ncclbench_reports.html_page.figures import Figure, short_names
from ncclbench_reports.html_page.flow_heatmaps import flow_figures, nics_of, residual_figure
from ncclbench_reports.html_page.page_model import Page, Section
from ncclbench_reports.html_page.phase_figures import derived_tables, phase_figures
from ncclbench_reports.html_page.rank_figures import rank_figures, rank_statistics
from ncclbench_reports.html_page.rates import limits_of
from ncclbench_reports.html_page.routing_skew import skew_figures
from ncclbench_reports.html_page.run_card import VERDICT_WORDS, card_of
from ncclbench_reports.html_page.size_curves import MOST_PATTERNS, curve_figures, curve_groups, trend_figures
from ncclbench_reports.html_page.tables import (
    DataTable,
    TableColumn,
    across_table,
    number,
    phases_table,
    results_table,
)


def page_of(runs: Sequence[Run]) -> Page:
    """Everything that a report on `runs` shows."""
    verdicts = verdicts_of(runs)
    names = dict(zip((str(run.path) for run in runs), short_names([str(run.path) for run in runs]), strict=True))
    rows = record_rows(runs)
    problems: dict[str, list[str]] = {}
    of_runs = [section for run in runs for section in _run_sections(run, names, problems)]
    figures = curve_figures(rows, names, limits_of([run.records for run in runs], verdicts))
    sections = [
        _checks_section(runs, verdicts, names),
        Section(id="curves", title="Bandwidth and time against size", intro=_curves_intro(rows), figures=figures),
        *of_runs,
        _across_section(rows, names),
        _data_section(runs, rows, names),
    ]
    judged = list(zip(runs, verdicts, strict=True))
    return Page(
        title=f"ncclbench: {', '.join(names.values())}" if len(names) < 4 else f"ncclbench: {len(names)} runs",
        stamps=list(dict.fromkeys(stamp for run, verdict in judged for stamp in stamps(run, verdict))),
        cards=[card_of(run, verdict, names[str(run.path)], problems[str(run.path)]) for run, verdict in judged],
        sections=[section for section in sections if section.figures or section.tables],
        times="; ".join(dict.fromkeys(times_are(run)[:1].upper() + times_are(run)[1:] for run in runs)),
    )


def _curves_intro(rows: Sequence[RecordRow]) -> str:
    patterns = len(curve_groups([row for row in rows if row.p50_us is not None]))
    means = any(row.time_is == "mean" for row in rows)
    text = (
        "Means over launches as imported logs have them, and medians where a log has every launch; "
        if means
        else "Medians over iterations of the slowest rank, with their 95% intervals; "
    ) + "both axes are logarithmic. GB is 1e9 bytes, sizes are powers of two."
    if any(row.start for row in rows):
        text += " Over several process starts: the median of the starts, with the least and the most."
    more = f" The first {MOST_PATTERNS} of {patterns} are drawn; the table has all."
    return text + (more if patterns > MOST_PATTERNS else "")


def _run_sections(run: Run, names: Mapping[str, str], problems: dict[str, list[str]]) -> list[Section]:
    """The sections of one run: its fabric, its ranks and its phases; adds what could not be read to `problems`."""
    ranks = EndpointNames.of(run)
    several = len(names) > 1
    prefix = f"run{list(names).index(str(run.path))}-" if several else ""
    of_run = f" in {names[str(run.path)]}" if several else ""
    statistics = rank_statistics(run, ranks)
    problems[str(run.path)] = statistics.problems
    nics = nic_residuals(run, *nics_of(ranks))
    fabric = flow_figures(run, ranks, prefix)
    if nics:
        fabric.append(_nic_figure(nics, prefix))
    return [
        Section(id=f"{prefix}fabric", title=f"Flows over the fabric{of_run}", figures=fabric),
        Section(
            id=f"{prefix}ranks",
            title=f"Ranks{of_run}",
            figures=rank_figures(statistics, run, ranks, prefix),
            tables=_rank_tables(statistics, ranks, nics, prefix),
        ),
        Section(
            id=f"{prefix}moe",
            title=f"Phases{of_run}",
            intro="Cases of several phases: the time and the bytes of each.",
            figures=[*phase_figures(run, prefix), *skew_figures(run, prefix)],
        ),
    ]


def _nic_figure(nics: Sequence[EndpointResidual], prefix: str) -> Figure:
    names = [nic.name for nic in nics]
    caption = (
        "Per NIC the median over distinct peers of its flows' rates against the median of all flows. "
        "Below zero is slower. A slow path affects one peer only; a faulty NIC affects all of its peers."
    )
    if max(nic.peers for nic in nics) < 3:
        caption += " Here each NIC has fewer than three peers, so it cannot be distinguished from its paths."
    series = {"sending": (names, [nic.send for nic in nics]), "receiving": (names, [nic.receive for nic in nics])}
    return residual_figure(f"{prefix}nic-residuals", "Every NIC, sorted", series, caption)


def _rank_tables(
    found: RankResiduals, ranks: EndpointNames, nics: Sequence[EndpointResidual], prefix: str
) -> list[DataTable]:
    tables = []
    heads: Sequence[tuple[str, bool]]
    if found.cases:
        heads = (
            ("rank", True),
            ("node", False),
            ("rail", True),
            ("leaf", False),
            ("residual (%)", True),
            ("after the first (us)", True),
        )
        rows = [
            [
                str(rank),
                visible(ranks.node(rank)),
                str(ranks.rails_R[rank]),
                visible(ranks.leaf(rank)),
                number(percent(float(found.residual_R[rank]))),
                number(_finite(float(found.late_us_R[rank]))),
            ]
            for rank in range(len(ranks.nodes_R))
        ]
        tables.append(_table(f"{prefix}rank-table", "Ranks", "One row per rank.", heads, rows))
    if nics:
        heads = (("NIC", False), ("sending (%)", True), ("receiving (%)", True), ("peers", True))
        rows = [
            [
                visible(nic.name),
                number(_finite(percent(nic.send))),
                number(_finite(percent(nic.receive))),
                str(nic.peers),
            ]
            for nic in nics
        ]
        caption = "One row per NIC: its flows against all flows."
        tables.append(_table(f"{prefix}nic-table", "NICs", caption, heads, rows))
    return tables


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def _table(
    key: str, title: str, caption: str, heads: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]
) -> DataTable:
    columns = [TableColumn(name, number=is_number, long=name == "evidence") for name, is_number in heads]
    return DataTable(id=key, title=title, caption=caption, columns=columns, rows=rows).trimmed()


def _checks_section(runs: Sequence[Run], verdicts: Sequence[RunVerdict | None], names: Mapping[str, str]) -> Section:
    several = len(names) > 1
    heads = [("run", False)] if several else []
    heads += [(name, False) for name in ("verdict", "check", "subject", "reason", "action", "evidence")]
    order = list(VERDICT_WORDS)
    rows = []
    for run, verdict in zip(runs, verdicts, strict=True):
        for check in sorted(verdict.checks if verdict else [], key=lambda check: order.index(check.verdict)):
            cells = [check.verdict, check.check, check.subject, check.reason or "", check.action or ""]
            shown = [visible(cell) for cell in ([names[str(run.path)], *cells] if several else cells)]
            rows.append([*shown, "\n".join(visible(_evidence(row, check.subject)) for row in check.evidence)])
    table = _table("checks-table", "Checks", "One row per check and subject, the failed ones first.", heads, rows)
    return Section(id="checks", title="Checks and their evidence", tables=[table] if rows else [])


def _evidence(row: Mapping[str, Json], subject: str) -> str:
    """One line, without what is unknown and without the subject itself."""
    known = {name: value for name, value in row.items() if value is not None and value != subject}
    return ", ".join(f"{name} {f'{value:.6g}' if isinstance(value, float) else value}" for name, value in known.items())


def _across_section(rows: Sequence[RecordRow], names: Mapping[str, str]) -> Section:
    across = across_starts(rows)
    return Section(
        id="trends",
        title="Over process starts",
        figures=trend_figures(by_date(rows), names),
        tables=[across_table(across)] if across else [],
    )


def _data_section(runs: Sequence[Run], rows: Sequence[RecordRow], names: Mapping[str, str]) -> Section:
    phases = phase_rows(runs)
    tables = [results_table(rows, names)] if rows else []
    tables += derived_tables(runs)
    tables += [phases_table(phases, names)] if phases else []
    return Section(id="data", title="All figures", tables=tables)
