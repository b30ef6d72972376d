"""Compare each case with the figures of the profile.

A figure is judged by its interval in every process start. It passes if the whole interval lies above the floor in all
starts. It fails if the whole interval lies below the floor in most starts. Otherwise it is inconclusive. A case that
misses an assumed figure is inconclusive and does not fail.
"""

import math
from collections.abc import Iterator

from ncclbench.accept.case_facts import CaseView, scopes
from ncclbench.accept.check_context import CheckContext, Estimate, row
from ncclbench.accept.profile import SCOPE_FACTS, FloorRule
from ncclbench.store.records import Json, Record
from ncclbench.store.verdict import Action, CheckResult, Verdict
from ncclbench.units import counted, format_size


def check(subject: CheckContext) -> Iterator[CheckResult]:
    """One result per case and entry of the profile, and one per entry that no case measured."""
    if subject.fabric_mismatch:
        yield CheckResult(check="floor", subject="run", verdict=Verdict.NOT_RUN, reason=subject.skipped_by_mismatch())
        return
    met: set[int] = set()
    for view in subject.cases:
        if not view.timed:
            continue
        chosen = subject.floors_for(view)
        met.update(chosen)
        yield from (_judge(subject, view, subject.rules.floors[k]) for k in chosen)
        if not chosen:
            yield _no_entry(subject, view)
    for k, rule in enumerate(subject.rules.floors):
        if k not in met and _could_be_measured(subject, rule):
            yield CheckResult(
                check="floor",
                subject=describe(rule),
                verdict=Verdict.NOT_RUN,
                reason="no case of this run measured it",
                required=rule.floor.required,
                evidence=[_source(rule)],
            )


def describe(rule: FloorRule) -> str:
    """The conditions of an entry, as text for a message."""
    parts = []
    for name, test in rule.tests.items():
        sizes = name == "bytes" and test.one_of is not None
        text = " or ".join(format_size(float(size)) for size in test.one_of or ()) if sizes else test.text
        parts.append(text if name == "pattern" else f"{name} {text}")
    return ", ".join(parts)


def _could_be_measured(subject: CheckContext, rule: FloorRule) -> bool:
    """Whether this run has groups of the entry's sizes, and NVLink SHARP in the entry's state."""
    if "nvls" in rule.tests and not any(rule.tests["nvls"].holds(state) for state in subject.nvls):
        return False
    tests = {name: test for name, test in rule.tests.items() if name in SCOPE_FACTS}
    return any(all(test.holds(scope[name]) for name, test in tests.items()) for scope in scopes(subject.run))


def _judge(subject: CheckContext, view: CaseView, rule: FloorRule) -> CheckResult:
    estimates = [(record, subject.estimate(record, rule)) for record in view.timed]
    evidence = [_source(rule), *(_evidence(record, estimate) for record, estimate in estimates)]
    verdict, reason = _compare(subject, rule, [(r, e) for r, e in estimates])
    assumed = rule.floor.basis == "assumed"
    if assumed and verdict is Verdict.FAIL:
        verdict, reason = Verdict.INCONCLUSIVE, f"{reason}; that figure is assumed, so it proves nothing"
    elif assumed:
        reason += " (assumed)"
    return CheckResult(
        check="floor",
        subject=view.id,
        verdict=verdict,
        reason=reason,
        action=None if verdict is Verdict.PASS else rule.floor.action if verdict is Verdict.FAIL else Action.MONITOR,
        evidence=evidence,
        conclusive=verdict is Verdict.PASS and not assumed,
    )


def _compare(
    subject: CheckContext, rule: FloorRule, estimates: list[tuple[Record, Estimate | None]]
) -> tuple[Verdict, str]:
    limits, floor = subject.rules.profile.limits, rule.floor
    known = [estimate for _, estimate in estimates if estimate is not None]
    if len(known) < len(estimates):
        return Verdict.INCONCLUSIVE, _unknown(subject, rule, estimates)
    if any(not (math.isfinite(e.value) and e.value > 0) for e in known):
        return Verdict.INCONCLUSIVE, f"{floor.metric} is no possible figure: {[e.value for e in known]}"
    shown = _figures_text(rule, known)
    least = limits.p99_samples if floor.metric.endswith("p99") else limits.min_samples
    fewest = min(record.time_us.n if record.time_us else 0 for record, _ in estimates)
    if fewest < least or any(e.low is None or e.high is None for e in known):
        return Verdict.INCONCLUSIVE, f"{shown}: too few samples to judge: {fewest}, needs {least}"
    if len(known) < limits.min_starts:
        return (
            Verdict.INCONCLUSIVE,
            f"{shown}: measured in {counted(len(known), 'process start')}, needs {limits.min_starts}",
        )
    return _compare_with_limit(rule, known, shown)


def _compare_with_limit(rule: FloorRule, known: list[Estimate], shown: str) -> tuple[Verdict, str]:
    over, under = _clear_starts(rule, rule.limit, known)
    if over == len(known):
        good = rule.floor.good
        if good is not None and _clear_starts(rule, good, known)[0] < len(known):
            return Verdict.INCONCLUSIVE, f"{shown}, which is not bad, but good is {good:g}"
        return Verdict.PASS, shown
    if 2 * under > len(known):
        return Verdict.FAIL, shown
    return Verdict.INCONCLUSIVE, f"{shown}: {over} of {len(known)} starts are clearly good, {under} clearly bad"


def _clear_starts(rule: FloorRule, limit: float, known: list[Estimate]) -> tuple[int, int]:
    """The number of starts whose whole interval is on the good side of the limit, and on the bad side."""
    ends = [(e.low if e.low is not None else e.value, e.high if e.high is not None else e.value) for e in known]
    if rule.is_rate:
        return sum(low >= limit for low, _ in ends), sum(high < limit for _, high in ends)
    return sum(high <= limit for _, high in ends), sum(low > limit for low, _ in ends)


def _figures_text(rule: FloorRule, known: list[Estimate]) -> str:
    values = sorted(e.value for e in known)
    middle = values[len(values) // 2]
    spread = f" ({values[0]:.4g} to {values[-1]:.4g} over {len(values)} starts)" if len(values) > 1 else ""
    unit = "GB/s" if rule.is_rate else "us"
    sign = ">=" if rule.is_rate else "<="
    parts = sorted({e.part for e in known if e.part})
    where = f" of the slowest group ({', '.join(parts)})" if parts else ""
    phase = f" of {rule.floor.phase}" if rule.floor.phase else ""
    return f"{rule.floor.metric}{phase}{where} {middle:.4g} {unit}{spread}, wanted {sign} {rule.limit:.4g}"


def _unknown(subject: CheckContext, rule: FloorRule, estimates: list[tuple[Record, Estimate | None]]) -> str:
    needs = {"time_us.p95": 20, "time_us.p99": subject.rules.profile.limits.p99_samples}.get(rule.floor.metric)
    fewest = min(record.time_us.n if record.time_us else 0 for record, _ in estimates)
    if needs is not None and fewest < needs:
        return f"too few samples to judge {rule.floor.metric}: {fewest}, needs {needs}"
    return f"the records have no {rule.floor.metric}" + (f" of phase {rule.floor.phase}" if rule.floor.phase else "")


def _source(rule: FloorRule) -> dict[str, Json]:
    floor = rule.floor
    return {
        "entry": describe(rule),
        "metric": floor.metric,
        "figure": rule.figure,
        "because": rule.why,
        "tolerance": floor.tolerance,
        "limit": rule.limit,
        "basis": floor.basis,
        "source": floor.source,
        "date": floor.date,
    }


def _evidence(record: Record, estimate: Estimate | None) -> dict[str, Json]:
    if estimate is None:
        return row(record, figure=None)
    return row(record, figure=estimate.value, low=estimate.low, high=estimate.high, part=estimate.part)


def _no_entry(subject: CheckContext, view: CaseView) -> CheckResult:
    exemption = subject.exemption(view)
    if exemption:
        return CheckResult(check="floor", subject=view.id, verdict=Verdict.NOT_RUN, reason=exemption)
    facts = view.facts
    what = f"{facts.pattern} of {format_size(facts.bytes)} on {counted(facts.ranks, 'rank')}, "
    what += counted(facts.nodes, "node")
    near = _nearest(subject, view)
    hint = f"the nearest is: {describe(near)}" if near else "it has no entry at all"
    return CheckResult(
        check="floor",
        subject=view.id,
        verdict=Verdict.INCONCLUSIVE,
        reason=f"profile {subject.rules.profile.name} has no entry for {what}; {hint}",
        action=Action.MONITOR,
        evidence=[row(record) for record in view.timed],
    )


def _nearest(subject: CheckContext, view: CaseView) -> FloorRule | None:
    """The entry closest to a case: same pattern, then fewest differing words, then numbers, then distance."""

    def distance(rule: FloorRule) -> tuple[int, int, int, float]:
        missed = [name for name, test in rule.tests.items() if not test.holds(view.facts.value(name))]
        words = sum(isinstance(view.facts.value(name), str) for name in missed)
        apart = sum(_doublings(rule, name, view.facts.value(name)) for name in missed)
        return int("pattern" in missed), words, len(missed), apart

    return min(subject.rules.floors, key=distance, default=None)


def _doublings(rule: FloorRule, name: str, value: str | int | None) -> float:
    """The number of doublings between a number and the value that the test wants; 0 if either is no number."""
    test = rule.tests[name]
    wanted = [end for end in (test.low, test.high) if math.isfinite(end) and end > 0]
    wanted += [float(choice) for choice in test.one_of or () if isinstance(choice, int | float) and choice > 0]
    if not wanted or not isinstance(value, int) or value <= 0:
        return 0.0
    return min(abs(math.log2(value / end)) for end in wanted)
