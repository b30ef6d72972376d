"""A topology and its stored form are each other's inverse, and what does not fit is refused."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncclbench.topology import Topology, TopologyRecord, Wiring
from ncclbench.topology.rank_names import distinct, group_name, rank_name

RATES = st.one_of(st.just(float("nan")), st.floats(0.1, 1000))


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Any topology of up to 8 ranks, wired or not."""
    ranks = draw(st.integers(1, 8))

    def column(least: int, most: int) -> Any:
        return np.array(draw(st.lists(st.integers(least, most), min_size=ranks, max_size=ranks)))

    def rates(count: int) -> Any:
        return np.array(draw(st.lists(RATES, min_size=count, max_size=count)), np.float64)

    nodes, leaves = column(0, ranks - 1), draw(st.integers(1, 4))
    wiring = Wiring(
        devices=tuple(draw(st.lists(st.sampled_from(["", "eth0"]), min_size=ranks, max_size=ranks))),
        nic_gbit_per_s=rates(ranks),
        leaves=column(-1, leaves - 1),
        leaf_names=tuple(f"l{k}" for k in range(leaves)),
        uplinks=np.array(draw(st.lists(st.integers(0, 9), min_size=leaves, max_size=leaves))),
        uplink_gbit_per_s=rates(leaves),
        domain_gbit_per_s=rates(ranks),
    )
    return Topology(
        nodes=nodes,
        domains=column(0, 7),
        rails=column(0, 7),
        sites=column(0, 2),
        node_names=tuple(f"n{k}" for k in range(int(nodes.max()) + 1)),
        sources=draw(st.dictionaries(st.sampled_from(["node", "rail"]), st.text(max_size=5))),
        wiring=draw(st.sampled_from([None, wiring])),
    )


@given(topologies())
def test_a_topology_survives_being_stored(topology: Topology) -> None:
    stored = msgspec.json.encode(topology.as_record())
    back = Topology.from_record(msgspec.json.decode(stored, type=TopologyRecord))
    for name in ("nodes", "domains", "rails", "sites"):
        np.testing.assert_array_equal(getattr(back, name), getattr(topology, name))
    assert (back.node_names, back.sources) == (topology.node_names, topology.sources)
    assert (back.wiring is None) == (topology.wiring is None)
    assert msgspec.json.encode(back.as_record()) == stored


@pytest.mark.parametrize(
    "change",
    [
        {"rails": [0]},
        {"domains": []},
        {"sites": [0, 0, 0]},
        {"nodes": [0, -1]},
        {"nodes": [0, 2**62]},
        {"world_size": 3},
    ],
)
def test_columns_that_do_not_fit_are_no_topology(change: dict[str, Any]) -> None:
    record = Topology.from_hosts(["a", "b"]).as_record()
    with pytest.raises(ValueError, match=r"^topology: "):
        Topology.from_record(msgspec.structs.replace(record, **change))


def test_what_a_wiring_does_not_say_of_every_rank_is_not_known() -> None:
    record = msgspec.json.decode(
        b'{"nodes": [0, 0], "domains": [0, 0], "rails": [0, 1], "wiring": {"leaves": [0, 5], "devices": ["eth0"]}}',
        type=TopologyRecord,
    )
    topology = Topology.from_record(record)
    assert topology.node_names == ("node 0",)
    assert topology.sites.tolist() == [0, 0]
    assert topology.wiring is not None
    assert topology.wiring.leaves.tolist() == [-1, -1]
    assert topology.wiring.devices == ("", "")
    assert np.isnan(topology.wiring.nic_gbit_per_s).all()


def test_ranks_and_groups_are_named_as_far_as_they_are_known() -> None:
    topology = Topology.from_hosts(["a", "a", "b", "b"])
    assert rank_name(topology, 2) == "rank 2 (b, rail 0)"
    assert rank_name(topology, 9) == rank_name(None, 9) == "rank 9"
    assert group_name(topology, [2, 3]) == ("node", "node b")
    assert group_name(topology, [1, 3]) == ("rail", "rail 1")
    assert group_name(topology, [0, 3]) == group_name(None, [0, 3]) == ("group", "ranks 0,3")
    assert (distinct(topology.nodes, [0, 1]), distinct(topology.nodes, [0, 3])) == (1, 2)
    assert distinct(topology.nodes, []) is distinct(topology.nodes, [4]) is None
