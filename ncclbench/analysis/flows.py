"""What the flows of a record say about rails, endpoints, fairness and the spreading over uplinks.

A flow's rate is b = bytes / median of the longer of its two ends' durations. A healthy flow has the least of what its
sender's NIC, its receiver's NIC and the path give, so an endpoint is judged by the median over *distinct peers*: one
bad peer does not move it, a bad endpoint cannot hide from it. Rates are summarised as medians of logarithms, never
averaged. Everything here reads a `Record` and the run's topology, and starts nothing.
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
        gb_per_s: rate, shape (F,); 1e9 bytes a second.
        rounds: label of the round of each flow.
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
    """All flows of a record, of the rounds whose label begins with `prefix`; empty if it has none."""
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
    """Median rate from each rail (row) to each rail (column), GB/s; NaN where no flow went that way.

    A slow row is a rail's sending side, a slow column its receiving side, a slow cell a pair of leaves; everything off
    the diagonal slow is oversubscription.
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
    """Each rank as a sender and as a receiver, shape (R,); NaN and 0 where it had no flow.

    Attributes:
        send: median over the peers it sent to, GB/s.
        receive: median over the peers it received from, GB/s.
        send_peers: how many distinct ones.
        receive_peers: how many distinct ones.
    """

    send: Floats
    receive: Floats
    send_peers: Ints
    receive_peers: Ints


def endpoint_medians(table: FlowTable, world_size: int) -> Endpoints:
    """Medians of each endpoint over distinct peers: several rounds with one peer count as one."""
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
    """The median of logarithms, back as a rate; of two it is the geometric mean."""
    return float(np.exp(np.median(np.log(np.asarray(rates, np.float64)))))


def jain(rates: ArrayLike) -> float:
    """Jain's index of fairness: 1 when all have the same, 1/n when one has everything.

    Source: Jain, Chiu and Hawe, DEC-TR-301, 1984: (sum x)^2 / (n sum x^2).

    Raises:
        ValueError: without rates, or if all are zero.
    """
    x = np.asarray(rates, np.float64)
    if not len(x) or not np.any(x):
        raise ValueError("fairness needs at least one rate above zero")
    return float(x.sum() ** 2 / (len(x) * np.sum(x**2)))


def incast_fairness(record: Record) -> dict[str, float]:
    """Jain's index of the senders of each ``senders=K`` round, from each sender's own duration."""
    found = {}
    for phase in record.phases:
        if phase.flows and phase.label.startswith("senders="):
            k = int(phase.label.partition("=")[2])
            nbytes, send_us = phase.flows.nbytes[:k], np.array(phase.flows.send_p50_us[:k], np.float64)
            found[phase.label] = jain(np.divide(nbytes, send_us))
    return found


def largest_load(links: int, flows_per_link: float, seed: int = 0) -> float:
    """Mean load of the fullest link, over the mean of all, when flows are hashed onto links at random.

    Args:
        links: uplinks to choose from.
        flows_per_link: flows divided by links.
        seed: of the draws.
    """
    flows = max(1, round(links * flows_per_link))
    if links < 1:
        raise ValueError(f"there must be a link to choose, got {links}")
    draws = np.random.default_rng(seed).integers(0, links, (_DRAWS, flows), dtype=np.int64)
    counts = np.bincount((draws + np.arange(_DRAWS)[:, None] * links).ravel(), minlength=_DRAWS * links)
    return float(counts.reshape(_DRAWS, links).max(axis=1).mean() * links / flows)


@dataclass(frozen=True, kw_only=True)
class Spreading:
    """How evenly a permutation's flows were spread.

    Attributes:
        slowest_share: median over rounds of the slowest flow's rate over what the fastest flow of any round has.
        load: one over that: the load of the fullest link.
        null_load: what hashing at random gives.
        score: 1 for perfect spreading, 0 for hashing at random; below 0 is worse than chance.
    """

    slowest_share: float
    load: float
    null_load: float
    score: float


def spreading(table: FlowTable, links: int, flows_per_link: float) -> Spreading:
    """The score of a permutation against the null model of ECMP.

    Raises:
        ValueError: without flows, or if there is one link, over which nothing can be spread.
    """
    if links < 2 or not len(table.src):
        raise ValueError("spreading needs flows, and at least 2 links to spread them over")
    labels = np.array(table.rounds)
    slowest = [table.gb_per_s[labels == label].min() for label in dict.fromkeys(table.rounds)]
    share = float(np.median(slowest) / np.quantile(table.gb_per_s, 0.95))
    load, null = max(1.0, 1 / share), largest_load(links, flows_per_link)
    return Spreading(slowest_share=share, load=load, null_load=null, score=(null - load) / (null - 1))


def interference(record: Record) -> dict[str, float]:
    """Time beside others over time alone: of each rail of `rail_groups`, and of the victim of each `incast` round.

    1 is none; 2 means that the presence of others doubles the time.
    """
    phases = {phase.label: phase for phase in record.phases}
    return {**_rails_interfere(phases), **_victim_suffers(phases)}


def _rails_interfere(phases: Mapping[str, PhaseResult]) -> dict[str, float]:
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


def _victim_suffers(phases: Mapping[str, PhaseResult]) -> dict[str, float]:
    found = {}
    for label, phase in phases.items():
        kind, _, k = label.partition("=")
        crowd = phases.get(f"senders={k}")
        if kind == "victim" and phase.flows and crowd and crowd.flows:
            beside_us, alone_us = crowd.flows.p50_us[-1:], phase.flows.p50_us[:1]
            if beside_us and beside_us[0] is not None and alone_us and alone_us[0]:
                found[label] = beside_us[0] / alone_us[0]
    return found


def heat(record: Record) -> dict[str, dict[str, float]]:
    """Of each ``factor=F`` of `rail_hot`: how uneven its bytes are, and how much longer it takes than the even one.

    ``bytes`` is what the busiest rank sends or receives over the mean; ``time`` that the slowest rank's median is
    over that of ``factor=1``. All that time grows above bytes is lost to waiting.
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


def contrast(record: Record) -> float | None:
    """Median rate of the ``far`` rounds over that of the ``near`` ones; None where either is missing."""
    near, far = flows_of(record, "near"), flows_of(record, "far")
    if not len(near.src) or not len(far.src):
        return None
    return _typical(far.gb_per_s) / _typical(near.gb_per_s)


def contrast_by_leaf(record: Record, leaves_R: ArrayLike) -> dict[int, float]:
    """`contrast` of what each leaf sends: the one that lost one of its U uplinks reads (U - 1) / U of the others."""
    leaves = np.asarray(leaves_R, np.int64)
    near, far = flows_of(record, "near"), flows_of(record, "far")
    found = {}
    for leaf in np.unique(leaves[leaves >= 0]).tolist():
        inside, outside = near.gb_per_s[leaves[near.src] == leaf], far.gb_per_s[leaves[far.src] == leaf]
        if len(inside) and len(outside):
            found[leaf] = _typical(outside) / _typical(inside)
    return found


def describe_flows(record: Record, topology: Topology) -> dict[str, Json]:
    """Everything above that this record has, as plain data for reports.

    Keys: ``rail_matrix_gb_per_s`` (null where nothing went), ``send_gb_per_s`` and ``receive_gb_per_s`` of each rank,
    and where the pattern has them ``jain``, ``interference``, ``heat``, ``far_over_near``, ``far_over_near_by_leaf``
    and, where the topology file says how many uplinks a leaf has, ``spreading`` of a permutation.
    """
    found: dict[str, Json] = {}
    table = flows_of(record)
    if len(table.src) and record.world_size is not None:
        ends = endpoint_medians(table, record.world_size)
        found["rail_matrix_gb_per_s"] = [_nullable(row) for row in rail_matrix(table, topology.rails)]
        found["send_gb_per_s"], found["receive_gb_per_s"] = _nullable(ends.send), _nullable(ends.receive)
    wiring = topology.wiring
    by_leaf = contrast_by_leaf(record, wiring.leaves) if wiring else {}
    further: dict[str, Json] = {
        "jain": incast_fairness(record),
        "interference": interference(record),
        "heat": heat(record),
        "far_over_near": contrast(record),
        "far_over_near_by_leaf": {wiring.leaf_names[leaf]: ratio for leaf, ratio in by_leaf.items()} if wiring else {},
    }
    if record.pattern == "permutation" and len(table.src) and wiring:
        further["spreading"] = _spreading_on(table, wiring)
    return {**found, **{name: value for name, value in further.items() if value}}


def _spreading_on(table: FlowTable, wiring: Wiring) -> dict[str, float] | None:
    """`spreading` over the uplinks of a leaf; None where there are not at least 2, or leaves differ."""
    uplinks = set(wiring.uplinks.tolist())
    if len(uplinks) != 1 or min(uplinks) < 2 or (wiring.leaves == UNKNOWN).any():
        return None
    links = uplinks.pop()
    nics = len(wiring.leaves) / len(np.unique(wiring.leaves))
    return vars(spreading(table, links, nics / links))


def _nullable(values: Floats) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]
