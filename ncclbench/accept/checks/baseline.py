"""Compare each case with the same case of an earlier run on the same fabric.

Runs that are not comparable are refused. With ``--force`` they are compared, and every document says so.
"""

import statistics
from collections.abc import Iterable, Iterator

from ncclbench.accept.case_facts import CaseView, matches_any, views_of
from ncclbench.accept.check_context import CheckContext, row
from ncclbench.accept.profile import Limits
from ncclbench.store.records import Json
from ncclbench.store.run_directory import Run
from ncclbench.store.verdict import Action, CheckResult, Verdict
from ncclbench.units import counted

Settings = list[dict[str, Json]]


def check(subject: CheckContext) -> Iterator[CheckResult]:
    """One result per case, or one result with the reason why no case was compared."""
    base, limits = subject.baseline, subject.rules.profile.limits
    if base is None:
        yield _result("run", Verdict.NOT_RUN, "no baseline was given")
        return
    differences = incomparable(base, subject.run, limits.may_differ)
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
    """Over the starts: the smallest lower end, the median of the medians and the largest upper end, in us."""
    summaries = [record.time_us for record in view.timed if record.time_us is not None]
    lows = [s.p50_lo for s in summaries if s.p50_lo is not None]
    highs = [s.p50_hi for s in summaries if s.p50_hi is not None]
    medians = [s.p50 for s in summaries]
    if len(lows) < len(summaries) or len(highs) < len(summaries) or not medians or min(medians) <= 0:
        return None
    return min(lows), statistics.median(medians), max(highs)


def incomparable(base: Run, run: Run, may_differ: Iterable[str]) -> list[str]:
    """The differences, in words, that forbid to compare two runs; the value of `run` comes first."""
    a, b = base.manifest, run.manifest
    values = {
        "transport": (a.transport, b.transport),
        "device": (a.device, b.device),
        "world_size": (a.world_size, b.world_size),
    }
    differences = [f"{name}: {other} against {one}" for name, (one, other) in values.items() if one != other]
    topologies = base.topology, run.topology
    for name in ("nodes", "domains", "rails"):
        one, other = (None if topology is None else getattr(topology, name).tolist() for topology in topologies)
        differences += [f"{name} are laid out differently"] if one != other else []
    if a.shares_a_machine != b.shares_a_machine:
        differences.append("in one of them the nodes are parts of one machine")
    if a.gpu_names != b.gpu_names:
        differences.append(f"GPUs: {', '.join(b.gpu_names) or 'none'} against {', '.join(a.gpu_names) or 'none'}")
    names = tuple(may_differ)
    one_V, other_V = ([view.versions or {} for view in side.software_views] for side in (a, b))
    one_S, other_S = ([view.variables or {} for view in side.software_views] for side in (a, b))
    return [*differences, *_software_differences(one_V, other_V, names), *_software_differences(one_S, other_S, names)]


def _software_differences(base: Settings, run: Settings, may_differ: tuple[str, ...]) -> list[str]:
    one, other = _values(base), _values(run)
    return [
        f"{name}: {other.get(name, 'not set')} against {one.get(name, 'not set')}"
        for name in sorted({*one, *other})
        if one.get(name) != other.get(name) and not matches_any(name, may_differ)
    ]


def _values(views: Settings) -> dict[str, str]:
    """The value of each name; all values where ranks differ."""
    found: dict[str, set[str]] = {}
    for view in views:
        for name, value in view.items():
            found.setdefault(name, set()).add(str(value))
    return {name: " and ".join(sorted(values)) for name, values in found.items()}
