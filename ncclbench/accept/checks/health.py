"""GPUs and NICs that throttle or count errors, which slow a case down on a good fabric too.

The verdict for each warning is data: the profile's entries, then ``health.toml``.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ncclbench.accept.case_facts import matches_any, shown_ranks
from ncclbench.accept.check_context import CheckContext
from ncclbench.accept.profile import Health
from ncclbench.store.gpu_warnings import crc_warnings
from ncclbench.store.records import GpuState, Record
from ncclbench.store.verdict import CheckResult, Verdict
from ncclbench.units import counted


@dataclass(frozen=True)
class Complaint:
    """One warning of one device: its case, start, rank and device, and its text."""

    case: str
    start: int
    rank: int | None
    device: str | None
    warning: str


def check(subject: CheckContext) -> Iterator[CheckResult]:
    """One result per kind of device and warning, with the ranks that have it."""
    records = subject.run.records
    gpus = sum(len(record.gpus) for record in records)
    warned = [
        Complaint(record.case, record.start, gpu.rank, None, warning)
        for record in records
        for gpu in record.gpus
        for warning in gpu.warnings
    ]
    # The GPU of a rank can have few errors in each case, and too many over all cases.
    named = {(_kind_of(one.warning), one.start, one.rank) for one in warned}
    over = [one for one in _over_starts(records) if (_kind_of(one.warning), one.start, one.rank) not in named]
    yield from _judge(subject, "gpu", gpus, [*warned, *over], subject.run.manifest.device != "cpu")
    read = [(record, record.path.counters) for record in records if record.path and record.path.counters]
    moved = [
        Complaint(record.case, record.start, move.rank, move.port, f"{move.counter} rose by {move.by}")
        for record, counters in read
        for move in counters.moved or []
        if move.counter
    ]
    yield from _judge(subject, "nic", len(read), moved, expected=False)


def _judge(
    subject: CheckContext, kind: str, seen: int, complaints: list[Complaint], expected: bool
) -> Iterator[CheckResult]:
    """The results for one kind of device, of which `seen` states were recorded."""
    by_kind: dict[str, list[Complaint]] = {}
    for one in complaints:
        by_kind.setdefault(_kind_of(one.warning), []).append(one)
    for text, group in sorted(by_kind.items()):
        yield _warning(kind, text, group, subject.rules.health)
    if not by_kind:
        verdict = Verdict.PASS if seen else Verdict.INCONCLUSIVE if expected else Verdict.NOT_RUN
        reason = "none throttled, no error counted" if seen else f"no state of a {kind.upper()} was recorded"
        yield CheckResult(check="health", subject=kind, verdict=verdict, reason=reason)


def _kind_of(warning: str) -> str:
    """A warning without its numbers."""
    return " ".join(word for word in warning.partition(" rose by ")[0].split() if not word.isdecimal())


def _over_starts(records: Iterable[Record]) -> Iterator[Complaint]:
    """The warnings of checksum errors of each rank's GPU over all cases of a process start."""
    states: dict[tuple[int, int], list[tuple[GpuState, GpuState]]] = {}
    for record in records:
        for gpu in record.gpus:
            if gpu.rank is not None and gpu.before is not None and gpu.after is not None:
                states.setdefault((record.start, gpu.rank), []).append((gpu.before, gpu.after))
    for (start, rank), stretches in states.items():
        for warning in crc_warnings(stretches):
            yield Complaint("all cases of a start", start, rank, None, warning)


def _warning(kind: str, text: str, complaints: list[Complaint], rules: Sequence[Health]) -> CheckResult:
    rule = next(rule for rule in rules if matches_any(text, [rule.match]))
    ranks = sorted({one.rank for one in complaints if one.rank is not None})
    where = shown_ranks(ranks) if ranks else f"{len(complaints)} places"
    return CheckResult(
        check="health",
        subject=f"{kind}: {text}",
        verdict=rule.verdict,
        reason=f"{text} on {where}, in {counted(len({one.case for one in complaints}), 'case')}",
        action=rule.action,
        evidence=[dict(vars(one)) for one in complaints[:64]],
    )
