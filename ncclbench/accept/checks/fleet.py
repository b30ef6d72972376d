"""Compare equal units: nodes, rails or NICs of the same run that did the same work at the same time.

An average hides a slow unit: one rail at half speed among 8 adds an eighth to the time. So every group is a unit; where
flows were timed, every endpoint and direction is one. A unit is an outlier if two conditions hold:

- its robust z lies beyond the Bonferroni bound for this number of units;
- it is slower than the median by more than the margin.

Both are needed: with little noise every difference is significant, and with few units z is often large. An outlier
fails if it is slow by the margin in every process start. Otherwise it is inconclusive, since noise moves between
starts. The MAD has a floor: the resolution of the clock, and the uncertainty of each unit's median. This check cannot
see a fleet that is slow as a whole; the floor check can.
"""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ncclbench.accept.case_facts import CaseView
from ncclbench.accept.check_context import CheckContext
from ncclbench.accept.profile import Limits
from ncclbench.store.records import Json, Record, Summary
from ncclbench.store.verdict import Action, CheckResult, Verdict
from ncclbench.topology import Topology
from ncclbench.topology.rank_names import group_name, rank_name

# With fewer units the outlier cannot be identified.
FEWEST_UNITS = 4
# With fewer peers, either end may cause a slow flow.
FEWEST_PEERS = 3
# Resolution of CUDA events; time.perf_counter is finer.
_CLOCK_US = 0.5
_ACTIONS = {
    "rail": Action.CHECK_SWITCH,
    "node": Action.ISOLATE,
    "domain": Action.ISOLATE,
    "endpoint": Action.CHECK_CABLE,
}
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Unit:
    """One of several equal units in one start, with its time and half the width of the time's interval, in us."""

    kind: str
    name: str
    time_us: float
    uncertainty_us: float
    evidence: Mapping[str, Json]


def check(subject: CheckContext) -> Iterator[CheckResult]:
    """One result per outlier, or one per case without outliers; cases with too few equal units are skipped."""
    compared = False
    for view in subject.cases:
        starts = [units for record in view.timed if (units := _units(subject, record))]
        if starts and len(starts[0]) >= FEWEST_UNITS and _same_units(starts):
            compared = True
            yield from _judge(view, starts, subject.rules.profile.limits)
    if not compared:
        reason = f"no case ran on {FEWEST_UNITS} or more equal groups side by side"
        yield CheckResult(check="fleet", subject="run", verdict=Verdict.NOT_RUN, reason=reason)


def outliers(log_times_SU: Floats, scale_floor: float, alpha: float) -> tuple[Floats, Floats, float]:
    """The distance of each unit from the median, its robust z (both of shape (U,)), and the bound on z.

    Args:
        log_times_SU: logarithms of each unit's time in each start.
        scale_floor: lower limit of the scale.
        alpha: probability of any false alarm among all U units.
    """
    center_U = np.median(log_times_SU, axis=0)
    effect_U = center_U - np.median(center_U)
    scale = max(1.4826 * float(np.median(np.abs(effect_U))), scale_floor)
    bound = statistics.NormalDist().inv_cdf(1 - alpha / len(center_U))
    return effect_U, effect_U / scale, bound


def _judge(view: CaseView, starts: list[list[Unit]], limits: Limits) -> Iterator[CheckResult]:
    times_SU = np.array([[unit.time_us for unit in units] for units in starts])
    if not (np.isfinite(times_SU).all() and (times_SU > 0).all()):
        reason = "a group's time is no possible figure"
        yield CheckResult(check="fleet", subject=view.id, verdict=Verdict.INCONCLUSIVE, reason=reason)
        return
    known = [unit.uncertainty_us / unit.time_us / 1.96 for units in starts for unit in units]
    floor = max(_CLOCK_US / float(np.median(times_SU)), statistics.median(known), 1e-6)
    effect_U, z_U, bound = outliers(np.log(times_SU), floor, limits.fleet_alpha)
    slow = np.flatnonzero((z_U > bound) & (np.expm1(effect_U) > limits.fleet_margin))
    apart_SU = np.expm1(np.log(times_SU) - np.log(np.median(times_SU, axis=1, keepdims=True)))
    for index in slow:
        times = int((apart_SU[:, index] > limits.fleet_margin).sum())
        yield _outlier(view, starts, int(index), times, float(effect_U[index]), float(z_U[index]), bound)
    if not len(slow):
        kind = starts[0][0].kind
        reason = f"{len(z_U)} equal {kind}s, the slowest {np.expm1(effect_U.max()):.1%} behind the median"
        yield CheckResult(check="fleet", subject=view.id, verdict=Verdict.PASS, reason=reason)


def _outlier(
    view: CaseView, starts: list[list[Unit]], index: int, times: int, effect: float, z: float, bound: float
) -> CheckResult:
    """The result for an outlier that was slow in `times` of the starts."""
    unit = starts[0][index]
    evidence = [
        {"case": view.id, "unit": units[index].name, "time_us": units[index].time_us, **units[index].evidence}
        for units in starts
    ]
    others = [statistics.median(unit.time_us for unit in units) for units in starts]
    evidence.append({"median_of_all_us": others, "units": len(starts[0]), "z": z, "bound": bound})
    few = ", but in a single process start" if len(starts) == 1 else f", but in {times} of {len(starts)} starts only"
    sure = times == len(starts) > 1
    return CheckResult(
        check="fleet",
        subject=f"{view.id}: {unit.name}",
        verdict=Verdict.FAIL if sure else Verdict.INCONCLUSIVE,
        reason=f"{unit.name} takes {np.exp(effect):.2f} times the median of {len(starts[0])} equal {unit.kind}s "
        f"(z {z:.1f}, bound {bound:.1f})" + ("" if sure else few),
        action=_ACTIONS.get(unit.kind, Action.MONITOR),
        evidence=evidence,
    )


def _same_units(starts: list[list[Unit]]) -> bool:
    """Whether every start compared the same units."""
    names = [[unit.name for unit in units] for units in starts]
    return all(a == b for a, b in pairwise(names))


def _units(subject: CheckContext, record: Record) -> list[Unit]:
    """The equal units of a record: its groups, or the endpoints of its flows."""
    if len({len(group.ranks) for group in record.groups}) == 1 and len(record.groups) > 1:
        named = [(group_name(subject.run.topology, group.ranks), group) for group in record.groups]
        return [
            Unit(kind, name, g.time_us.p50, _uncertainty(g.time_us), {**_source(record), "ranks": g.ranks})
            for (kind, name), g in named
        ]
    return _endpoints(subject.run.topology, record)


def _source(record: Record) -> dict[str, Json]:
    return {"start": record.start, "samples": record.samples}


def _uncertainty(summary: Summary) -> float:
    if summary.p50_lo is None or summary.p50_hi is None:
        return summary.p50
    return (summary.p50_hi - summary.p50_lo) / 2


def _endpoints(topology: Topology | None, record: Record) -> list[Unit]:
    """The sending and the receiving side of each rank: median over distinct peers of the time per 1e6 bytes, in us."""
    times: dict[tuple[str, int], dict[int, list[float]]] = {}
    for phase in record.phases:
        flows = phase.flows
        if flows is None or not flows.p50_us:
            continue
        for src, dst, nbytes, p50_us in zip(flows.src, flows.dst, flows.nbytes, flows.p50_us, strict=True):
            if src != dst and nbytes and p50_us:
                for side, rank, peer in (("send", src, dst), ("receive", dst, src)):
                    times.setdefault((side, rank), {}).setdefault(peer, []).append(p50_us / nbytes * 1e6)
    numbers = {len(peers) for peers in times.values()}
    if len(numbers) != 1 or min(numbers) < FEWEST_PEERS:
        return []
    units = []
    for (side, rank), peers in sorted(times.items()):
        medians = [statistics.median(values) for values in peers.values()]
        name = f"{side} side of {rank_name(topology, rank)}"
        flows_us = {str(peer): statistics.median(values) for peer, values in sorted(peers.items())}
        evidence = {**_source(record), "rank": rank, "direction": side, "us_a_megabyte_by_peer": flows_us}
        units.append(Unit("endpoint", name, statistics.median(medians), 0.0, evidence))
    return units
