"""The ledger: sent and received bytes balance, and equal the counts of a slow loop over pairs."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncclbench.config.plugins import names
from ncclbench.schedule import DTYPES, AllToAllV, Case, Collective, Exchange, Local, Op, Phase, Schedule, Unable
from ncclbench.schedule.ledger import Ledger, phase_ledger, schedule_ledger
from ncclbench.schedule.pattern import build_schedule, load_pattern
from ncclbench.schedule.phases import SimplePhase, flatten
from ncclbench.topology import Link, Topology

# Patterns with one schedule. Those with variants need nodes and rails, and have tests of their own.
PATTERNS = [name for name in names("patterns") if not load_pattern(name).rotates]
GROUPED = [pattern for pattern in PATTERNS if "group" in load_pattern(pattern).params.__struct_fields__]
TWO_NODES = ("x",) * 4 + ("y",) * 4
FLOAT = 4  # bytes
Flow = tuple[int, int, int]  # from, to, bytes
Totals = Counter[tuple[int, Link]]  # bytes per rank and link class


def check_balance(ledger: Ledger) -> None:
    """Sent and received bytes are equal in every link class, since a flow has one class."""
    assert ledger.sent.min() >= 0
    assert ledger.received.min() >= 0
    assert ledger.sent.sum(axis=0).tolist() == ledger.received.sum(axis=0).tolist()


def slow_flows(phase: SimplePhase, itemsize: int) -> Iterator[Flow]:
    """The flows of a phase, one by one."""
    if isinstance(phase, Exchange):
        yield from zip(phase.src.tolist(), phase.dst.tolist(), phase.nbytes.tolist(), strict=True)
    elif isinstance(phase, AllToAllV):
        for ranks, rows in zip(phase.groups.tolist(), phase.rows.tolist(), strict=True):
            for i, src in enumerate(ranks):
                for j, dst in enumerate(ranks):
                    yield src, dst, rows[i][j] * phase.row_bytes
    elif isinstance(phase, Collective):
        for ranks in phase.groups.tolist():
            yield from slow_collective(phase, ranks, itemsize)


def slow_collective(phase: Collective, ranks: list[int], itemsize: int) -> Iterator[Flow]:
    """Given pairs as they are; chains link by link; rings step by step and chunk by chunk."""
    shard, n, root = phase.count * itemsize, len(ranks), ranks[phase.root]
    from_root = [ranks[(phase.root + k) % n] for k in range(n)]
    pairs = {
        Op.ALL_TO_ALL: list(product(ranks, ranks)),
        Op.GATHER: [(src, root) for src in ranks],
        Op.SCATTER: [(root, dst) for dst in ranks],
        Op.BROADCAST: list(pairwise(from_root)),
        Op.REDUCE: list(pairwise([*from_root[1:], root])),
        Op.ALL_GATHER: (n - 1) * list(pairwise([*ranks, ranks[0]])),
        Op.REDUCE_SCATTER: (n - 1) * list(pairwise([*ranks, ranks[0]])),
        Op.BARRIER: [],
    }
    if phase.op is Op.ALL_REDUCE:
        yield from slow_ring(ranks, phase.count, itemsize)
    else:
        yield from ((src, dst, shard) for src, dst in pairs[phase.op])


def slow_ring(ranks: list[int], count: int, itemsize: int) -> Iterator[Flow]:
    """An all_reduce: n - 1 steps that reduce one chunk per rank, and n - 1 that pass the sums on."""
    n = len(ranks)
    chunks = [len(chunk) * itemsize for chunk in np.array_split(np.arange(count), n)]
    for i, step in product(range(n), range(n - 1)):
        yield ranks[i], ranks[(i + 1) % n], chunks[(i - step) % n]
        yield ranks[i], ranks[(i + 1) % n], chunks[(i + 1 - step) % n]


def slow_link(topology: Topology, a: int, b: int) -> Link:
    if a == b:
        return Link.SELF
    for shared, link in ((topology.nodes, Link.NODE), (topology.domains, Link.DOMAIN)):
        if shared[a] == shared[b]:
            return link
    if topology.sites[a] != topology.sites[b]:
        return Link.CROSS_SITE
    return Link.SAME_RAIL if topology.rails[a] == topology.rails[b] else Link.CROSS_RAIL


def slow_ledger(phases: tuple[Phase, ...], topology: Topology, itemsize: int) -> tuple[Totals, Totals]:
    sent: Totals = Counter()
    received: Totals = Counter()
    for phase in flatten(phases):
        for src, dst, nbytes in slow_flows(phase, itemsize):
            link = slow_link(topology, src, dst)
            sent[src, link] += nbytes
            received[dst, link] += nbytes
    return sent, received


def check_against_loop(ledger: Ledger, phases: tuple[Phase, ...], topology: Topology, itemsize: int) -> None:
    sent, received = slow_ledger(phases, topology, itemsize)
    for rank in range(topology.world_size):
        for link in Link:
            assert ledger.sent[rank, link] == sent[rank, link], (rank, link)
            assert ledger.received[rank, link] == received[rank, link], (rank, link)


def build(pattern: str, topology: Topology, nbytes: int, **params: Any) -> Schedule:
    try:
        return build_schedule(Case(pattern=pattern, nbytes=nbytes, params=params), topology)
    except Unable as unable:
        pytest.skip(str(unable))


def four_nodes() -> Topology:
    """Eight ranks on four nodes: two nodes share an NVLink domain, and one node is at a second site."""
    return Topology(
        nodes=np.array([0, 0, 1, 1, 2, 2, 3, 3]),
        domains=np.array([0, 0, 0, 0, 1, 1, 2, 2]),
        rails=np.array([0, 1, 0, 1, 0, 1, 0, 1]),
        sites=np.array([0, 0, 0, 0, 0, 0, 1, 1]),
        node_names=("a", "b", "c", "d"),
    )


@given(data=st.data())
def test_random_schedules_balance_and_match_a_loop(
    any_schedule: st.SearchStrategy[Schedule], data: st.DataObject
) -> None:
    schedule = data.draw(any_schedule)
    hosts = data.draw(st.lists(st.sampled_from("xyz"), min_size=schedule.world_size, max_size=schedule.world_size))
    topology, itemsize = Topology.from_hosts(hosts), schedule.dtype.itemsize
    for phase in schedule.phases:
        ledger = phase_ledger(phase, topology, itemsize)
        check_balance(ledger)
        check_against_loop(ledger, (phase,), topology, itemsize)
    total = schedule_ledger(schedule, topology)
    check_balance(total)
    check_against_loop(total, schedule.phases, topology, itemsize)


@pytest.mark.parametrize("pattern", PATTERNS)
@given(
    world_size=st.integers(1, 72),
    per_node=st.sampled_from([1, 4, 8]),
    nbytes=st.integers(1 << 9, 1 << 20),
    dtype=st.sampled_from(sorted(DTYPES)),
)
def test_every_pattern_balances_sent_and_received(
    pattern: str, world_size: int, per_node: int, nbytes: int, dtype: str
) -> None:
    topology = Topology.from_hosts([f"n{rank // per_node}" for rank in range(world_size)])
    try:
        schedule = build_schedule(Case(pattern=pattern, nbytes=nbytes, dtype=dtype), topology)
    except Unable:
        return
    for phase in schedule.phases:
        check_balance(phase_ledger(phase, topology, schedule.dtype.itemsize))
    check_balance(schedule_ledger(schedule, topology))


@pytest.mark.parametrize("pattern", GROUPED)
@pytest.mark.parametrize("topology", [Topology.from_hosts(TWO_NODES), four_nodes()], ids=["two nodes", "four nodes"])
@pytest.mark.parametrize("spec", ["world", "rail", "node", "2"])
def test_link_classes_of_patterns_match_a_loop(pattern: str, topology: Topology, spec: str) -> None:
    schedule = build(pattern, topology, 1000, group=spec)
    itemsize = schedule.dtype.itemsize
    check_against_loop(schedule_ledger(schedule, topology), schedule.phases, topology, itemsize)


def test_every_link_class_is_distinguished() -> None:
    topology = four_nodes()
    ranks = np.arange(8)
    found = topology.link_classes(ranks[:, None], ranks)
    assert found.tolist() == [[slow_link(topology, a, b) for b in range(8)] for a in range(8)]
    assert set(found.ravel().tolist()) == set(Link)


@pytest.mark.parametrize(
    ("pattern", "spec", "nonzero"),
    [
        ("all_to_all", "world", {"self": 32, "node": 96, "same_rail": 32, "cross_rail": 96}),
        ("all_to_all", "node", {"self": 64, "node": 192}),
        ("all_to_all", "rail", {"self": 128, "same_rail": 128}),
        ("all_gather", "world", {"node": 168, "cross_rail": 56}),  # 6 links of the ring inside nodes, 2 between
        ("all_reduce", "rail", {"same_rail": 256}),
        ("send_recv", "world", {"node": 192, "cross_rail": 64}),
        ("gather", "world", {"self": 4, "node": 12, "same_rail": 4, "cross_rail": 12}),
    ],
)
def test_bytes_by_link_class_match_hand_counts(pattern: str, spec: str, nonzero: dict[str, int]) -> None:
    topology = Topology.from_hosts(TWO_NODES)
    sent = schedule_ledger(build(pattern, topology, 32, group=spec), topology).as_record()["sent_bytes"]
    assert list(sent) == ["self", "node", "domain", "same_rail", "cross_rail", "cross_site"]
    assert {link: nbytes for link, nbytes in sent.items() if nbytes} == nonzero


@given(members=st.integers(1, 72), count=st.integers(1, 5000), dtype=st.sampled_from(sorted(DTYPES)))
def test_ring_all_reduce_moves_twice_n_minus_one_buffers(members: int, count: int, dtype: str) -> None:
    itemsize = DTYPES[dtype].itemsize
    topology = Topology.single_node(members)
    schedule = build_schedule(Case(pattern="all_reduce", nbytes=count * itemsize, dtype=dtype), topology)
    ledger = schedule_ledger(schedule, topology)
    size = count * itemsize
    assert ledger.sent.sum() == 2 * (members - 1) * size
    for nbytes in (*ledger.sent.sum(axis=1).tolist(), *ledger.received.sum(axis=1).tolist()):
        # Each rank omits two chunks, and each chunk is within one element of count / n.
        assert abs(nbytes - 2 * (members - 1) * size / members) < 2 * itemsize


@given(members=st.integers(2, 72), shard=st.integers(1, 1000))
@pytest.mark.parametrize("pattern", ["all_gather", "reduce_scatter", "all_to_all"])
def test_sharded_ops_send_all_but_one_shard(pattern: str, members: int, shard: int) -> None:
    topology = Topology.single_node(members)
    ledger = schedule_ledger(build(pattern, topology, members * shard * FLOAT), topology)
    wire = ledger.sent[:, Link.SELF + 1 :].sum(axis=1)
    assert wire.tolist() == [(members - 1) * shard * FLOAT] * members


@pytest.mark.parametrize("root", range(5))
@pytest.mark.parametrize("pattern", ["broadcast", "reduce"])
def test_chain_uses_all_links_but_one(pattern: str, root: int) -> None:
    topology = Topology.single_node(5)
    ledger = schedule_ledger(build(pattern, topology, 400, root=root), topology)
    sent, received = ledger.sent.sum(axis=1).tolist(), ledger.received.sum(axis=1).tolist()
    assert sorted(sent) == sorted(received) == [0, 400, 400, 400, 400]
    assert (received if pattern == "broadcast" else sent)[root] == 0


def test_self_bytes_are_not_a_bottleneck() -> None:
    phase = AllToAllV("v", np.array([[0, 1]]), np.array([[[9, 1], [2, 7]]]), 10)
    ledger = phase_ledger(phase, Topology.single_node(2), 1)
    assert ledger.sent[:, Link.SELF].tolist() == ledger.received[:, Link.SELF].tolist() == [90, 70]
    assert ledger.sent[:, Link.NODE].tolist() == [10, 20]
    assert ledger.bottleneck_bytes == 20


def test_bottleneck_is_the_busiest_rank_in_either_direction() -> None:
    topology = Topology.from_hosts(["x", "x", "y", "y"])
    fan_out = Exchange("out", np.array([0, 0, 0]), np.array([1, 2, 3]), np.array([1, 20, 300]))
    fan_in = Exchange(
        "in", np.array([0, 1, 2]), np.array([3, 3, 3]), np.array([5, 60, 700]), recv_offset=np.array([0, 5, 65])
    )
    assert phase_ledger(fan_out, topology, 1).bottleneck_bytes == 321
    assert phase_ledger(fan_in, topology, 1).bottleneck_bytes == 765
    both = phase_ledger(fan_out, topology, 1) + phase_ledger(fan_in, topology, 1)
    assert both.bottleneck_bytes == 300 + 765
    record = both.as_record(seconds=1e-6)
    assert record["bottleneck_bytes"] == 1065
    assert record["bottleneck_gb_per_s"] == pytest.approx(1.065)
    assert both.as_record()["bottleneck_gb_per_s"] is None


def test_basis_names_what_was_counted() -> None:
    topology = Topology.single_node(2)
    ring = Collective("ring", Op.ALL_REDUCE, np.array([[0, 1]]), 4)
    pairs = Collective("pairs", Op.ALL_TO_ALL, np.array([[0, 1]]), 4)
    none = Local("none", "copy", 4)  # type: ignore[arg-type]
    barrier = Collective("barrier", Op.BARRIER, np.array([[0, 1]]), 0)
    basis = {phase.label: phase_ledger(phase, topology, 4) for phase in (ring, pairs, none, barrier)}
    assert [basis[name].basis for name in ("ring", "pairs", "none", "barrier")] == ["ring", "pairs", "none", "none"]
    assert (basis["none"] + basis["barrier"]).basis == "none"
    assert (basis["ring"] + basis["none"]).basis == "ring"
    assert (basis["ring"] + basis["pairs"] + basis["ring"]).basis == "pairs+ring"
    assert basis["none"].sent.sum() == basis["barrier"].sent.sum() == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize(("pattern", "factor"), [("all_reduce", 2), ("all_to_all", 1)])
def test_8192_ranks_are_counted_exactly(pattern: str, factor: int) -> None:
    ranks, shard = 8192, 512
    topology = Topology.from_hosts([f"n{rank // 8}" for rank in range(ranks)])
    ledger = schedule_ledger(build(pattern, topology, ranks * shard), topology)
    check_balance(ledger)
    wire = ledger.sent[:, Link.SELF + 1 :].sum(axis=1)
    assert wire.tolist() == [factor * (ranks - 1) * shard] * ranks
    if pattern == "all_to_all":  # of 8191 peers, 7 are on the node and 1023 elsewhere on the rail
        by_link = ledger.sent[5, [Link.SELF, Link.NODE, Link.SAME_RAIL, Link.CROSS_RAIL]]
        assert by_link.tolist() == [shard * peers for peers in (1, 7, 1023, 8192 - 1 - 7 - 1023)]
