"""Figures of flows, from synthetic records with one known fault each."""

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncclbench.analysis.flows import (
    describe_flows,
    endpoint_medians,
    far_over_near,
    far_over_near_by_leaf,
    flows_of,
    hot_rail_ratios,
    incast_fairness,
    interference,
    jain,
    largest_load,
    rail_matrix,
    spreading,
)
from ncclbench.measure.case import run_case
from ncclbench.plan.plan import Settings
from ncclbench.schedule import Case, Exchange
from ncclbench.schedule.pattern import build_variants
from ncclbench.store.records import FlowTimes, GroupMedian, LedgerRecord, PhaseResult, Record
from ncclbench.topology import Topology, Wiring
from ncclbench.topology.wiring import UNKNOWN
from ncclbench.transports.threads import play
from tests.helpers.stored import plain, record

NODES, RAILS, NBYTES = 8, 4, 1_000_000


def topology(per_leaf: int = NODES) -> Topology:
    ranks = np.arange(NODES * RAILS)
    leaves = ranks // RAILS // per_leaf * RAILS + ranks % RAILS
    wiring = Wiring(
        devices=("",) * len(ranks),
        nic_gbit_per_s=np.full(len(ranks), 8.0),
        leaves=leaves,
        leaf_names=tuple(f"leaf{k}" for k in range(leaves.max() + 1)),
        uplinks=np.full(leaves.max() + 1, 2),
        uplink_gbit_per_s=np.full(leaves.max() + 1, 8.0),
        domain_gbit_per_s=np.full(len(ranks), np.nan),
    )
    return Topology(
        nodes=ranks // RAILS,
        domains=ranks // RAILS,
        rails=ranks % RAILS,
        sites=0 * ranks,
        node_names=tuple(f"n{k}" for k in range(NODES)),
        wiring=wiring,
    )


def record_of(phases: list[PhaseResult]) -> Record:
    return record(nbytes=NBYTES, world_size=NODES * RAILS, phases=phases)


def flows(label: str, src: Any, dst: Any, gb_per_s: Any) -> PhaseResult:
    p50 = (NBYTES / np.asarray(gb_per_s, float) / 1e3).tolist()
    times = FlowTimes(
        src=list(src), dst=list(dst), nbytes=[NBYTES] * len(p50), p50_us=p50, send_p50_us=p50, recv_p50_us=p50
    )
    return PhaseResult(label=label, ledger=LedgerRecord(), flows=times)


def measured(pattern: str, rate: Any, where: Topology, **params: Any) -> Record:
    """The record of a pattern whose flows have the rates ``rate(src, dst)`` with 1% noise."""
    noise = np.random.default_rng(0)
    phases = []
    for one in build_variants(Case(pattern=pattern, nbytes=NBYTES, params=params), where):
        (phase,) = one.phases
        assert isinstance(phase, Exchange)
        exact = np.array([rate(a, b) for a, b in zip(phase.src.tolist(), phase.dst.tolist(), strict=True)])
        noisy = exact * noise.normal(1, 0.01, len(exact))
        phases.append(flows(phase.label, phase.src.tolist(), phase.dst.tolist(), noisy))
    return record_of(phases)


def test_rate_is_bytes_over_the_median() -> None:
    table = flows_of(record_of([flows("offset=1", [0, 1], [2, 3], [0.5, 2.0])]))
    assert table.gb_per_s.tolist() == pytest.approx([0.5, 2.0])
    assert table.rounds == ("offset=1", "offset=1")
    assert len(flows_of(record_of([])).src) == 0


@pytest.mark.parametrize("culprit", [0, 5, 31])
@pytest.mark.parametrize("side", ["send", "receive"])
def test_slow_nic_changes_only_its_own_median(culprit: int, side: str) -> None:
    def rate(src: int, dst: int) -> float:
        return 0.9 if (src if side == "send" else dst) == culprit else 1.0

    ends = endpoint_medians(flows_of(measured("same_rail", rate, topology())), NODES * RAILS)
    slow, other = (ends.send, ends.receive) if side == "send" else (ends.receive, ends.send)
    assert np.flatnonzero(slow < 0.95).tolist() == [culprit]
    assert slow[culprit] == pytest.approx(0.9, rel=0.02)
    assert not np.any(other < 0.95)
    assert set(ends.send_peers) == set(ends.receive_peers) == {7}


def test_two_rounds_with_one_peer_count_as_one() -> None:
    """Two of three rounds have the same slow peer: a median over rounds would blame the sender."""
    table = flows_of(record_of([flows("a", [0, 0, 0, 0], [1, 1, 2, 3], [0.1, 0.1, 1.0, 1.0])]))
    ends = endpoint_medians(table, 4)
    assert ends.send[0] == pytest.approx(1.0)
    assert ends.send_peers.tolist() == [3, 0, 0, 0]
    assert np.isnan(ends.send[1])


def test_rail_matrix_shows_slow_row_column_and_cell() -> None:
    def rate(src: int, dst: int) -> float:
        a, b = src % RAILS, dst % RAILS
        return 0.5 if a == 1 else 0.25 if b == 2 else 0.1 if (a, b) == (3, 0) else 1.0

    matrix = rail_matrix(flows_of(measured("cross_rail", rate, topology())), topology().rails.tolist())
    expected = np.ones((4, 4))
    expected[:, 2], expected[3, 0] = 0.25, 0.1
    expected[1] = 0.5
    assert np.isnan(np.diag(matrix)).all()
    off = ~np.eye(4, dtype=bool)
    np.testing.assert_allclose(matrix[off], expected[off], rtol=0.02)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_jain_is_from_1_over_n_to_1_without_unit(rates: list[float]) -> None:
    index = jain(rates)
    assert 1 / len(rates) - 1e-9 <= index <= 1 + 1e-9
    assert jain(np.array(rates) * 7) == pytest.approx(index)


def test_jain_of_known_shares() -> None:
    assert jain([2, 2, 2, 2]) == 1
    assert jain([1, 0, 0, 0]) == 0.25
    assert jain([3, 1]) == 0.8
    for nothing in ([], [0.0, 0.0]):
        with pytest.raises(ValueError, match="above zero"):
            jain(nothing)


@pytest.mark.parametrize(
    ("links", "per_link", "load"),
    [(16, 1, 3.1), (16, 8, 1.67), (16, 32, 1.33), (64, 1, 4.0), (64, 8, 1.91), (64, 32, 1.44)],
)
def test_null_model_gives_known_loads(links: int, per_link: int, load: float) -> None:
    """The expected loads come from a table that was computed independently."""
    assert largest_load(links, per_link) == pytest.approx(load, abs=0.05)


def test_spreading_score_of_perfect_and_random_spreading() -> None:
    even = flows_of(record_of([flows(f"permutation={k}", range(16), range(16, 32), [1.0] * 16) for k in range(5)]))
    assert spreading(even, 16, 1).score == 1
    rng = np.random.default_rng(1)
    hashed = []
    for k in range(200):
        links = rng.integers(0, 16, 16)
        loads = np.bincount(links, minlength=16)[links]
        hashed.append(flows(f"permutation={k}", range(16), range(16, 32), 1 / loads))
    found = spreading(flows_of(record_of(hashed)), 16, 1)
    assert abs(found.score) < 0.1
    assert found.null_load == pytest.approx(3.1, abs=0.05)
    with pytest.raises(ValueError, match="at least 2 links"):
        spreading(even, 1, 1)


def test_interference_of_rails_is_time_together_over_alone() -> None:
    def groups(*times: tuple[list[int], float]) -> list[GroupMedian]:
        return [GroupMedian(ranks=ranks, p50_us=p50) for ranks, p50 in times]

    phases = [
        PhaseResult(label="rail=0", ledger=LedgerRecord(), groups=groups(([0, 2], 10.0))),
        PhaseResult(label="rail=1", ledger=LedgerRecord(), groups=groups(([1, 3], 10.0))),
        PhaseResult(label="all", ledger=LedgerRecord(), groups=groups(([0, 2], 10.0), ([1, 3], 25.0))),
    ]
    assert interference(record_of(phases)) == {"rail=0": 1.0, "rail=1": 2.5}
    assert interference(record_of(phases[:2])) == {}


def test_incast_victim_and_fairness_of_senders() -> None:
    phases = [
        flows("senders=2", [4, 8, 12], [0, 0, 16], [0.6, 0.2, 0.25]),
        flows("victim=2", [12], [16], [1.0]),
    ]
    assert interference(record_of(phases)) == {"victim=2": pytest.approx(4.0)}
    assert incast_fairness(record_of(phases)) == {"senders=2": pytest.approx(0.8)}  # the victim is no sender


def test_far_over_near_with_a_lost_uplink() -> None:
    where = topology(per_leaf=4)
    assert where.wiring is not None
    leaves = where.wiring.leaves

    def rate(src: int, dst: int) -> float:
        if leaves[src] == leaves[dst]:
            return 1.0
        return 0.25 if leaves[src] == 2 else 0.5

    found = measured("leaf_contrast", rate, where)
    assert far_over_near(found) == pytest.approx(0.5, rel=0.02)
    by_leaf = far_over_near_by_leaf(found, leaves.tolist())
    assert by_leaf == {leaf: pytest.approx(0.25 if leaf == 2 else 0.5, rel=0.02) for leaf in range(8)}
    assert far_over_near(measured("same_rail", rate, where)) is None
    assert far_over_near_by_leaf(found, [UNKNOWN] * len(leaves)) == {}


def test_describe_flows_returns_plain_data() -> None:
    where = topology(per_leaf=4)
    told = describe_flows(measured("leaf_contrast", lambda _src, _dst: 1.0, where), where)
    assert set(told) == {
        "rail_matrix_gb_per_s",
        "send_gb_per_s",
        "receive_gb_per_s",
        "far_over_near",
        "far_over_near_by_leaf",
    }
    assert plain(told)["rail_matrix_gb_per_s"][0][1] is None
    assert list(plain(told)["far_over_near_by_leaf"]) == [f"leaf{k}" for k in range(8)]
    assert describe_flows(record_of([]), where) == {}


def test_spreading_needs_uplinks_in_the_topology_file() -> None:
    where = topology()
    found = msgspec.structs.replace(measured("permutation", lambda _src, _dst: 1.0, where), pattern="permutation")
    told = plain(describe_flows(found, where))
    assert told["spreading"]["null_load"] == pytest.approx(largest_load(2, 4))
    assert told["spreading"]["score"] > 0.8
    assert "spreading" not in describe_flows(found, replace(where, wiring=None))


def test_hot_rail_is_uneven_in_bytes_and_time() -> None:
    """8 nodes of 4 rails: with factor 4, each of 31 ranks sends 4 of its 55 shares to a hot rank."""
    where = topology()
    case = Case(pattern="rail_hot", nbytes=1 << 16)
    measured_ = play(NODES * RAILS, lambda t: run_case(case, t, where, Settings(iterations=6, check=False)))[0]
    assert measured_ is not None
    found = hot_rail_ratios(measured_.record)
    hot, mean = 4 * 31, (24 * 31 + 8 * 31 * 4) / 32
    assert found["factor=4"]["bytes"] == pytest.approx(hot / mean)
    assert found["factor=1"] == {"bytes": 1.0, "time": 1.0}
    p50 = {phase.label: phase.time_us.p50 for phase in measured_.record.phases if phase.time_us}
    assert found["factor=2"]["time"] == pytest.approx(p50["factor=2"] / p50["factor=1"])
    assert describe_flows(measured_.record, where)["heat"] == found
    assert hot_rail_ratios(record_of([])) == {}
