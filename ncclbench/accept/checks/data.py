"""Wrong data: one differing element in any case fails the run, at any speed."""

from collections.abc import Iterator

from ncclbench.accept.case_facts import shown_ranks
from ncclbench.accept.check_context import CheckContext, row
from ncclbench.store.verdict import Action, CheckResult, Verdict
from ncclbench.units import counted


def check(subject: CheckContext) -> Iterator[CheckResult]:
    """One result per measured case."""
    for view in subject.cases:
        measured = [record for record in view.records if record.status in ("ok", "wrong")]
        if not measured:
            continue
        bad = [record for record in measured if record.status == "wrong" or record.wrong]
        unchecked = [record for record in measured if record.wrong is None]
        if bad:
            ranks = sorted({rank for record in bad for rank in record.wrong_ranks})
            starts = ", ".join(str(record.start) for record in bad)
            yield CheckResult(
                check="data",
                subject=view.id,
                verdict=Verdict.FAIL,
                reason=f"{sum(r.wrong or 0 for r in bad)} wrong elements on {shown_ranks(ranks)}, in start {starts}",
                action=Action.ISOLATE,
                evidence=[row(r, wrong=r.wrong, wrong_ranks=r.wrong_ranks, reason=r.reason) for r in bad],
                cause="wrong_data",
            )
        elif unchecked:
            yield CheckResult(
                check="data",
                subject=view.id,
                verdict=Verdict.INCONCLUSIVE,
                reason="the data were not validated (--no-check)",
                evidence=[row(record) for record in unchecked],
            )
        else:
            reason = f"all elements right in {counted(len(measured), 'start')}"
            yield CheckResult(check="data", subject=view.id, verdict=Verdict.PASS, reason=reason)
