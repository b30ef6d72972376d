"""Arrival skew: a late rank makes the others wait, so that the collective looks slow."""

from collections.abc import Iterator

import numpy as np

from ncclbench.accept.case_facts import shown_ranks
from ncclbench.accept.check_context import CheckContext, row
from ncclbench.errors import UsageError
from ncclbench.store.records import Record
from ncclbench.store.verdict import Action, CheckResult, Verdict


def check(subject: CheckContext) -> Iterator[CheckResult]:
    """One result per case with a skew."""
    limit = subject.rules.profile.limits.skew_share
    for view in subject.cases:
        shares = [
            (record.skew_us.p50 / record.time_us.p50, record)
            for record in view.timed
            if record.skew_us is not None and record.time_us is not None and record.time_us.p50 > 0
        ]
        exemption = subject.exemption(view)
        if exemption:
            yield CheckResult(check="skew", subject=view.id, verdict=Verdict.NOT_RUN, reason=exemption)
        if exemption or not shares:
            continue
        share, record = max(shares, key=lambda pair: pair[0])
        late = share > limit
        latest = f"; {_latest(subject, record)}" if late else ""
        yield CheckResult(
            check="skew",
            subject=view.id,
            verdict=Verdict.INCONCLUSIVE if late else Verdict.PASS,
            reason=f"arrival skew is {share:.1%} of the time, {'limit' if late else 'within'} {limit:.0%}{latest}",
            action=Action.MONITOR if late else None,
            evidence=[row(r, skew_p50_us=r.skew_us.p50 if r.skew_us else None, share=s) for s, r in shares],
        )


def _latest(subject: CheckContext, record: Record) -> str:
    """The last rank to arrive: in a synchronizing collective it has the shortest durations."""
    try:
        medians_R = np.median(subject.samples(record), axis=1)
    except UsageError:
        return "its samples cannot be read"
    return f"{shown_ranks([int(medians_R.argmin())])} has the shortest durations, so it comes last"
