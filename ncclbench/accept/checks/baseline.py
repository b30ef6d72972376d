"""Each case against the same case of an earlier run on the same fabric.

Unlike runs are refused: other figures would be compared, not other hardware. With ``--force`` they are compared, and
every document says so.
"""

import statistics
from collections.abc import Iterator

from ncclbench.accept.case_facts import CaseView, unlike, views_of
from ncclbench.accept.check_context import Subject, row
from ncclbench.accept.profile import Limits
from ncclbench.store.verdict import Action, CheckResult, Verdict
from ncclbench.units import counted


def check(subject: Subject) -> Iterator[CheckResult]:
    """One result a case, or one that says why there are none."""
    base, limits = subject.baseline, subject.rules.profile.limits
    if base is None:
        yield _result("run", Verdict.NOT_RUN, "no baseline was given")
        return
    differences = unlike(base, subject.run, limits.may_differ)
    if differences and not subject.forced:
        reason = f"not compared with {base.path.name}: " + "; ".join(differences[:8])
        yield _result("run", Verdict.INCONCLUSIVE, reason, evidence=[{"differences": differences}])
        return
    if differences:
        yield _result("run", Verdict.NOT_RUN, "forced although unlike: " + "; ".join(differences[:8]))
    known = {view.id: view for view in views_of(base) if view.timed}
    for view in subject.cases:
        if not view.timed:
            continue
        if view.id not in known:
            yield _result(view.id, Verdict.INCONCLUSIVE, f"{base.path.name} has no such case")
        else:
            yield _compare(view, known.pop(view.id), limits)
    for name in known:
        yield _result(name, Verdict.NOT_RUN, f"{base.path.name} has this case, the run has not", required=True)


def _result(subject: str, verdict: Verdict, reason: str, **more: object) -> CheckResult:
    return CheckResult(check="baseline", subject=subject, verdict=verdict, reason=reason, **more)  # type: ignore[arg-type]


def _compare(view: CaseView, base: CaseView, limits: Limits) -> CheckResult:
    now, then = _span(view), _span(base)
    evidence = [row(r, run="baseline") for r in base.timed] + [row(r, run="this") for r in view.timed]
    if now is None or then is None:
        return _result(view.id, Verdict.INCONCLUSIVE, "too few samples to compare", evidence=evidence)
    slower = now[1] / then[1] - 1
    said = f"median {now[1]:.4g} us against {then[1]:.4g} us: {abs(slower):.1%} {'slower' if slower > 0 else 'faster'}"
    if slower <= limits.baseline_margin:
        return _result(view.id, Verdict.PASS, said, evidence=evidence, conclusive=True)
    starts = min(len(view.timed), len(base.timed))
    if starts < limits.min_starts:
        reason = f"{said}, but only {counted(starts, 'process start')} compared, needs {limits.min_starts}"
    elif now[0] <= then[2]:
        reason = f"{said}, but the spans of the starts overlap"
    else:
        reason = f"{said}, limit {limits.baseline_margin:.1%}"
        return _result(view.id, Verdict.FAIL, reason, evidence=evidence, action=Action.MONITOR)
    return _result(view.id, Verdict.INCONCLUSIVE, reason, evidence=evidence, action=Action.MONITOR)


def _span(view: CaseView) -> tuple[float, float, float] | None:
    """The smallest lower end, the median of medians, and the largest upper end over the starts, in us."""
    summaries = [record.time_us for record in view.timed if record.time_us is not None]
    lows = [s.p50_lo for s in summaries if s.p50_lo is not None]
    highs = [s.p50_hi for s in summaries if s.p50_hi is not None]
    medians = [s.p50 for s in summaries]
    if len(lows) < len(summaries) or len(highs) < len(summaries) or not medians or min(medians) <= 0:
        return None
    return min(lows), statistics.median(medians), max(highs)
