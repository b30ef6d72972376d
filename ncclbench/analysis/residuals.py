"""How far each NIC and each rank is from the others of its run, over all cases: where to look for the slow part.

A residual is the logarithm of a figure over the median of all: 0 is usual, log 0.5 is half. Residuals of a case are
medians over distinct peers, and those of a run are medians over cases, so that no peer and no case decides alone.
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
# Of a distribution: every half percent, and the far tail.
LEVELS = np.concatenate([np.linspace(0, 0.99, 199), [0.995, 0.999, 1.0]])


@dataclass(frozen=True)
class CaseFlows:
    """F flows of a case: which rank sent to which, and at what rate in GB/s (NaN where a flow never ended)."""

    case: str
    src_F: Ints
    dst_F: Ints
    gb_per_s_F: Floats


def case_flows(record: Record, world: int) -> CaseFlows | None:
    """All flows between different ranks in the record's phases; None if it has none."""
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
    """A NIC: by how much its flows are faster (+) or slower (-) than all, sending and receiving; NaN if unknown."""

    name: str
    send: float
    receive: float
    peers: int


def nic_residuals(run: Run, nic_R: Ints, names: Sequence[str]) -> list[EndpointResidual]:
    """For every NIC the median over distinct peers of log(rate / median rate), averaged over cases by their median.

    Args:
        run: with flows.
        nic_R: which NIC each rank has.
        names: of the NICs.
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
    """Median over peers of the median over a pair's flows, so that no peer counts twice."""
    known = ~np.isnan(log_F)
    pair_F = own_F[known] * size + other_F[known]
    pairs_P, value_P = _medians(pair_F, log_F[known])
    owners, value = _medians(pairs_P // size, value_P)
    value_N, count_N = np.full(size, np.nan), np.zeros(size, np.int64)
    value_N[owners] = value
    count_N[owners] = np.bincount(pairs_P // size, minlength=size)[owners]
    return value_N, count_N


def _medians(key_F: Ints, value_F: Floats) -> tuple[Ints, Floats]:
    """The distinct keys, and the median of each one's values."""
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
    """The logarithm of a ratio as a deviation in percent: -50 is half."""
    return 100 * math.expm1(log)


@dataclass
class RankResiduals:
    """What the samples say of the R ranks of a run.

    Attributes:
        residual_R: log of the rank's median duration over the median rank's; the median over cases.
        late_us_R: how much later than the first rank it arrived; the median over synchronizing cases, NaN if none is.
        cases: how many cases had samples.
        quantiles: case -> rail -> durations in microseconds at `LEVELS`.
        problems: samples that could not be read.
    """

    residual_R: Floats
    late_us_R: Floats
    cases: int = 0
    quantiles: dict[str, dict[int, Floats]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def rank_residuals(run: Run, rails_R: Ints, drawn: Collection[str] = (), most_rails: int = 16) -> RankResiduals:
    """Read every case's samples once, one case in memory at a time.

    Args:
        run: the run.
        rails_R: rail of each rank.
        drawn: the cases whose distributions are kept.
        most_rails: of how many rails they are.
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
    """The case's samples, if every rank of the run has some."""
    try:
        seconds_RN = seconds_of_ranks(run, record) if record.status == "ok" else None
    except UsageError as error:
        problems.append(str(error))
        return None
    if seconds_RN is None or len(seconds_RN) != world or np.isnan(seconds_RN).all(axis=1).any():
        return None
    return seconds_RN


def _synchronizes(record: Record) -> bool:
    """Whether no rank leaves before the last has come: of flows between pairs, durations tell nothing of arrival."""
    return not any(phase.flows for phase in record.phases)


def lateness(seconds_RN: Floats) -> Floats:
    """How much later than the first each rank arrived, shape (R,): the median over iterations, in seconds.

    In a synchronizing collective all ranks leave together, so the one that came last has the shortest duration.
    """
    return _median(np.nanmax(seconds_RN, axis=0)[None, :] - seconds_RN)


def rank_medians(seconds_RN: Floats) -> Floats:
    """Each rank's median duration, shape (R,), in seconds."""
    return _median(seconds_RN)


def _median(values_RN: Floats) -> Floats:
    """Median over iterations. NumPy's own is many times faster than the one that looks for NaN."""
    if np.isnan(values_RN).any():
        return np.asarray(np.nanmedian(values_RN, axis=1))
    return np.asarray(np.median(values_RN, axis=1))
