import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncclbench.config.plugins import names
from ncclbench.errors import UsageError
from ncclbench.schedule import (
    DTYPES,
    AllToAllV,
    Case,
    Collective,
    Concurrent,
    Exchange,
    Kernel,
    Local,
    Op,
    Phase,
    Schedule,
    Unable,
)
from ncclbench.schedule.pattern import build_schedule, load_pattern
from ncclbench.topology import Topology

# Patterns with one schedule. Those with variants need nodes and rails, and have tests of their own.
PATTERNS = [name for name in names("patterns") if not load_pattern(name).rotates]
GROUPED = [pattern for pattern in PATTERNS if "group" in load_pattern(pattern).params.__struct_fields__]
WORLD_SIZES = range(1, 73)
PAIR = [[0, 1]]


def alike(one: Any, other: Any) -> bool:
    """Deep equality; arrays are compared by content."""
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    if type(one) is not type(other):
        return False
    if dataclasses.is_dataclass(one):
        return all(alike(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    return bool(one == other)


def outcome(case: Case, topology: Topology) -> Schedule | str:
    """The schedule, or the reason why it cannot be built."""
    try:
        return build_schedule(case, topology)
    except Unable as unable:
        return str(unable)


def collective(**changes: Any) -> Collective:
    return Collective(**{"label": "c", "op": Op.ALL_REDUCE, "groups": np.array(PAIR), "count": 4, **changes})


def uneven(**changes: Any) -> AllToAllV:
    return AllToAllV(
        **{"label": "v", "groups": np.array(PAIR), "rows": np.ones((1, 2, 2), int), "row_bytes": 4, **changes}
    )


def exchange(**changes: Any) -> Exchange:
    return Exchange(
        **{"label": "x", "src": np.array([0, 1]), "dst": np.array([1, 0]), "nbytes": np.array([8]), **changes}
    )


def local(**changes: Any) -> Local:
    return Local(**{"label": "l", "kernel": Kernel.COPY, "count": 4, **changes})


def schedule(*phases: Phase, **changes: Any) -> Schedule:
    return Schedule(
        **{
            "world_size": 2,
            "dtype": DTYPES["float32"],
            "buffers": {"send": 32, "recv": 32},
            "inputs": ("send",),
            "phases": phases,
            "op": None,
            "size_bytes": 32,
            "count": 8,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"groups": np.array([0, 1])}, "2 dimensions"),
        ({"groups": np.zeros((0, 2), int)}, "no groups"),
        ({"groups": np.zeros((1, 0), int)}, "no groups"),
        ({"groups": np.array([[0, -1]])}, "negative rank"),
        ({"groups": np.array([[0, 0]])}, "disjoint"),
        ({"groups": np.array([[0, 1], [1, 2]])}, "disjoint"),
        ({"count": 0}, "count must be positive"),
        ({"count": -4}, "count must be positive"),
        ({"root": 2}, "root 2 is not in a group of 2"),
        ({"root": -1}, "root -1"),
        ({"op": "all_reduced"}, "all_reduced"),
        ({"redop": "xor"}, "xor"),
    ],
)
def test_collective_refuses_bad_arguments(changes: dict[str, Any], why: str) -> None:
    collective()
    with pytest.raises(ValueError, match=why):
        collective(**changes)


def test_barrier_needs_no_count_and_uses_no_buffer() -> None:
    barrier = collective(op=Op.BARRIER, count=0)
    assert (barrier.read_count, barrier.write_count) == (0, 0)


@pytest.mark.parametrize(
    ("op", "reads", "writes"),
    [
        ("all_reduce", 4, 4),
        ("reduce", 4, 4),
        ("broadcast", 4, 4),
        ("all_gather", 4, 12),
        ("gather", 4, 12),
        ("reduce_scatter", 12, 4),
        ("scatter", 12, 4),
        ("all_to_all", 12, 12),
    ],
)
def test_read_and_write_counts_of_a_collective(op: str, reads: int, writes: int) -> None:
    phase = collective(op=op, groups=np.array([[0, 1, 2]]))
    assert (phase.read_count, phase.write_count) == (reads, writes)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"groups": np.array([[0, 0]])}, "disjoint"),
        ({"groups": np.array([0, 1])}, "2 dimensions"),
        ({"rows": np.ones((2, 2), int)}, "3 dimensions"),
        ({"rows": np.ones((2, 2, 2), int)}, "rows must be"),
        ({"rows": np.ones((1, 2, 3), int)}, "rows must be"),
        ({"rows": np.array([[[0, 1], [-1, 0]]])}, "not be negative"),
        ({"row_bytes": 0}, "at least one byte"),
        ({"write": "send"}, "in place"),
    ],
)
def test_uneven_all_to_all_refuses_bad_arguments(changes: dict[str, Any], why: str) -> None:
    uneven()
    with pytest.raises(ValueError, match=why):
        uneven(**changes)


def test_splits_are_row_and_column_in_bytes() -> None:
    sent, received = uneven(rows=np.array([[[1, 2], [3, 5]]])).splits(0, 1)
    assert (sent.tolist(), received.tolist()) == ([12, 20], [8, 20])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"src": np.zeros(0, int), "dst": np.zeros(0, int)}, "no flows"),
        ({"src": np.array([[0, 1]])}, "1 dimension"),
        ({"src": np.array([0, 1, 0])}, "shape"),
        ({"src": np.array([0, -1])}, "negative rank"),
        ({"dst": np.array([1, -1])}, "negative rank"),
        ({"send_offset": np.array([-4])}, "offset"),
        ({"recv_offset": np.array([-4])}, "offset"),
        ({"nbytes": np.array([8, 0])}, "at least one byte"),
        ({"nbytes": np.array([-8])}, "at least one byte"),
        ({"dst": np.array([1, 1])}, "same bytes"),
        ({"dst": np.array([1, 1]), "recv_offset": np.array([7, 0])}, "same bytes"),
    ],
)
def test_exchange_refuses_bad_arguments(changes: dict[str, Any], why: str) -> None:
    exchange()
    with pytest.raises(ValueError, match=why):
        exchange(**changes)


def test_flows_may_be_adjacent_or_share_a_source() -> None:
    phase = exchange(src=np.array([0, 0]), dst=np.array([1, 1]), recv_offset=np.array([8, 0]))
    assert phase.nbytes.tolist() == [8, 8]


def test_in_place_flow_may_not_overwrite_a_source() -> None:
    """In an in-place swap, the data sent would depend on which flow arrives first."""
    swap: dict[str, Any] = {"src": np.array([0, 1]), "dst": np.array([1, 0])}
    exchange(**swap)  # from one buffer into another
    with pytest.raises(ValueError, match="lands on bytes of 'data' that another sends at the same time"):
        exchange(**swap, read="data", write="data")
    with pytest.raises(ValueError, match="lands on bytes"):  # by one byte
        exchange(**swap, read="data", write="data", recv_offset=np.array([7]))
    assert exchange(**swap, read="data", write="data", recv_offset=np.array([8])).read == "data"


FLOWS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 4), st.integers(0, 8), st.integers(0, 8)),
    min_size=1,
    max_size=6,
)


@given(FLOWS)
def test_in_place_exchange_is_refused_exactly_on_overlap(
    flows: list[tuple[int, int, int, int, int]],
) -> None:
    """Compare with the sets of bytes."""
    landed = [(dst, start + k) for _, dst, size, _, start in flows for k in range(size)]
    sent = {(src, first + k) for src, _, size, first, _ in flows for k in range(size)}
    src, dst, nbytes, send_offset, recv_offset = np.transpose(flows)
    fields = {"src": src, "dst": dst, "nbytes": nbytes, "send_offset": send_offset, "recv_offset": recv_offset}
    if len(set(landed)) != len(landed):
        why = "same bytes of one rank"
    elif sent & set(landed):
        why = "at the same time"
    else:
        Exchange(label="x", **fields, read="data", write="data")
        return
    with pytest.raises(ValueError, match=why):
        Exchange(label="x", **fields, read="data", write="data")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"count": 0}, "positive"),
        ({"chunks": 0}, "positive"),
        ({"write": "send"}, "reads one buffer and writes another"),
        ({"kernel": "sort"}, "sort"),
        ({"kernel": "gather_rows"}, "needs the rows"),
        ({"kernel": "gather_rows", "rows": np.array([[0, -1]])}, "needs the rows"),
        ({"kernel": "gather_rows", "rows": np.array([0, 1])}, "2 dimensions"),
    ],
)
def test_local_phase_refuses_bad_arguments(changes: dict[str, Any], why: str) -> None:
    local()
    with pytest.raises(ValueError, match=why):
        local(**changes)


def test_read_and_write_counts_of_local_phases() -> None:
    rows = local(kernel="gather_rows", rows=np.array([[0, 5, 1], [2, 2, 2]]))
    chunks = local(kernel="reduce_chunks", chunks=3)
    assert (rows.read_count, rows.write_count) == (24, 12)
    assert (chunks.read_count, chunks.write_count) == (12, 4)
    assert (local().read_count, local().write_count) == (4, 4)


@pytest.mark.parametrize(
    "branches",
    [
        (),
        ((local(),), ()),
        ((local(),), (local(),)),  # both write recv
        ((local(),), (local(read="recv", write="other"),)),
        ((local(read="recv", write="other"),), (local(),)),
        ((local(), local(read="recv", write="mine")), (local(read="b", write="mine"),)),
    ],
    ids=["none", "an empty one", "both write", "the second reads", "the first reads", "only the second phase races"],
)
def test_racing_or_empty_branches_are_refused(branches: Any) -> None:
    with pytest.raises(ValueError, match="branch"):
        Concurrent("c", branches)


def test_concurrent_branches_may_read_the_same_buffer() -> None:
    Concurrent("c", ((local(write="a"),), (local(write="b"),)))


@pytest.mark.parametrize(
    ("phase", "fields"),
    [
        (collective(), ["groups"]),
        (uneven(), ["groups", "rows"]),
        (exchange(), ["src", "dst", "nbytes", "send_offset", "recv_offset"]),
        (local(kernel="gather_rows", rows=np.array([[0]])), ["rows"]),
    ],
    ids=["collective", "uneven", "exchange", "local"],
)
def test_arrays_of_a_phase_are_read_only(phase: Phase, fields: list[str]) -> None:
    for name in fields:
        array = getattr(phase, name)
        assert array.dtype == np.int64
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_phase_copies_its_arrays() -> None:
    groups = np.array(PAIR)
    phase = collective(groups=groups)
    groups[0, 0] = 7
    assert phase.groups.tolist() == PAIR


def test_groups_of_a_schedule_are_read_only() -> None:
    made = schedule(collective(), groups=np.array(PAIR))
    with pytest.raises(ValueError, match="read-only"):
        made.rate_groups[0, 0] = 1


@pytest.mark.parametrize(
    ("phases", "changes", "why"),
    [
        ((), {}, "at least one phase"),
        ((collective(), collective()), {}, "labels must differ"),
        ((collective(),), {"buffers": {"send": 32, "recv": 0}}, "positive multiple"),
        ((collective(),), {"buffers": {"send": 32, "recv": -32}}, "positive multiple"),
        ((collective(),), {"buffers": {"send": 32, "recv": 30}}, "positive multiple"),
        ((collective(),), {"inputs": ("data",)}, "not among the buffers"),
        ((collective(read="data"),), {}, "no buffer 'data'; there are: send, recv"),
        ((collective(write="data"),), {}, "no buffer 'data'"),
        ((collective(count=9),), {}, "needs 36 bytes of 'send', which has 32"),
        ((collective(op="all_gather", count=5),), {}, "needs 40 bytes of 'recv'"),
        ((collective(op="reduce_scatter", count=5),), {}, "needs 40 bytes of 'send'"),
        ((collective(groups=np.array([[0, 2]])),), {}, "rank 2 of a world of 2"),
        ((uneven(groups=np.array([[1, 2]])),), {}, "rank 2 of a world of 2"),
        ((uneven(rows=np.full((1, 2, 2), 5)),), {}, "needs 40 bytes of 'send'"),
        ((uneven(rows=np.array([[[0, 5], [0, 4]]])),), {}, "needs 36 bytes of 'recv'"),
        ((uneven(row_bytes=6),), {}, "not whole elements"),
        ((exchange(src=np.array([0, 3])),), {}, "rank 3 of a world of 2"),
        ((exchange(nbytes=np.array([36])),), {}, "needs 36 bytes of 'send'"),
        ((exchange(recv_offset=np.array([28])),), {}, "needs 36 bytes of 'recv'"),
        ((exchange(send_offset=np.array([28])),), {}, "needs 36 bytes of 'send'"),
        ((exchange(nbytes=np.array([6])),), {}, "whole elements"),
        ((exchange(send_offset=np.array([2])),), {}, "whole elements"),
        ((local(count=9),), {}, "needs 36 bytes"),
        ((local(kernel="reduce_chunks", chunks=3),), {}, "needs 48 bytes of 'send'"),
        ((local(kernel="gather_rows", rows=np.array([[0], [2]])),), {}, "needs 48 bytes of 'send'"),
        ((local(kernel="gather_rows", rows=np.array([[0]])),), {}, "rows of all 2 ranks"),
        ((Concurrent("both", ((local(),), (collective(count=9, write="b"),))),), {}, "needs 36 bytes"),
        ((collective(),), {"groups": np.array([0, 1])}, "2 dimensions"),
    ],
)
def test_schedule_refuses_bad_arguments(phases: tuple[Phase, ...], changes: dict[str, Any], why: str) -> None:
    schedule(collective())
    with pytest.raises(ValueError, match=why):
        schedule(*phases, **changes)


def test_rate_groups_default_to_all_ranks() -> None:
    assert schedule(collective()).rate_groups.tolist() == [[0, 1]]
    assert schedule(collective(), groups=np.array([[1], [0]])).rate_groups.tolist() == [[1], [0]]


def test_memory_is_the_sum_of_buffers() -> None:
    assert schedule(collective()).memory_bytes == 64


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_builds_or_is_unable(pattern: str) -> None:
    case = Case(pattern=pattern, nbytes=1 << 16)
    made = {world_size: outcome(case, Topology.single_node(world_size)) for world_size in WORLD_SIZES}
    for world_size, one in made.items():
        if isinstance(one, str):
            assert re.fullmatch(r"\S.{10,}\S", one)
            continue
        assert one.world_size == world_size
        assert 0 < one.size_bytes <= case.nbytes
        assert one.size_bytes % case.element.itemsize == 0
        assert one.count > 0
        assert one.rate_groups.max() < world_size
    assert any(isinstance(one, Schedule) for one in made.values())


@pytest.mark.parametrize("pattern", ["all_reduce", "broadcast", "reduce", "send_recv"])
@pytest.mark.parametrize(("nbytes", "count"), [(403, 100), (412, 103)])
def test_whole_buffer_ops_count_all_elements(pattern: str, nbytes: int, count: int) -> None:
    made = build_schedule(Case(pattern=pattern, nbytes=nbytes), Topology.single_node(4))
    assert (made.count, made.size_bytes) == (count, 4 * count)


@pytest.mark.parametrize("pattern", ["all_gather", "reduce_scatter", "all_to_all", "gather", "scatter", "hypercube"])
@pytest.mark.parametrize(("nbytes", "count"), [(403, 25), (412, 25), (416, 26)])
def test_sharded_ops_count_one_shard(pattern: str, nbytes: int, count: int) -> None:
    made = build_schedule(Case(pattern=pattern, nbytes=nbytes), Topology.single_node(4))
    assert (made.count, made.size_bytes) == (count, 4 * 4 * count)


@pytest.mark.parametrize("pattern", PATTERNS)
@given(data=st.data())
def test_schedules_are_deterministic(pattern: str, data: st.DataObject) -> None:
    hosts = [f"host{k}" for k in range(data.draw(st.integers(1, 4))) for _ in range(2)]
    case = Case(
        pattern=pattern,
        nbytes=data.draw(st.integers(1, 1 << 20)),
        dtype=data.draw(st.sampled_from(sorted(DTYPES))),
        params=data.draw(st.sampled_from([{}, {"group": "node"}, {"group": "2"}] if pattern in GROUPED else [{}])),
    )
    once, again = (outcome(case, Topology.from_hosts(hosts)) for _ in range(2))
    assert alike(once, again)


def test_schedules_of_different_cases_differ() -> None:
    topology = Topology.single_node(4)
    made = build_schedule(Case(pattern="all_reduce", nbytes=64), topology)
    assert not alike(made, build_schedule(Case(pattern="all_reduce", nbytes=128), topology))
    assert not alike(made, build_schedule(Case(pattern="all_reduce", nbytes=64, params={"group": "2"}), topology))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_size_below_one_element_is_refused(pattern: str) -> None:
    with pytest.raises(Unable, match="3 bytes"):
        build_schedule(Case(pattern=pattern, nbytes=3), Topology.single_node(8))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_unknown_parameter_names_the_known_ones(pattern: str) -> None:
    with pytest.raises(UsageError, match=f"{pattern} has no parameter 'gruop'; did you mean 'group'. there are: "):
        build_schedule(Case(pattern=pattern, nbytes=64, params={"gruop": "node"}), Topology.single_node(2))


@pytest.mark.parametrize("pattern", ["broadcast", "reduce", "gather", "scatter"])
@pytest.mark.parametrize("root", [4, 17])
def test_root_outside_its_group_is_unable(pattern: str, root: int) -> None:
    with pytest.raises(Unable, match=f"root {root} is not in a group of 4"):
        build_schedule(Case(pattern=pattern, nbytes=64, params={"root": root}), Topology.single_node(4))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("name", "value"), [("group", "0"), ("group", "00"), ("root", -1)])
def test_universally_impossible_parameter_is_an_error(pattern: str, name: str, value: Any) -> None:
    if name not in load_pattern(pattern).params.__struct_fields__:
        return
    for ranks in (1, 4):
        with pytest.raises(UsageError, match=r"from 0 on, got -1|from 1 on, got 0"):
            build_schedule(Case(pattern=pattern, nbytes=64, params={name: value}), Topology.single_node(ranks))


@pytest.mark.parametrize("spec", ["9" * 9, "9" * 5000])
def test_too_large_group_is_unable(spec: str) -> None:
    with pytest.raises(Unable, match="do not divide a world of 4"):
        Topology.single_node(4).groups(spec)


# Three nodes of two ranks, interleaved, as a launcher with round-robin assignment orders them.
INTERLEAVED = ("x", "y", "z", "x", "y", "z")
IN_ORDER = ("x", "x", "y", "y", "z", "z")


@pytest.mark.parametrize(
    ("hosts", "spec", "expected"),
    [
        (IN_ORDER, "world", [[0, 1, 2, 3, 4, 5]]),
        (IN_ORDER, "node", [[0, 1], [2, 3], [4, 5]]),
        (IN_ORDER, "domain", [[0, 1], [2, 3], [4, 5]]),
        (IN_ORDER, "rail", [[0, 2, 4], [1, 3, 5]]),
        (IN_ORDER, "site", [[0, 1, 2, 3, 4, 5]]),
        (IN_ORDER, "1", [[0], [1], [2], [3], [4], [5]]),
        (IN_ORDER, "3", [[0, 1, 2], [3, 4, 5]]),
        (IN_ORDER, "6", [[0, 1, 2, 3, 4, 5]]),
        (INTERLEAVED, "node", [[0, 3], [1, 4], [2, 5]]),
        (INTERLEAVED, "rail", [[0, 1, 2], [3, 4, 5]]),
        (INTERLEAVED, "2", [[0, 1], [2, 3], [4, 5]]),
    ],
)
def test_groups_of_a_topology(hosts: tuple[str, ...], spec: str, expected: list[list[int]]) -> None:
    assert Topology.from_hosts(hosts).groups(spec).tolist() == expected


@pytest.mark.parametrize("spec", ["4", "5", "7"])
def test_groups_that_do_not_divide_the_world_are_unable(spec: str) -> None:
    with pytest.raises(Unable, match=f"groups of {spec} do not divide a world of 6"):
        Topology.from_hosts(IN_ORDER).groups(spec)


@pytest.mark.parametrize("spec", ["node", "rail", "domain"])
def test_groups_of_different_sizes_are_unable(spec: str) -> None:
    with pytest.raises(Unable, match=f"groups by {spec} differ in size here"):
        Topology.from_hosts(["x", "x", "y"]).groups(spec)


@pytest.mark.parametrize("spec", ["", "nodes", "-2", "2.0", "x"])
def test_unknown_group_names_the_choices(spec: str) -> None:
    with pytest.raises(UsageError, match="world, node, domain, rail, site"):
        Topology.from_hosts(IN_ORDER).groups(spec)


@pytest.mark.parametrize("hosts", [[], ["x", ""]])
def test_ranks_without_a_host_are_refused(hosts: list[str]) -> None:
    with pytest.raises(ValueError, match="host name"):
        Topology.from_hosts(hosts)


def test_topology_states_its_assumptions() -> None:
    sources = Topology.from_hosts(IN_ORDER).sources
    assert {name for name, source in sources.items() if source.startswith("assumed")} == {"domain", "rail", "site"}


def test_topology_of_unequal_arrays_is_refused() -> None:
    two, three = np.zeros(2, int), np.zeros(3, int)
    with pytest.raises(ValueError, match="sites has another length"):
        Topology(nodes=two, domains=two, rails=two, sites=three, node_names=("x",))


@pytest.mark.parametrize("pattern", GROUPED)
@pytest.mark.parametrize("spec", ["world", "node", "rail", "2", "4"])
def test_pattern_stays_in_its_groups(pattern: str, spec: str) -> None:
    topology = Topology.from_hosts(["x"] * 4 + ["y"] * 4)
    try:
        made = build_schedule(Case(pattern=pattern, nbytes=4096, params={"group": spec}), topology)
    except Unable as unable:
        pytest.skip(str(unable))
    group_of = {rank: g for g, ranks in enumerate(topology.groups(spec).tolist()) for rank in ranks}
    assert made.rate_groups.tolist() == topology.groups(spec).tolist()
    for phase in made.phases:
        if isinstance(phase, Exchange):
            assert [group_of[r] for r in phase.src.tolist()] == [group_of[r] for r in phase.dst.tolist()]
        elif isinstance(phase, Collective | AllToAllV):
            for ranks in phase.groups.tolist():
                assert len({group_of[rank] for rank in ranks}) == 1
