"""Figures from the flows of a record: rails, endpoints, fairness and the spreading over uplinks.

The rate of a flow is b = bytes / median of the longer of its two ends' durations. It is limited by the slowest of the
sender's NIC, the receiver's NIC and the path. So an endpoint is judged by the median over *distinct peers*: one slow
peer does not change it, and a slow endpoint always shows. Rates are summarized as medians of logarithms, never
averaged.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ncclbench.store.records import Json, PhaseResult, Record
from ncclbench.topology import Topology, Wiring
from ncclbench.topology.wiring import UNKNOWN

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Draws of the null model: the mean largest load then moves by less than a hundredth between seeds.
_DRAWS = 4000


@dataclass(frozen=True, eq=False, kw_only=True)
class FlowTable:
    """F flows, one row each.

    Attributes:
        src: sending rank, shape (F,).
        dst: receiving rank, shape (F,).
        gb_per_s: rate in 1e9 bytes per second, shape (F,).
        rounds: label of each flow's round.
    """

    src: Ints
    dst: Ints
    gb_per_s: Floats
    rounds: tuple[str, ...]

    def chosen(self, which: ArrayLike) -> "FlowTable":
        """The rows where the mask `which` is true."""
        mask = np.asarray(which, bool)
        kept = tuple(label for label, keep in zip(self.rounds, mask, strict=True) if keep)
        return FlowTable(src=self.src[mask], dst=self.dst[mask], gb_per_s=self.gb_per_s[mask], rounds=kept)


def flows_of(record: Record, prefix: str = "") -> FlowTable:
    """The flows of all rounds of a record whose label begins with `prefix`; the table may be empty."""
    parts = [(phase.label, phase.flows) for phase in record.phases if phase.flows and phase.label.startswith(prefix)]
    nbytes = np.array([size for _, flows in parts for size in flows.nbytes], np.float64)
    p50_us = np.array([time for _, flows in parts for time in flows.p50_us], np.float64)  # None is NaN
    return FlowTable(
        src=np.array([rank for _, flows in parts for rank in flows.src], np.int64),
        dst=np.array([rank for _, flows in parts for rank in flows.dst], np.int64),
        gb_per_s=nbytes / (p50_us * 1e3),  # bytes per microsecond are MB/s
        rounds=tuple(label for label, flows in parts for _ in flows.src),
    )


def rail_matrix(table: FlowTable, rails_R: ArrayLike) -> Floats:
    """Median rate from each rail (row) to each rail (column), GB/s; NaN without a flow between them.

    A slow row points to the sending side of a rail, a slow column to its receiving side, and a slow cell to a pair of
    leaves. If all cells off the diagonal are slow, the fabric is oversubscribed.
    """
    rails = np.asarray(rails_R, np.int64)
    count = int(rails.max()) + 1 if len(rails) else 0
    matrix = np.full((count, count), np.nan)
    cells = rails[table.src] * count + rails[table.dst]
    for cell in np.unique(cells):
        matrix[divmod(int(cell), count)] = _typical(table.gb_per_s[cells == cell])
    return matrix


@dataclass(frozen=True, eq=False, kw_only=True)
class Endpoints:
    """Each rank as a sender and as a receiver, shape (R,); without a flow, rates are NaN and peers are 0.

    Attributes:
        send: median rate over the peers that the rank sent to, GB/s.
        receive: median rate over the peers that the rank received from, GB/s.
        send_peers: number of distinct peers that the rank sent to.
        receive_peers: number of distinct peers that the rank received from.
    """

    send: Floats
    receive: Floats
    send_peers: Ints
    receive_peers: Ints


def endpoint_medians(table: FlowTable, world_size: int) -> Endpoints:
    """The median rate of each endpoint over distinct peers; several rounds with the same peer count as one."""
    send, send_peers = _over_peers(table.src, table.dst, table.gb_per_s, world_size)
    receive, receive_peers = _over_peers(table.dst, table.src, table.gb_per_s, world_size)
    return Endpoints(send=send, receive=receive, send_peers=send_peers, receive_peers=receive_peers)


def _over_peers(own: Ints, peer: Ints, rates: Floats, world_size: int) -> tuple[Floats, Ints]:
    medians, peers = np.full(world_size, np.nan), np.zeros(world_size, np.int64)
    for rank in np.unique(own):
        mine = own == rank
        met = np.unique(peer[mine])
        medians[rank] = _typical([_typical(rates[mine & (peer == other)]) for other in met])
        peers[rank] = len(met)
    return medians, peers


def _typical(rates: ArrayLike) -> float:
    """The median of rates, computed on logarithms; of two rates it is the geometric mean."""
    return float(np.exp(np.median(np.log(np.asarray(rates, np.float64)))))


def jain(rates: ArrayLike) -> float:
    """Jain's index of fairness: 1 if all rates are equal, 1/n if one of n rates is all of the sum.

    Source: Jain, Chiu and Hawe, DEC-TR-301, 1984: (sum x)^2 / (n sum x^2).

    Raises:
        ValueError: if there are no rates, or all are zero.
    """
    x = np.asarray(rates, np.float64)
    if not len(x) or not np.any(x):
        raise ValueError("fairness needs at least one rate above zero")
    return float(x.sum() ** 2 / (len(x) * np.sum(x**2)))


def incast_fairness(record: Record) -> dict[str, float]:
    """Jain's index over the senders of each ``senders=K`` round, from each sender's own duration."""
    found = {}
    for phase in record.phases:
        if phase.flows and phase.label.startswith("senders="):
            k = int(phase.label.partition("=")[2])
            nbytes, send_us = phase.flows.nbytes[:k], np.array(phase.flows.send_p50_us[:k], np.float64)
            found[phase.label] = jain(np.divide(nbytes, send_us))
    return found


def largest_load(links: int, flows_per_link: float, seed: int = 0) -> float:
    """The expected load of the busiest link over the mean load, if flows are hashed onto links at random.

    Args:
        links: number of uplinks.
        flows_per_link: number of flows over number of links.
        seed: seed of the draws.
    """
    flows = max(1, round(links * flows_per_link))
    if links < 1:
        raise ValueError(f"there must be a link to choose, got {links}")
    draws = np.random.default_rng(seed).integers(0, links, (_DRAWS, flows), dtype=np.int64)
    counts = np.bincount((draws + np.arange(_DRAWS)[:, None] * links).ravel(), minlength=_DRAWS * links)
    return float(counts.reshape(_DRAWS, links).max(axis=1).mean() * links / flows)


@dataclass(frozen=True, kw_only=True)
class Spreading:
    """How evenly the flows of a permutation are spread over uplinks.

    Attributes:
        slowest_share: median over rounds of the slowest flow's rate, over the 95th percentile of all flows' rates.
        load: 1 / `slowest_share`, at least 1: the load of the busiest link.
        null_load: the load with random hashing.
        score: 1 for perfect spreading, 0 for random hashing; below 0 is worse than random.
    """

    slowest_share: float
    load: float
    null_load: float
    score: float


def spreading(table: FlowTable, links: int, flows_per_link: float) -> Spreading:
    """The spreading of a permutation, compared with the null model of ECMP.

    Raises:
        ValueError: if there are no flows, or fewer than 2 links.
    """
    if links < 2 or not len(table.src):
        raise ValueError("spreading needs flows, and at least 2 links to spread them over")
    labels = np.array(table.rounds)
    slowest = [table.gb_per_s[labels == label].min() for label in dict.fromkeys(table.rounds)]
    share = float(np.median(slowest) / np.quantile(table.gb_per_s, 0.95))
    load, null = max(1.0, 1 / share), largest_load(links, flows_per_link)
    return Spreading(slowest_share=share, load=load, null_load=null, score=(null - load) / (null - 1))


def interference(record: Record) -> dict[str, float]:
    """Time with other traffic over time alone, for each rail of `rail_groups` and the victim of each `incast` round.

    1 means no interference; 2 means that the other traffic doubles the time.
    """
    phases = {phase.label: phase for phase in record.phases}
    return {**_rail_interference(phases), **_victim_interference(phases)}


def _rail_interference(phases: Mapping[str, PhaseResult]) -> dict[str, float]:
    together = phases.get("all")
    if together is None or not together.groups:
        return {}
    times_us = {tuple(group.ranks): group.p50_us for group in together.groups}
    found = {}
    for label, phase in phases.items():
        for group in (phase.groups or []) if label.startswith("rail=") else []:
            beside_us = times_us.get(tuple(group.ranks))
            if beside_us is not None and group.p50_us:
                found[label] = beside_us / group.p50_us
    return found


def _victim_interference(phases: Mapping[str, PhaseResult]) -> dict[str, float]:
    found = {}
    for label, phase in phases.items():
        kind, _, k = label.partition("=")
        crowd = phases.get(f"senders={k}")
        if kind == "victim" and phase.flows and crowd and crowd.flows:
            beside_us, alone_us = crowd.flows.p50_us[-1:], phase.flows.p50_us[:1]
            if beside_us and beside_us[0] is not None and alone_us and alone_us[0]:
                found[label] = beside_us[0] / alone_us[0]
    return found


def hot_rail_ratios(record: Record) -> dict[str, dict[str, float]]:
    """The unevenness of the bytes and the relative time of each ``factor=F`` of `rail_hot`.

    ``bytes`` is the busiest rank's sent or received bytes over the mean. ``time`` is the slowest rank's median over
    that of ``factor=1``. The amount by which ``time`` exceeds ``bytes`` is lost to waiting.
    """
    phases = {p.label: p for p in record.phases if p.label.startswith("factor=") and p.time_us}
    even = phases.get("factor=1")
    if even is None or even.time_us is None or record.world_size is None:
        return {}
    found = {}
    for label, phase in phases.items():
        wire = sum(n for link, n in phase.ledger.sent_bytes.items() if link != "self")
        if phase.time_us is not None and phase.ledger.bottleneck_bytes is not None and wire:
            found[label] = {
                "bytes": phase.ledger.bottleneck_bytes * record.world_size / wire,
                "time": phase.time_us.p50 / even.time_us.p50,
            }
    return found


def far_over_near(record: Record) -> float | None:
    """Median rate of the ``far`` rounds over that of the ``near`` rounds; None if either is missing."""
    near, far = flows_of(record, "near"), flows_of(record, "far")
    if not len(near.src) or not len(far.src):
        return None
    return _typical(far.gb_per_s) / _typical(near.gb_per_s)


def far_over_near_by_leaf(record: Record, leaves_R: ArrayLike) -> dict[int, float]:
    """`far_over_near` of the flows that each leaf sends; losing 1 of U uplinks leaves (U - 1) / U of the others'."""
    leaves = np.asarray(leaves_R, np.int64)
    near, far = flows_of(record, "near"), flows_of(record, "far")
    found = {}
    for leaf in np.unique(leaves[leaves >= 0]).tolist():
        inside, outside = near.gb_per_s[leaves[near.src] == leaf], far.gb_per_s[leaves[far.src] == leaf]
        if len(inside) and len(outside):
            found[leaf] = _typical(outside) / _typical(inside)
    return found


def describe_flows(record: Record, topology: Topology) -> dict[str, Json]:
    """All figures of this module that the record has, as plain data for reports.

    The keys are ``rail_matrix_gb_per_s`` (null without a flow), and ``send_gb_per_s`` and ``receive_gb_per_s`` per
    rank. Some patterns add ``jain``, ``interference``, ``heat``, ``far_over_near`` and ``far_over_near_by_leaf``.
    A permutation adds ``spreading`` if the topology file has the number of uplinks per leaf.
    """
    found: dict[str, Json] = {}
    table = flows_of(record)
    if len(table.src) and record.world_size is not None:
        ends = endpoint_medians(table, record.world_size)
        found["rail_matrix_gb_per_s"] = [_nullable(row) for row in rail_matrix(table, topology.rails)]
        found["send_gb_per_s"], found["receive_gb_per_s"] = _nullable(ends.send), _nullable(ends.receive)
    wiring = topology.wiring
    by_leaf = far_over_near_by_leaf(record, wiring.leaves) if wiring else {}
    further: dict[str, Json] = {
        "jain": incast_fairness(record),
        "interference": interference(record),
        "heat": hot_rail_ratios(record),
        "far_over_near": far_over_near(record),
        "far_over_near_by_leaf": {wiring.leaf_names[leaf]: ratio for leaf, ratio in by_leaf.items()} if wiring else {},
    }
    if record.pattern == "permutation" and len(table.src) and wiring:
        further["spreading"] = _spreading_on(table, wiring)
    return {**found, **{name: value for name, value in further.items() if value}}


def _spreading_on(table: FlowTable, wiring: Wiring) -> dict[str, float] | None:
    """`spreading` over the uplinks of a leaf; None if a leaf has fewer than 2, or the leaves differ."""
    uplinks = set(wiring.uplinks.tolist())
    if len(uplinks) != 1 or min(uplinks) < 2 or (wiring.leaves == UNKNOWN).any():
        return None
    links = uplinks.pop()
    nics = len(wiring.leaves) / len(np.unique(wiring.leaves))
    return vars(spreading(table, links, nics / links))


def _nullable(values: Floats) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]
