"""Residuals of each NIC and each rank over all cases of a run: they point to the slow part.

A residual is the logarithm of a figure over the median of all: 0 is the median, log 0.5 is half of it. The residual of
a case is a median over distinct peers, and that of a run is a median over cases. So no single peer or case decides.
Letters: C cases, F flows, N NICs (or iterations), P pairs, R ranks.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import UsageError
from ncclbench.store.records import Record
from ncclbench.store.run_directory import Run
from ncclbench.store.samples import seconds_of_ranks

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MICRO = 1e6
# Quantiles of a distribution: every half percent, and the far tail.
LEVELS = np.concatenate([np.linspace(0, 0.99, 199), [0.995, 0.999, 1.0]])


@dataclass(frozen=True)
class CaseFlows:
    """F flows of a case: the sending rank, the receiving rank and the rate in GB/s (NaN if a flow has no time)."""

    case: str
    src_F: Ints
    dst_F: Ints
    gb_per_s_F: Floats


def case_flows(record: Record, world: int) -> CaseFlows | None:
    """The flows between different ranks in all phases of a record; None if there are none."""
    parts = []
    for phase in record.phases:
        if not phase.flows:
            continue
        columns: list[Sequence[float | None]] = [
            phase.flows.src,
            phase.flows.dst,
            phase.flows.nbytes,
            phase.flows.p50_us,
        ]
        if len({len(column) for column in columns}) == 1:
            parts.append(np.array(columns, dtype=np.float64))  # None becomes NaN
    if not parts:
        return None
    src_F, dst_F, nbytes_F, us_F = np.concatenate(parts, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate_F = np.where(us_F > 0, nbytes_F / us_F / 1e3, np.nan)  # B/us is MB/s
    there = (src_F != dst_F) & (src_F >= 0) & (src_F < world) & (dst_F >= 0) & (dst_F < world)
    if not there.any():
        return None
    return CaseFlows(record.case, src_F[there].astype(np.int64), dst_F[there].astype(np.int64), rate_F[there])


@dataclass(frozen=True)
class EndpointResidual:
    """The residuals of a NIC, sending and receiving: positive if its flows are faster than usual; NaN if unknown."""

    name: str
    send: float
    receive: float
    peers: int


def nic_residuals(run: Run, nic_R: Ints, names: Sequence[str]) -> list[EndpointResidual]:
    """The residuals of all NICs: medians over distinct peers of log(rate / median rate), then medians over cases.

    Args:
        run: the run.
        nic_R: index of the NIC of each rank.
        names: names of the NICs.
    """
    found: dict[str, list[Floats]] = {"send": [], "receive": []}
    peers_N = np.zeros(len(names), np.int64)
    for record in run.records:
        flows = case_flows(record, len(nic_R)) if record.status == "ok" else None
        if flows is None or np.isnan(flows.gb_per_s_F).all():
            continue
        log_F = np.log(flows.gb_per_s_F / np.nanmedian(flows.gb_per_s_F))
        for side, own_F, other_F in (
            ("send", nic_R[flows.src_F], nic_R[flows.dst_F]),
            ("receive", nic_R[flows.dst_F], nic_R[flows.src_F]),
        ):
            value_N, count_N = _by_endpoint(own_F, other_F, log_F, len(names))
            found[side].append(value_N)
            peers_N = np.maximum(peers_N, count_N)
    if not found["send"]:
        return []
    send_N, receive_N = (_nan_median(np.stack(found[side])) for side in ("send", "receive"))
    return [
        EndpointResidual(names[k], float(send_N[k]), float(receive_N[k]), int(peers_N[k])) for k in range(len(names))
    ]


def _by_endpoint(own_F: Ints, other_F: Ints, log_F: Floats, size: int) -> tuple[Floats, Ints]:
    """Median over peers of the median over each pair's flows, so that no peer counts twice; and the number of peers."""
    known = ~np.isnan(log_F)
    pair_F = own_F[known] * size + other_F[known]
    pairs_P, value_P = _medians(pair_F, log_F[known])
    owners, value = _medians(pairs_P // size, value_P)
    value_N, count_N = np.full(size, np.nan), np.zeros(size, np.int64)
    value_N[owners] = value
    count_N[owners] = np.bincount(pairs_P // size, minlength=size)[owners]
    return value_N, count_N


def _medians(key_F: Ints, value_F: Floats) -> tuple[Ints, Floats]:
    """The distinct keys, and the median of the values of each key."""
    order = np.lexsort((value_F, key_F))
    keys, starts, counts = np.unique(key_F[order], return_index=True, return_counts=True)
    sorted_F = value_F[order]
    return keys, (sorted_F[starts + (counts - 1) // 2] + sorted_F[starts + counts // 2]) / 2


def _nan_median(values_CN: Floats) -> Floats:
    known_N = ~np.isnan(values_CN).all(axis=0)
    result = np.full(values_CN.shape[1], np.nan)
    result[known_N] = np.nanmedian(values_CN[:, known_N], axis=0)
    return result


def percent(log: float) -> float:
    """The logarithm of a ratio as a deviation in percent: log 0.5 becomes -50."""
    return 100 * math.expm1(log)


@dataclass
class RankResiduals:
    """Figures of the R ranks of a run, from its samples.

    Attributes:
        residual_R: log of the rank's median duration over that of the median rank; median over cases.
        late_us_R: delay after the first rank to arrive; median over synchronizing cases, NaN if there are none.
        cases: number of cases with samples.
        quantiles: case -> rail -> durations in microseconds at `LEVELS`.
        problems: messages about samples that could not be read.
    """

    residual_R: Floats
    late_us_R: Floats
    cases: int = 0
    quantiles: dict[str, dict[int, Floats]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def rank_residuals(run: Run, rails_R: Ints, drawn: Collection[str] = (), most_rails: int = 16) -> RankResiduals:
    """Compute the residuals of all ranks; the samples of one case at a time are in memory.

    Args:
        run: the run.
        rails_R: rail of each rank.
        drawn: the cases whose distributions are kept.
        most_rails: number of rails whose distributions are kept.
    """
    world = len(rails_R)
    residual_CR, late_CR = [], []
    found = RankResiduals(np.full(world, np.nan), np.full(world, np.nan))
    for record in run.records:
        seconds_RN = _samples_of(run, record, world, found.problems)
        if seconds_RN is None:
            continue
        median_R = rank_medians(seconds_RN)
        middle = np.median(median_R)
        if middle <= 0:
            continue
        with np.errstate(divide="ignore"):
            residual_CR.append(np.log(median_R / middle))
        if _synchronizes(record):
            late_CR.append(lateness(seconds_RN) * MICRO)
        if record.case in drawn:
            rails = np.unique(rails_R)[:most_rails].tolist()
            found.quantiles[record.case] = {
                rail: np.nanquantile(seconds_RN[rails_R == rail], LEVELS) * MICRO for rail in rails
            }
    if residual_CR:
        found.cases = len(residual_CR)
        found.residual_R = np.median(np.stack(residual_CR), axis=0)
    if late_CR:
        found.late_us_R = np.median(np.stack(late_CR), axis=0)
    return found


def _samples_of(run: Run, record: Record, world: int, problems: list[str]) -> Floats | None:
    """The samples of a case; None if a rank of the run has none."""
    try:
        seconds_RN = seconds_of_ranks(run, record) if record.status == "ok" else None
    except UsageError as error:
        problems.append(str(error))
        return None
    if seconds_RN is None or len(seconds_RN) != world or np.isnan(seconds_RN).all(axis=1).any():
        return None
    return seconds_RN


def _synchronizes(record: Record) -> bool:
    """Whether no rank can leave before the last one arrives; flows between pairs do not synchronize."""
    return not any(phase.flows for phase in record.phases)


def lateness(seconds_RN: Floats) -> Floats:
    """The delay of each rank after the first to arrive, shape (R,): the median over iterations, in seconds.

    In a synchronizing collective all ranks leave together, so the last rank to arrive has the shortest duration.
    """
    return _median(np.nanmax(seconds_RN, axis=0)[None, :] - seconds_RN)


def rank_medians(seconds_RN: Floats) -> Floats:
    """The median duration of each rank, shape (R,), in seconds."""
    return _median(seconds_RN)


def _median(values_RN: Floats) -> Floats:
    """Median over iterations; without NaN, `np.median` is many times faster than `np.nanmedian`."""
    if np.isnan(values_RN).any():
        return np.asarray(np.nanmedian(values_RN, axis=1))
    return np.asarray(np.median(values_RN, axis=1))
