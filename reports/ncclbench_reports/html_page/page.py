"""The page: what stands where. Everything in it is text and plain data; the template only puts it in place."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ncclbench.store.records import PathRecord
from ncclbench.store.run_directory import Run
from ncclbench.store.verdict import CheckResult, RunVerdict
from ncclbench.topology import TopologyRecord
from ncclbench_reports.common.across_starts import across_starts, by_date
from ncclbench_reports.common.record_frame import flat_frame, phases_frame, plain_rows
from ncclbench_reports.common.wording import NO_VERDICT, judgements, stamps, times_are, visible, warnings_of
from ncclbench_reports.html_page.curves import (
    MOST_PATTERNS,
    bounds_of,
    curve_figures,
    curve_groups,
    limits_of,
    trend_figures,
)
from ncclbench_reports.html_page.figures import Figure, short_names
from ncclbench_reports.html_page.flow_heatmaps import Endpoint, flow_figures, nic_residuals, percent, residual_figure
from ncclbench_reports.html_page.phase_figures import derived_tables, phase_figures
from ncclbench_reports.html_page.rank_figures import RankStatistics, rank_figures, rank_statistics
from ncclbench_reports.html_page.rank_places import Places
from ncclbench_reports.html_page.routing_skew import skew_figures
from ncclbench_reports.html_page.tables import (
    DataTable,
    TableColumn,
    across_table,
    number,
    phases_table,
    results_table,
)

_MOST_REASONS = 6
_WORDS = {"FAIL": "failed", "INCONCLUSIVE": "inconclusive", "NOT_RUN": "not run", "PASS": "passed"}
# Of the provenance, what the head of the page has already.
_SAID_BEFORE = ("transport: transport",)
_PATH_FACTS = ("version", "network", "links", "proof", "gdr", "nvls")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with what stands below it."""

    id: str
    title: str
    intro: str = ""
    figures: Sequence[Figure] = field(default_factory=list)
    tables: Sequence[DataTable] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RunCard:
    """A run at the head of the page: its verdict, why, and what it was measured on."""

    name: str
    path: str
    verdict: str
    says: str
    reasons: Sequence[str]
    profile: str
    starts: str
    actions: Sequence[str]
    facts: Sequence[tuple[str, str]]
    warnings: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Page:
    """All of a report."""

    title: str
    stamps: Sequence[str]
    cards: Sequence[RunCard]
    sections: Sequence[Section]
    times: str = "Times are medians"

    @property
    def figures(self) -> list[Figure]:
        """Those of all sections."""
        return [figure for section in self.sections for figure in section.figures]

    @property
    def tables(self) -> list[DataTable]:
        """Those of all sections."""
        return [table for section in self.sections for table in section.tables]


def make_page(runs: Sequence[Run]) -> Page:
    """Everything that a report on `runs` shows."""
    judged = judgements(runs)
    names = dict(zip((str(run.path) for run in runs), short_names([str(run.path) for run in runs]), strict=True))
    flat = flat_frame(runs)
    rows = plain_rows(flat)
    problems: dict[str, list[str]] = {}
    by_run = [_run_sections(run, names, problems) for run in runs]
    limits: dict[str, dict[str, float]] = {}
    for found in (*(bounds_of(run.records) for run in runs), limits_of(judged)):
        for case, known in found.items():
            limits.setdefault(case, {}).update(known)
    figures = curve_figures(rows, names, limits)
    sections = [
        _checks_section(runs, judged, names),
        Section(id="curves", title="Bandwidth and time against size", intro=_curves_intro(rows), figures=figures),
        *(section for sections in by_run for section in sections),
        _across_section(flat, names),
        _data_section(runs, rows, names),
    ]
    cards = [
        _card(run, judgement, names, problems.get(str(run.path), []))
        for run, judgement in zip(runs, judged, strict=True)
    ]
    all_stamps = [stamp for run, judgement in zip(runs, judged, strict=True) for stamp in stamps(run, judgement)]
    return Page(
        title=f"ncclbench: {', '.join(names.values())}" if len(names) < 4 else f"ncclbench: {len(names)} runs",
        stamps=list(dict.fromkeys(all_stamps)),
        cards=cards,
        sections=[section for section in sections if section.figures or section.tables],
        times="; ".join(dict.fromkeys(times_are(run)[:1].upper() + times_are(run)[1:] for run in runs)),
    )


def _curves_intro(rows: Sequence[dict[str, Any]]) -> str:
    patterns = len(curve_groups([row for row in rows if row["p50_us"] is not None]))
    means = any(row["time_is"] == "mean" for row in rows)
    text = (
        "Means over launches as imported logs have them, and medians where a log has every launch; "
        if means
        else "Medians over iterations of the slowest rank, with their 95% intervals; "
    ) + "both axes are logarithmic. GB is 1e9 bytes, sizes are powers of two."
    if any(row["start"] for row in rows):
        text += " Over several process starts: the median of the starts, with the least and the most."
    more = f" The first {MOST_PATTERNS} of {patterns} are drawn; the table has all."
    return text + (more if patterns > MOST_PATTERNS else "")


def _run_sections(run: Run, names: Mapping[str, str], problems: dict[str, list[str]]) -> list[Section]:
    """What belongs to one run: its fabric, its ranks and its phases."""
    places = Places.of(run)
    several = len(names) > 1
    prefix = f"run{list(names).index(str(run.path))}-" if several else ""
    of_run = f" in {names[str(run.path)]}" if several else ""
    statistics = rank_statistics(run, places)
    problems[str(run.path)] = statistics.problems
    nics = nic_residuals(run, places)
    fabric = flow_figures(run, places, prefix)
    if nics:
        fabric.append(_nic_figure(nics, prefix))
    return [
        Section(id=f"{prefix}fabric", title=f"Flows over the fabric{of_run}", figures=fabric),
        Section(
            id=f"{prefix}ranks",
            title=f"Ranks{of_run}",
            figures=rank_figures(statistics, places, prefix),
            tables=_rank_tables(statistics, places, nics, prefix),
        ),
        Section(
            id=f"{prefix}moe",
            title=f"Phases{of_run}",
            intro="Cases of several phases: where the time goes, and where the bytes go.",
            figures=[*phase_figures(run, prefix), *skew_figures(run, prefix)],
        ),
    ]


def _nic_figure(nics: Sequence[Endpoint], prefix: str) -> Figure:
    names = [nic.name for nic in nics]
    caption = (
        "For each NIC the median over distinct peers of its flows' rates against the median of all flows. "
        "Below zero is slower. A path that is slow moves only one peer; a bad NIC moves all of its own."
    )
    if max(nic.peers for nic in nics) < 3:
        caption += " Here a NIC has fewer than three peers: it cannot be told from its paths."
    series = {"sending": (names, [nic.send for nic in nics]), "receiving": (names, [nic.receive for nic in nics])}
    return residual_figure(f"{prefix}nic-residuals", "Every NIC, sorted", series, caption)


def _rank_tables(found: RankStatistics, places: Places, nics: Sequence[Endpoint], prefix: str) -> list[DataTable]:
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
                visible(places.node_names[places.nodes_R[rank]]),
                str(places.rails_R[rank]),
                visible(places.leaf(rank) or ""),
                number(percent(float(found.residual_R[rank]))),
                number(_finite(found.late_us_R[rank])),
            ]
            for rank in range(len(places.nodes_R))
        ]
        tables.append(_table(f"{prefix}rank-table", "Ranks", "One row a rank.", heads, rows))
    if nics:
        heads = (("NIC", False), ("sending (%)", True), ("receiving (%)", True), ("peers", True))
        rows = [[visible(n.name), number(_known(n.send)), number(_known(n.receive)), str(n.peers)] for n in nics]
        tables.append(_table(f"{prefix}nic-table", "NICs", "One row a NIC: its flows against all flows.", heads, rows))
    return tables


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _known(log: float) -> float | None:
    return None if math.isnan(log) else percent(log)


def _table(
    key: str, title: str, caption: str, heads: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]
) -> DataTable:
    columns = [TableColumn(name, number=is_number, long=name == "evidence") for name, is_number in heads]
    return DataTable(id=key, title=title, caption=caption, columns=columns, rows=rows).trimmed()


def _checks_section(runs: Sequence[Run], judged: Sequence[RunVerdict | None], names: Mapping[str, str]) -> Section:
    several = len(names) > 1
    heads = [("run", False)] if several else []
    heads += [(name, False) for name in ("verdict", "check", "subject", "reason", "action", "evidence")]
    # What failed stands first.
    order = {word: place for place, word in enumerate(_WORDS)}
    rows = []
    for run, judgement in zip(runs, judged, strict=True):
        for check in sorted(judgement.checks if judgement else [], key=lambda check: order[check.verdict]):
            evidence = "\n".join(_one_evidence(row, check.subject) for row in check.evidence)
            cells = [check.verdict, check.check, check.subject, check.reason or "", check.action or "", evidence]
            shown = [names[str(run.path)], *cells] if several else cells
            rows.append([*(visible(cell) for cell in shown[:-1]), "\n".join(map(visible, shown[-1].split("\n")))])
    table = _table("checks-table", "Checks", "One row a check on a subject, the failed ones first.", heads, rows)
    return Section(id="checks", title="Checks and their evidence", tables=[table] if rows else [])


def _one_evidence(row: Mapping[str, Any], subject: str) -> str:
    """A line; what is not known, and what the row is about anyway, is left out."""
    return ", ".join(f"{name} {_brief(value)}" for name, value in row.items() if value is not None and value != subject)


def _brief(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _across_section(flat: Any, names: Mapping[str, str]) -> Section:
    across = plain_rows(across_starts(flat))
    figures = trend_figures(plain_rows(by_date(flat)), names) if across else []
    return Section(
        id="trends", title="Over process starts", figures=figures, tables=[across_table(across)] if across else []
    )


def _data_section(runs: Sequence[Run], rows: Sequence[dict[str, Any]], names: dict[str, str]) -> Section:
    phases = plain_rows(phases_frame(runs))
    tables = [results_table(rows, names)] if rows else []
    tables += derived_tables(runs)
    tables += [phases_table(phases, names)] if phases else []
    return Section(id="data", title="All figures", tables=tables)


def _card(run: Run, judgement: RunVerdict | None, names: Mapping[str, str], problems: Sequence[str]) -> RunCard:
    profile = judgement.profile if judgement else None
    starts = judgement.starts if judgement else None
    checks = judgement.checks if judgement else []
    failed = [check for check in checks if check.verdict == "FAIL" and check.action]
    return RunCard(
        name=visible(names[str(run.path)]),
        path=visible(run.path),
        verdict=judgement.verdict if judgement else "",
        says=judgement.verdict if judgement else NO_VERDICT,
        reasons=_reasons(judgement) if judgement else [],
        profile=visible(f"{profile.name} (sha256 {profile.sha256[:16]})") if profile else "",
        starts=". ".join(
            ([f"{starts.present} of {starts.declared} process starts"] if starts else []) + _counts(checks)
        ),
        actions=_actions(failed),
        facts=facts_of(run),
        warnings=[*warnings_of(run), *(visible(problem) for problem in problems)]
        + ([] if run.records else ["no case has finished"]),
    )


def _reasons(judgement: RunVerdict) -> list[str]:
    """The verdict's own reasons, and then what of the checks decided it: once for everybody who is blamed."""
    decisive = [check for check in judgement.checks if check.verdict == judgement.verdict and check.verdict != "PASS"]
    said = []
    for (name, who), found in _by_blame(decisive, lambda check: check.check).items():
        first = found[0]
        reason = first.reason or ""
        case = first.subject.removesuffix(f": {who}") if reason.startswith(who) else first.subject
        said.append(f"{name}, {case}: {reason}{_others(found)}")
    more = [f"and {len(said) - _MOST_REASONS} more; see the checks"] if len(said) > _MOST_REASONS else []
    return [visible(reason, 400) for reason in (*judgement.reasons, *said[:_MOST_REASONS], *more)]


def _actions(failed: Sequence[CheckResult]) -> list[str]:
    """What to do, and with whom: once each, however many cases say so."""
    return [
        visible(f"{action}: {who}{_others(found)}")
        for (action, who), found in _by_blame(failed, lambda check: check.action or "").items()
    ]


def _by_blame(
    checks: Sequence[CheckResult], kind: Callable[[CheckResult], str]
) -> dict[tuple[str, str], list[CheckResult]]:
    """By kind and by who is blamed: what stands behind the case in a subject, or all of it."""
    found: dict[tuple[str, str], list[CheckResult]] = {}
    for check in checks:
        found.setdefault((kind(check), check.subject.rpartition(": ")[2]), []).append(check)
    return found


def _others(found: Sequence[CheckResult]) -> str:
    return f" (and in {len(found) - 1} more case{'s' if len(found) > 2 else ''})" if len(found) > 1 else ""


def _counts(checks: Sequence[CheckResult]) -> list[str]:
    """How many checks ended how; those that never ran are no passes."""
    counts = {word: sum(check.verdict == word for check in checks) for word in _WORDS}
    said = ", ".join(f"{count} {_WORDS[word]}" for word, count in counts.items() if count)
    return [f"Checks: {said}"] if said else []


def facts_of(run: Run) -> list[tuple[str, str]]:
    """Provenance: what was measured on what, in name and value."""
    manifest = run.manifest
    topology = manifest.topology or TopologyRecord()
    nodes = topology.node_names
    shown = ", ".join(visible(name, 80) for name in nodes[:8]) + (
        f" and {len(nodes) - 8} more" if len(nodes) > 8 else ""
    )
    facts: list[tuple[str, Any]] = [
        ("run directory", run.path),
        ("started", manifest.started),
        ("plan", manifest.plan.name),
        ("transport", manifest.transport),
        ("device", manifest.device),
        ("ranks", manifest.world_size),
        ("nodes", f"{len(nodes)}: {shown}" if nodes else None),
    ]
    facts += [(f"{name} known from", value) for name, value in topology.sources.items()]
    facts += [fact for fact in _flattened(msgspec.to_builtins(manifest.provenance)) if fact[0] not in _SAID_BEFORE]
    facts += _paths(run)
    states = [gpu.before for record in run.records for gpu in record.gpus if gpu.before]
    gpus = sorted({*manifest.gpu_names, *(state.name for state in states if state.name)})
    facts += [("GPUs", ", ".join(gpus))] if gpus else []
    return [(visible(name), visible(value)) for name, value in facts if value not in (None, "", {}, [])]


def _paths(run: Run) -> list[tuple[str, Any]]:
    """What the library's log said of the way, over all records."""
    found: dict[str, Counter[str]] = {}
    for record in run.records:
        for name, value in msgspec.to_builtins(record.path or PathRecord()).items():
            if name in _PATH_FACTS:
                found.setdefault(f"path {name}", Counter())[str(_joined(value))] += 1
    return [
        (name, "; ".join(f"{value} ({count} cases)" if len(values) > 1 else value for value, count in values.items()))
        for name, values in sorted(found.items())
    ]


def _flattened(data: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in data.items():
        if isinstance(value, Mapping):
            found += [(f"{name}: {inner}", _joined(one)) for inner, one in value.items()]
        else:
            found.append((name.replace("_", " "), _joined(value)))
    return found


def _joined(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value
