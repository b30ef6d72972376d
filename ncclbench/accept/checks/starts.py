"""Process starts: all declared starts finished, in different processes, with medians close to each other.

All declared starts are kept, and a failed start counts. So a run that was repeated until it looked good is found here.
"""

import statistics
from collections.abc import Iterator, Sequence

import msgspec

from ncclbench.accept.case_facts import CaseView, shown_ranks
from ncclbench.accept.check_context import CheckContext, row
from ncclbench.store.events import Event
from ncclbench.store.records import Json
from ncclbench.store.verdict import Action, CheckResult, Verdict
from ncclbench.units import counted


def check(subject: CheckContext) -> Iterator[CheckResult]:
    """One result for the declared starts, one per faulty start, and one per case for the spread of its starts."""
    run, limits = subject.run, subject.rules.profile.limits
    broken = [result for start in range(run.declared_starts) for result in _faults_of_start(subject, start)]
    yield from broken
    if run.starts_of_a_case < limits.min_starts:
        each = " of each mode" if run.mode_variables else ""
        reason = (
            f"the plan declares {counted(run.starts_of_a_case, 'process start')}{each}; a verdict on performance needs "
        )
        yield _result("declared", Verdict.INCONCLUSIVE, f"{reason}{limits.min_starts}")
    elif not broken:
        yield _result("declared", Verdict.PASS, f"{run.declared_starts} declared, all finished")
    yield from _same_processes(subject)
    for view in subject.cases:
        if len(view.timed) > 1:
            exemption = subject.exemption(view)
            yield _result(view.id, Verdict.NOT_RUN, exemption) if exemption else _spread(view, limits.start_spread)


def _result(
    subject: str,
    verdict: Verdict,
    reason: str,
    action: Action | None = None,
    evidence: Sequence[dict[str, Json]] = (),
    cause: str | None = None,
) -> CheckResult:
    return CheckResult(
        check="starts",
        subject=subject,
        verdict=verdict,
        reason=reason,
        action=action,
        evidence=list(evidence),
        cause=cause,
    )


def _faults_of_start(subject: CheckContext, start: int) -> Iterator[CheckResult]:
    """The faults of one start: not made, interrupted, failed cases, or lost ranks."""
    run, name = subject.run, f"start {start}"
    events = [event for event in run.events if event.start == start]
    failed = [r for r in run.records if r.start == start and r.status in ("failed", "timeout")]
    missing = run.missing_from(start)
    if failed:
        yield _result(
            name,
            Verdict.INCONCLUSIVE,
            f"{failed[0].case}: {failed[0].status}: {failed[0].reason}; go on with --resume",
            action=Action.ISOLATE if failed[0].ranks else Action.MONITOR,
            evidence=[row(record, status=record.status, reason=record.reason, ranks=record.ranks) for record in failed],
            cause="environment",
        )
    elif missing and _has_begun(events):
        reason = f"was cut off: {counted(len(missing), 'case')} missing, the first is {missing[0]}; go on with --resume"
        yield _result(name, Verdict.INCONCLUSIVE, reason, evidence=[{"missing": missing}], cause="environment")
    elif missing:
        yield _result(name, Verdict.INCONCLUSIVE, "has not been made yet; go on with --resume")
    else:
        lost = [event for event in events if event.kind == "lost" and event.ranks]
        if lost:
            ranks = sorted({rank for event in lost for rank in event.ranks})
            reason = f"lost {shown_ranks(ranks)} on the way ({lost[0].reason}), and a start that failed counts"
            yield _result(
                name,
                Verdict.INCONCLUSIVE,
                reason,
                action=Action.ISOLATE,
                evidence=[msgspec.to_builtins(event) for event in lost],
            )


def _has_begun(events: list[Event]) -> bool:
    return any(event.kind in ("start", "resume", "case") for event in events)


def _same_processes(subject: CheckContext) -> Iterator[CheckResult]:
    """One result per start that ran in the processes of an earlier start."""
    seen: dict[tuple[str | int | None, ...], int] = {}
    for event in subject.run.events:
        if event.kind == "start" and event.pids:
            # With the mark of rank 0's process, if there is one: in containers every start may have the same PIDs.
            other = seen.setdefault((event.process, *event.pids), event.start)
            if other != event.start:
                reason = f"ran in the very processes of start {other}"
                pids: list[dict[str, Json]] = [{"pids": event.pids}]
                yield _result(f"start {event.start}", Verdict.INCONCLUSIVE, reason, evidence=pids)


def _spread(view: CaseView, limit: float) -> CheckResult:
    medians = [record.time_us.p50 for record in view.timed if record.time_us is not None]
    middle = statistics.median(medians)
    spread = (max(medians) - min(medians)) / middle if middle > 0 else float("inf")
    wide = spread > limit
    shown = ", ".join(f"{median:.4g}" for median in medians)
    return _result(
        view.id,
        Verdict.INCONCLUSIVE if wide else Verdict.PASS,
        f"medians {shown} us: {spread:.1%} apart, {'limit' if wide else 'within'} {limit:.1%}",
        action=Action.MONITOR if wide else None,
        evidence=[row(record) for record in view.timed],
    )
