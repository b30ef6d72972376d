"""The raw samples: readable, possible (no NaN, infinite, negative or zero duration), and equal to the record."""

from collections.abc import Iterator

import numpy as np

from ncclbench.accept.check_context import CheckContext, row
from ncclbench.accept.impossible_samples import impossible
from ncclbench.errors import UsageError
from ncclbench.store.records import Record
from ncclbench.store.verdict import CheckResult, Verdict
from ncclbench.units import counted


def check(subject: CheckContext) -> Iterator[CheckResult]:
    """One result per measured case."""
    for view in subject.cases:
        complaints = {record.start: _complaint(subject, record) for record in view.timed}
        bad = {start: complaint for start, complaint in complaints.items() if complaint}
        if view.timed:
            yield CheckResult(
                check="samples",
                subject=view.id,
                verdict=Verdict.INCONCLUSIVE if bad else Verdict.PASS,
                reason="; ".join(f"{what} (start {start})" for start, what in bad.items()) or "sound in every start",
                evidence=[row(record, complaint=complaints[record.start]) for record in view.timed],
            )


def _complaint(subject: CheckContext, record: Record) -> str | None:
    if record.samples is None:
        return "no raw samples were kept"
    try:
        seconds_RN = subject.samples(record)
    except UsageError as error:
        return str(error).removeprefix(f"{subject.run.path}/")
    wrong = impossible(seconds_RN)
    if wrong:
        return wrong
    return _contradiction(record, seconds_RN, subject.rules.profile.limits.sum_tolerance)


def _contradiction(record: Record, seconds_RN: np.ndarray, tolerance: float) -> str | None:
    """How the record differs from its samples, in words; None if it does not."""
    assert record.time_us is not None
    ranks, iterations = seconds_RN.shape
    if (ranks, iterations) != (record.world_size, record.time_us.n):
        said = f"{counted(record.world_size, 'rank')} and {record.time_us.n} iterations"
        return f"the record is of {said}, its samples of {ranks} and {iterations}"
    p50_us = float(np.median(seconds_RN.max(axis=0)) * 1e6)
    if abs(p50_us - record.time_us.p50) > tolerance * p50_us:
        return f"the record says p50 {record.time_us.p50:.6g} us, its samples say {p50_us:.6g}"
    return None
