"""What every format states about a run in the same words: stamps, verdict, warnings, losses, and what its times are."""

from collections.abc import Sequence

from ncclbench.store.run_directory import Run, Stamp
from ncclbench.store.verdict import RunVerdict, read_verdict
from ncclbench_reports.common.record_rows import RecordRow
from ncclbench_reports.common.text_format import visible

NO_VERDICT = "no verdict: this run was measured, not judged"
FORCED = "forced: compared although fabric, versions or settings differ"
IMPORTED_FROM = "imported from"
NO_REASON = "no reason was stored"

# Rates as another program defines them: columns of `RecordRow`, under heads that differ from ncclbench's own.
DEEPEP_RATES = (
    ("deepep_dispatch_gb_per_s", "dispatch as DeepEP counts"),
    ("deepep_combine_gb_per_s", "combine as DeepEP counts"),
)
DEEPEP_NOTE = (
    '"as DeepEP counts": all rows that the busiest rank receives, or sends back, its own included: R/(R-1) too '
    "high; beside DeepEP's own figures only, no bus bandwidth"
)

# Stamps that reports explain; the others are shown as they are stored.
_EXPLAINED = {
    Stamp.CPU_ONLY: "CPU only: proves logic, not a fabric",
    Stamp.SHARED_GPUS: "ranks share GPUs: proves logic, not a fabric",
    Stamp.ONE_MACHINE: "nodes of one machine: proves logic, not a fabric",
    Stamp.FORCED: FORCED,
}


def stamps(run: Run, verdict: RunVerdict | None) -> list[str]:
    """What every page of a report on `run` must show: the stamps of the run, then further ones of its verdict."""
    found: list[str] = []
    for stamp in run.stamps:
        found += _imports(run) if stamp is Stamp.IMPORTED else [_EXPLAINED.get(stamp, stamp.value)]
    stored = {stamp.value: stamp for stamp in Stamp}
    of_verdict = [text for text in (verdict.stamps if verdict else []) if stored.get(text) not in run.stamps]
    further = [_EXPLAINED.get(stored[text], text) if text in stored else visible(text) for text in of_verdict]
    # A profile's own stamp may be the end of another: "proves logic, not a fabric".
    found += [text for text in further if not any(other.endswith(f": {text}") for other in (*found, *further))]
    return list(dict.fromkeys(found))


def _imports(run: Run) -> list[str]:
    return [
        f"{IMPORTED_FROM} {visible(one.tool)} {visible(one.version or '')}".rstrip() for one in run.manifest.imported
    ]


def times_are(run: Run) -> str:
    """What the headline times of a run are."""
    kinds = {record.time_is for record in run.records}
    if "mean" not in kinds:
        return "time is the median over iterations of the slowest rank"
    if "median" not in kinds:
        return "time is a mean over launches, as the log has it"
    return "time is a mean over launches, as the log has it, where n is 1, and the median over iterations elsewhere"


def verdicts_of(runs: Sequence[Run]) -> list[RunVerdict | None]:
    """The verdict of each run; None of a run that was measured and not judged."""
    return [read_verdict(run.path) for run in runs]


def verdict_line(verdict: RunVerdict | None) -> str:
    """The verdict and its reasons in one line."""
    if verdict is None:
        return NO_VERDICT
    reasons = "; ".join(visible(reason) for reason in verdict.reasons)
    return f"{verdict.verdict}: {reasons}" if reasons else verdict.verdict


def unmeasured(run: Run) -> list[tuple[int, str]]:
    """The process start and the name of each planned case without a record, good or bad."""
    recorded = {(record.start, record.case) for record in run.records}
    planned = [(start, case) for start in range(run.declared_starts) for case in run.missing_from(start)]
    return [case for case in planned if case not in recorded]


def losses_of(run: Run) -> list[str]:
    """What a run lost as a whole: warnings, ranks that died, an interruption, and planned cases without a record."""
    found = [f"{event.kind}: {visible(event.says)}" for event in run.events if event.kind in ("warning", "lost")]
    if run.interrupted_in:
        found.append(f"interrupted in {visible(run.interrupted_in)}; continue it with --resume")
    if missing := len(unmeasured(run)):
        found.append(f"{missing} of the plan's cases {'was' if missing == 1 else 'were'} not measured")
    return found


def warnings_of(run: Run) -> list[str]:
    """What a reader must know before trusting a run, each once, with the number of its cases."""
    remarks: dict[str, list[str]] = {}
    for record in run.records:
        if record.status != "ok":
            remarks.setdefault(f"{record.status}: {record.reason or NO_REASON}", []).append(record.case)
        for note in record.notes:
            remarks.setdefault(note, []).append(record.case)
    found = [f"{visible(cases[0])}: {visible(what)}{and_more(len(cases) - 1)}" for what, cases in remarks.items()]
    return found + losses_of(run)


def and_more(count: int) -> str:
    """How many further cases a remark holds for."""
    return f" (and {count} more case{'s' if count > 1 else ''})" if count else ""


def deepep_rates(rows: Sequence[RecordRow]) -> list[tuple[str, str]]:
    """Of ``DEEPEP_RATES`` those that any row has."""
    return [(name, head) for name, head in DEEPEP_RATES if any(row.value(name) is not None for row in rows)]
