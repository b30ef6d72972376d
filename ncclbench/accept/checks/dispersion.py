"""Noise inside a process start: a wide interval of the median, or a long tail, makes a case inconclusive."""

from collections.abc import Iterator

from ncclbench.accept.check_context import CheckContext, row
from ncclbench.accept.profile import Limits
from ncclbench.store.records import Summary
from ncclbench.store.verdict import Action, CheckResult, Verdict


def check(subject: CheckContext) -> Iterator[CheckResult]:
    """One result per measured case."""
    limits = subject.rules.profile.limits
    for view in subject.cases:
        exemption = subject.exemption(view)
        if exemption:
            yield CheckResult(check="dispersion", subject=view.id, verdict=Verdict.NOT_RUN, reason=exemption)
            continue
        complaints = []
        for record in view.timed:
            assert record.time_us is not None
            complaint = _complaint(record.time_us, limits)
            if complaint:
                complaints.append(f"{complaint} (start {record.start})")
        if view.timed:
            yield CheckResult(
                check="dispersion",
                subject=view.id,
                verdict=Verdict.INCONCLUSIVE if complaints else Verdict.PASS,
                reason="; ".join(complaints) or "quiet enough in every start",
                action=Action.MONITOR if complaints else None,
                evidence=[row(r, p95_us=r.time_us.p95 if r.time_us else None) for r in view.timed],
            )


def _complaint(summary: Summary, limits: Limits) -> str | None:
    if summary.n < limits.min_samples or summary.p50_lo is None or summary.p50_hi is None:
        return f"too few samples: {summary.n}, needs {limits.min_samples}"
    width = (summary.p50_hi - summary.p50_lo) / 2 / summary.p50 if summary.p50 > 0 else float("inf")
    if width > limits.median_width:
        return f"too noisy: the median is known to {width:.1%} only, wanted {limits.median_width:.1%}"
    if summary.p95 is not None and summary.p95 > limits.p95_over_p50 * summary.p50:
        return f"long tail: p95 is {summary.p95 / summary.p50:.2f} times the median, limit {limits.p95_over_p50:g}"
    return None
