"""Fabric patterns: properties of their flows, runs on threads, and the results of each flow."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncclbench.config.plugins import names
from ncclbench.measure.case import Measurement, run_case
from ncclbench.plan.plan import Settings
from ncclbench.schedule import AllToAllV, Case, Collective, Exchange, Schedule, Timing, Unable, derangement, round_robin
from ncclbench.schedule.flow_rounds import Round, occurrence_numbers, split_directions
from ncclbench.schedule.minimum_time import minimum_seconds
from ncclbench.schedule.pattern import build_variants, load_pattern
from ncclbench.schedule.rates import bus_factor
from ncclbench.topology import Topology, Wiring
from ncclbench.transports.threads import play

# Patterns whose parameters determine the size have tests of their own.
VARYING = [name for name in names("patterns") if load_pattern(name).rotates]
PATTERNS = [name for name in VARYING if load_pattern(name).size_and_dtype is None]
FABRIC = [
    "same_rail",
    "cross_rail",
    "leaf_contrast",
    "bisection",
    "permutation",
    "incast",
    "rail_groups",
    "rail_hot",
    "ring",
    "domain_straddle",
    "pairs",
]
FLOWS = ("same_rail", "cross_rail", "leaf_contrast", "bisection", "permutation", "ring", "pairs")

DOMAINS, RAILS = st.integers(2, 64), st.integers(1, 16)


def fabric(nodes: int, rails: int, trays: int = 1, per_leaf: int = 0, gbit_per_s: float = 8.0) -> Topology:
    """`nodes` nodes of `rails` ranks, with `trays` nodes per NVLink domain and `per_leaf` per leaf and rail."""
    ranks = np.arange(nodes * rails)
    node, rail = ranks // rails, ranks % rails
    wiring = None
    if per_leaf:
        blocks = -(-nodes // per_leaf)
        wiring = Wiring(
            devices=tuple(f"rail{r}" for r in rail),
            nic_gbit_per_s=np.full(len(ranks), gbit_per_s),
            leaves=node // per_leaf * rails + rail,
            leaf_names=tuple(f"leaf{k}" for k in range(blocks * rails)),
            uplinks=np.ones(blocks * rails, np.int64),
            uplink_gbit_per_s=np.full(blocks * rails, gbit_per_s),
            domain_gbit_per_s=np.full(len(ranks), np.nan),
        )
    return Topology(
        nodes=node,
        domains=node // trays,
        rails=rail,
        sites=np.zeros_like(ranks),
        node_names=tuple(f"n{k}" for k in range(nodes)),
        wiring=wiring,
    )


def made(pattern: str, topology: Topology, nbytes: int = 4096, **params: object) -> tuple[Schedule, ...]:
    return build_variants(Case(pattern=pattern, nbytes=nbytes, params=dict(params)), topology)


def exchanges(schedules: tuple[Schedule, ...]) -> list[Exchange]:
    return [phase for one in schedules for phase in one.phases if isinstance(phase, Exchange)]


def test_all_fabric_patterns_exist() -> None:
    assert set(FABRIC) <= set(PATTERNS)


@pytest.mark.parametrize("pattern", FLOWS)
@pytest.mark.parametrize("direction", ["both", "apart"])
@given(domains=DOMAINS, rails=RAILS, trays=st.sampled_from([1, 1, 2, 3]), seed=st.integers(0, 3))
def test_flows_leave_their_domain_once_per_rank(
    pattern: str, direction: str, domains: int, rails: int, trays: int, seed: int
) -> None:
    topology = fabric(domains * trays, rails, trays, per_leaf=2)
    params = {"rounds": 3} if pattern == "permutation" else {}
    try:
        schedules = made(pattern, topology, direction=direction, seed=seed, **params)
    except Unable:
        assert not can_run(pattern, domains, rails, trays)
        return
    assert can_run(pattern, domains, rails, trays)
    check_rounds(exchanges(schedules), topology, direction, all_ranks=pattern != "pairs" or domains % 2 == 0)


def check_rounds(phases: list[Exchange], topology: Topology, direction: str, *, all_ranks: bool) -> None:
    """Check every round; with `all_ranks`, each rank takes part (in pairs: for even numbers of nodes)."""
    labels = [phase.label for phase in phases]
    assert len(set(labels)) == len(labels), "a label stands twice"
    for phase in phases:
        assert np.all(topology.domains[phase.src] != topology.domains[phase.dst]), "a flow stays in its domain"
        senders, receivers = set(phase.src.tolist()), set(phase.dst.tolist())
        assert len(senders) == len(receivers) == len(phase.src), "two flows on one rank"
        if direction == "apart":
            assert not senders & receivers, "a rank sends and receives"
        elif all_ranks:
            assert len(phase.src) == topology.world_size, "a rank is left out"


@pytest.mark.parametrize(
    ("src", "dst", "direction", "words"),
    [
        ([0, 1, 2, 3], [2, 3, 0, 1], "both", ""),
        ([0, 1, 2, 3], [1, 2, 3, 0], "both", "a flow stays in its domain"),
        ([0, 0, 2, 3], [2, 3, 0, 1], "both", "two flows on one rank"),
        ([0, 1, 2, 3], [2, 2, 0, 1], "both", "two flows on one rank"),
        ([0, 1, 2], [2, 3, 0], "both", "a rank is left out"),
        ([0, 1, 2, 3], [2, 3, 0, 1], "apart", "a rank sends and receives"),
    ],
)
def test_round_check_catches_each_fault(src: list[int], dst: list[int], direction: str, words: str) -> None:
    phase = Exchange("r", np.array(src), np.array(dst), np.array([8]), recv_offset=occurrence_numbers(dst) * 8)
    if not words:
        check_rounds([phase], fabric(2, 2), direction, all_ranks=True)
        words, phases = "a label stands twice", [phase, phase]
    else:
        phases = [phase]
    with pytest.raises(AssertionError, match=words):
        check_rounds(phases, fabric(2, 2), direction, all_ranks=True)


def can_run(pattern: str, domains: int, rails: int, trays: int) -> bool:
    needs = {"cross_rail": rails >= 2, "bisection": domains >= 4 and domains % 2 == 0}
    if pattern == "leaf_contrast":  # two nodes per leaf: half of each domain's nodes, or two domains
        nodes = domains * trays
        return trays == 1 and nodes % 2 == 0 and nodes >= 4
    return needs.get(pattern, True)


@given(domains=DOMAINS, rails=RAILS)
def test_same_rail_visits_every_distance_once(domains: int, rails: int) -> None:
    topology = fabric(domains, rails)
    met = []
    for phase in exchanges(made("same_rail", topology)):
        assert np.array_equal(topology.rails[phase.src], topology.rails[phase.dst])
        distance = set(((topology.nodes[phase.dst] - topology.nodes[phase.src]) % domains).tolist())
        assert len(distance) == 1
        met += list(distance)
    assert len(met) == len(set(met)) == min(7, domains - 1)


@given(domains=DOMAINS, rails=st.integers(2, 16))
def test_cross_rail_visits_other_rails_equally_often(domains: int, rails: int) -> None:
    topology = fabric(domains, rails)
    cells: Counter[tuple[int, int]] = Counter()
    for phase in exchanges(made("cross_rail", topology)):
        cells.update(zip(topology.rails[phase.src].tolist(), topology.rails[phase.dst].tolist(), strict=True))
    assert set(cells) == {(a, b) for a in range(rails) for b in range(rails) if a != b}
    assert len(set(cells.values())) == 1


@given(domains=DOMAINS, rails=st.integers(1, 4))
def test_pairs_meet_once_in_each_direction(domains: int, rails: int) -> None:
    topology = fabric(domains, rails)
    met: Counter[tuple[int, int]] = Counter()
    phases = exchanges(made("pairs", topology))
    for phase in phases:
        met.update(zip(phase.src.tolist(), phase.dst.tolist(), strict=True))
    expected = {
        (a * rails + r, b * rails + r) for a in range(domains) for b in range(domains) if a != b for r in range(rails)
    }
    assert set(met) == expected
    assert set(met.values()) == {1}
    assert len(phases) == domains - 1 + domains % 2


@given(teams=st.integers(1, 64))
def test_round_robin_plays_every_pair_once(teams: int) -> None:
    rounds = round_robin(teams)
    assert sorted(tuple(sorted(pair)) for one in rounds for pair in one) == list(combinations(range(teams), 2))
    for one in rounds:
        assert len({team for pair in one for team in pair}) == 2 * len(one)


@given(size=st.integers(2, 64), seed=st.integers(0, 9))
def test_derangement_has_no_fixed_point(size: int, seed: int) -> None:
    permuted = derangement(size, np.random.default_rng(seed))
    assert sorted(permuted.tolist()) == list(range(size))
    assert not np.any(permuted == np.arange(size))


def test_derangement_needs_two_elements() -> None:
    with pytest.raises(ValueError, match="1 things"):
        derangement(1, np.random.default_rng(0))


@given(domains=DOMAINS, rails=RAILS, seed=st.integers(0, 3))
def test_permutations_differ_and_can_keep_the_rail(domains: int, rails: int, seed: int) -> None:
    topology = fabric(domains, rails)
    for phase in exchanges(made("permutation", topology, rounds=2, rail="same", seed=seed)):
        assert np.array_equal(topology.rails[phase.src], topology.rails[phase.dst])
    free = exchanges(made("permutation", topology, rounds=2, seed=seed))
    if domains * rails > 40:  # equal permutations of this size would be a fault of the seed
        assert not np.array_equal(free[0].dst, free[1].dst)


@given(blocks=st.integers(2, 8), per_leaf=st.integers(2, 8), rails=RAILS)
def test_leaf_contrast_separates_near_and_far(blocks: int, per_leaf: int, rails: int) -> None:
    topology = fabric(blocks * per_leaf, rails, per_leaf=per_leaf)
    assert topology.wiring is not None
    leaves = topology.wiring.leaves
    kinds = Counter(phase.label.partition(",")[0] for phase in exchanges(made("leaf_contrast", topology)))
    assert kinds["near"] == min(3, per_leaf - 1)
    assert kinds["far"] == 3 if blocks * per_leaf > 4 else 2
    for phase in exchanges(made("leaf_contrast", topology)):
        same = leaves[phase.src] == leaves[phase.dst]
        assert same.all() if phase.label.startswith("near") else not same.any()
        assert np.array_equal(topology.rails[phase.src], topology.rails[phase.dst])


@given(domains=st.integers(2, 32).map(lambda half: 2 * half), rails=RAILS)
def test_bisection_pairs_neighbors_and_halves(domains: int, rails: int) -> None:
    topology = fabric(domains, rails)
    phases = {phase.label: phase for phase in exchanges(made("bisection", topology))}
    nodes = {label: (topology.nodes[p.src], topology.nodes[p.dst]) for label, p in phases.items()}
    assert np.array_equal(nodes["near"][1], nodes["near"][0] ^ 1)
    assert np.array_equal(nodes["far"][1], (nodes["far"][0] + domains // 2) % domains)
    assert 2 <= len(phases) <= 4
    for src, dst in nodes.values():  # every cut pairs nodes, so two steps return to the start
        partner = dict(zip(src.tolist(), dst.tolist(), strict=True))
        assert all(partner[partner[node]] == node for node in partner)


@given(domains=DOMAINS, rails=RAILS)
def test_incast_victim_is_separate_from_senders(domains: int, rails: int) -> None:
    topology = fabric(domains, rails)
    try:
        schedules = made("incast", topology)
    except Unable:
        assert (domains - 1) * rails < 2
        return
    phases = {phase.label: phase for phase in exchanges(schedules)}
    assert any(label.startswith("senders=") for label in phases)
    for label, phase in phases.items():
        kind, _, k = label.partition("=")
        assert np.all(topology.nodes[phase.src] != topology.nodes[phase.dst])
        if kind == "victim":
            assert len(phase.src) == 1
            crowd = phases[f"senders={k}"]
            assert (crowd.src[-1], crowd.dst[-1]) == (phase.src[0], phase.dst[0])
            continue
        to_target = phase.src[phase.dst == 0]
        assert len(set(to_target.tolist())) == len(to_target) == int(k)
        assert len(phase.src) - len(to_target) in (0, 1)
        if len(phase.src) > len(to_target):
            assert not {int(phase.src[-1]), int(phase.dst[-1])} & {0, *to_target.tolist()}
        assert sorted(phase.recv_offset[phase.dst == 0].tolist()) == [4096 * n for n in range(int(k))]


@given(domains=DOMAINS, rails=st.integers(2, 16), op=st.sampled_from(["all_reduce", "all_to_all"]))
def test_rail_groups_runs_each_rail_alone_then_all(domains: int, rails: int, op: str) -> None:
    topology = fabric(domains, rails)
    found = [one.phases[0] for one in made("rail_groups", topology, nbytes=1 << 16, op=op)]
    phases = [phase for phase in found if isinstance(phase, Collective)]
    assert [phase.label for phase in phases] == [*(f"rail={r}" for r in range(rails)), "all"]
    for phase in phases:
        for ranks in phase.groups:
            assert len(set(topology.rails[ranks].tolist())) == 1
            assert len(ranks) == domains
    assert sorted(np.ravel(phases[-1].groups)) == list(range(domains * rails))


@given(domains=st.integers(2, 8), rails=st.integers(2, 8), hot=st.integers(0, 7))
def test_rail_hot_multiplies_bytes_to_one_rail(domains: int, rails: int, hot: int) -> None:
    topology = fabric(domains, rails)
    if hot >= rails:
        with pytest.raises(Unable, match=f"no rank is on rail {hot}"):
            made("rail_hot", topology, rail=hot)
        return
    for one, factor in zip(made("rail_hot", topology, rail=hot), (1, 2, 4), strict=True):
        phase = one.phases[0]
        assert isinstance(phase, AllToAllV)
        received = phase.rows[0].sum(axis=0) / topology.world_size
        assert np.array_equal(received, np.where(topology.rails == hot, factor, 1))


@pytest.mark.parametrize("pattern", [name for name in FABRIC if name != "pairs"])
def test_8192_ranks_build_or_are_refused(pattern: str) -> None:
    topology = fabric(1024, 8, per_leaf=32)
    if pattern == "rail_hot":
        with pytest.raises(Unable, match="8192 are more than 4096"):
            made(pattern, topology, nbytes=1 << 20)
        return
    for one in made(pattern, topology, nbytes=1 << 20):
        for phase in one.phases:
            arrays = [phase.groups] if isinstance(phase, Collective) else [phase.src, phase.dst, phase.nbytes]  # type: ignore[union-attr]
            assert sum(array.nbytes for array in arrays) < 1 << 20


@given(domains=DOMAINS, rails=RAILS)
def test_domain_straddle_keeps_group_size_and_splits_groups(domains: int, rails: int) -> None:
    topology = fabric(domains, rails)
    try:
        schedules = made("domain_straddle", topology)
    except Unable:
        assert domains % 2 or rails % 2
        return
    for one in schedules:
        phase = one.phases[0]
        assert isinstance(phase, Collective)
        assert phase.groups.shape == (domains, rails)
        split = int(phase.label.partition("=")[2])
        for ranks in phase.groups:
            in_each = Counter(topology.domains[ranks].tolist())
            assert (len(in_each), set(in_each.values())) == (split, {rails // split})


@pytest.mark.parametrize("pattern", FABRIC)
@given(domains=st.integers(2, 16), rails=st.integers(1, 8), seed=st.integers(0, 5))
def test_rounds_are_deterministic(pattern: str, domains: int, rails: int, seed: int) -> None:
    topology = fabric(domains, rails, per_leaf=2)
    params = {"seed": seed} if "seed" in load_pattern(pattern).params.__struct_fields__ else {}
    try:
        once, again = (made(pattern, topology, **params) for _ in range(2))
    except Unable:
        return
    assert [one.phases[0].label for one in once] == [one.phases[0].label for one in again]
    for a, b in zip(exchanges(once), exchanges(again), strict=True):
        assert np.array_equal(a.src, b.src)
        assert np.array_equal(a.dst, b.dst)


@pytest.mark.parametrize("pattern", FABRIC)
def test_every_pattern_has_an_op_with_factor_or_none(pattern: str) -> None:
    ops = {one.op for one in made(pattern, fabric(4, 2, per_leaf=2))}
    assert len(ops) == 1
    assert all(op is None or bus_factor(op, 8) > 0 for op in ops)


def test_the_order_of_rounds_is_random_and_seeded() -> None:
    orders = {tuple(one.phases[0].label for one in made("same_rail", fabric(8, 1), seed=seed)) for seed in range(5)}
    assert len(orders) > 1


@pytest.mark.parametrize("pattern", FABRIC)
def test_one_node_is_refused_with_the_requirement(pattern: str) -> None:
    with pytest.raises(Unable, match=f"{pattern} needs [24] nodes .NVLink domains.; this job has 1"):
        made(pattern, Topology.single_node(4))


@pytest.mark.parametrize("pattern", FABRIC)
def test_nodes_that_share_nvlink_are_one_domain(pattern: str) -> None:
    with pytest.raises(Unable, match="this job has 1, whose 3 nodes share NVLink"):
        made(pattern, fabric(3, 2, trays=3))


@pytest.mark.parametrize("pattern", FABRIC)
def test_uneven_nodes_are_named(pattern: str) -> None:
    hosts = ["a", "a", "b", "b", "c", "c", "d"]
    with pytest.raises(Unable, match="uneven here: a 2, b 2, c 2, d 1"):
        made(pattern, Topology.from_hosts(hosts))


@pytest.mark.parametrize("pattern", ["cross_rail", "rail_groups", "rail_hot"])
def test_one_rail_is_refused(pattern: str) -> None:
    with pytest.raises(Unable, match=f"{pattern} needs 2 rails.*; this job has 1"):
        made(pattern, fabric(2, 1))


def test_nodes_on_other_rails_are_named() -> None:
    topology = Topology(
        nodes=np.array([0, 0, 1, 1]),
        domains=np.array([0, 0, 1, 1]),
        rails=np.array([0, 1, 0, 2]),
        sites=np.zeros(4, np.int64),
        node_names=("a", "b"),
    )
    with pytest.raises(Unable, match=r"b has its ranks on rails \[0, 2\], a on \[0, 1\]"):
        made("same_rail", topology)


@pytest.mark.parametrize("pattern", FABRIC)
def test_size_below_one_element_is_refused(pattern: str) -> None:
    with pytest.raises(Unable, match="3 bytes"):
        made(pattern, Topology.single_node(2), nbytes=3)


@given(data=st.data())
def test_split_round_keeps_flows_and_separates_directions(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(2, 20))
    dst = np.array(data.draw(st.permutations(range(ranks))))
    moves = dst != np.arange(ranks)
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=ranks, max_size=ranks))) & moves
    if not kept.any():
        return
    whole = Round("r", np.arange(ranks)[kept], dst[kept])
    parts = split_directions(whole)
    assert len(parts) <= 3
    flows = [pair for part in parts for pair in zip(part.src.tolist(), part.dst.tolist(), strict=True)]
    assert sorted(flows) == sorted(zip(whole.src.tolist(), whole.dst.tolist(), strict=True))
    for part in parts:
        assert not set(part.src.tolist()) & set(part.dst.tolist())


def test_round_with_two_sends_per_rank_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="sends and receives once"):
        split_directions(Round("r", np.array([0, 0]), np.array([1, 2])))


@given(values=st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_occurrence_numbers_count_earlier_equals(values: list[int]) -> None:
    assert occurrence_numbers(np.array(values)).tolist() == [values[:k].count(value) for k, value in enumerate(values)]


# Runs on threads.

WORLDS = [(1, 1), (2, 1), (5, 1), (4, 2), (2, 4), (2, 2), (8, 1)]


def measure(pattern: str, topology: Topology, settings: Settings, **case: object) -> Measurement:
    made_case = Case(pattern=pattern, nbytes=512, **case)  # type: ignore[arg-type]
    measured = play(topology.world_size, lambda transport: run_case(made_case, transport, topology, settings))[0]
    assert measured is not None
    return measured


@pytest.mark.parametrize("pattern", FABRIC)
@pytest.mark.parametrize(("nodes", "rails"), WORLDS)
def test_every_pattern_is_correct_or_skipped_on_threads(pattern: str, nodes: int, rails: int) -> None:
    topology = fabric(nodes, rails, per_leaf=2)
    record = measure(pattern, topology, Settings(iterations=6, warmup=1)).record
    why: str | None = None
    try:
        schedules = made(pattern, topology, nbytes=512)
    except Unable as unable:
        why = str(unable)
    assert (record.status, record.reason) == ("skipped" if why else "ok", why)
    if why:
        return
    assert (record.wrong, record.variants) == (0, len(schedules))
    assert {phase.label for phase in record.phases} == {one.phases[0].label for one in schedules}


@pytest.mark.parametrize("pattern", FABRIC)
def test_every_pattern_runs_on_some_world(pattern: str) -> None:
    able = []
    for nodes, rails in WORLDS:
        try:
            able.append(made(pattern, fabric(nodes, rails, per_leaf=2)))
        except Unable:
            continue
    assert able


@pytest.mark.parametrize("pattern", [*FLOWS, "incast"])
def test_every_flow_has_its_own_result(pattern: str) -> None:
    topology = fabric(4, 2, per_leaf=2)
    measurement = measure(pattern, topology, Settings(iterations=40, warmup=1))
    samples = measurement.samples
    assert samples is not None
    for phase, one in zip(measurement.record.phases, made(pattern, topology, nbytes=512), strict=True):
        (wire,) = exchanges((one,))
        assert phase.flows is not None
        assert phase.flows.src == wire.src.tolist()
        assert phase.flows.dst == wire.dst.tolist()
        assert set(phase.flows.nbytes) == {512}
        seconds = samples.seconds_RNK[:, :, samples.labels.index(phase.label)]
        seconds = seconds[:, ~np.isnan(seconds[0])]
        for k, (a, b) in enumerate(zip(wire.src, wire.dst, strict=True)):
            assert phase.flows.p50_us[k] == pytest.approx(np.median(np.maximum(seconds[a], seconds[b])) * 1e6)
            assert phase.flows.send_p50_us[k] == pytest.approx(np.median(seconds[a]) * 1e6)
            assert phase.flows.recv_p50_us[k] == pytest.approx(np.median(seconds[b]) * 1e6)


def test_flows_of_a_single_round_are_reported() -> None:
    record = measure("same_rail", fabric(2, 2), Settings(iterations=6)).record
    assert record.variants == 1
    assert record.phases[0].flows is not None
    assert record.phases[0].flows.src == [0, 1, 2, 3]


def test_ambiguous_flows_are_not_reported() -> None:
    record = measure("same_rail", fabric(4, 1), Settings(iterations=6), timing=Timing.PIPELINED).record
    assert [phase.flows for phase in record.phases] == [None] * 3


def test_groups_of_each_phase_are_reported() -> None:
    record = measure("rail_groups", fabric(2, 2), Settings(iterations=6)).record
    groups = {phase.label: [g.ranks for g in phase.groups or []] for phase in record.phases}
    assert groups == {"rail=0": [[0, 2]], "rail=1": [[1, 3]], "all": [[0, 2], [1, 3]]}
    assert record.groups == []


@pytest.mark.parametrize("mode", ["pxn", "spine", "crossnic0"])
def test_threads_support_every_cross_rail_mode(mode: str) -> None:
    record = measure("cross_rail", fabric(2, 2), Settings(iterations=6), params={"mode": mode}).record
    assert record.status == "ok"


# Minimum times: 8 Gbit/s is 1e9 bytes per second.


def minimum_times(pattern: str, topology: Topology, **params: object) -> dict[str, float | None]:
    return {
        one.phases[0].label: minimum_seconds(one.phases[0], topology, 4, aligned=one.aligned)
        for one in made(pattern, topology, nbytes=1000, **params)
    }


def test_flow_on_a_rail_is_limited_by_its_nic() -> None:
    assert set(minimum_times("same_rail", fabric(4, 2, per_leaf=4)).values()) == {1e-6}


@pytest.mark.parametrize(("mode", "seconds"), [("spine", 4e-6), ("pxn", 1e-6), ("crossnic0", 1e-6)])
def test_minimum_time_counts_flows_per_uplink(mode: str, seconds: float) -> None:
    """4 nodes under one leaf per rail, with uplinks as fast as a NIC."""
    assert set(minimum_times("cross_rail", fabric(4, 2, per_leaf=4), mode=mode).values()) == {seconds}


def test_incast_is_limited_by_the_receiving_nic() -> None:
    found = minimum_times("incast", fabric(8, 1, per_leaf=8))
    assert (found["senders=2"], found["senders=4"]) == (2e-6, 4e-6)
    assert found["victim=2"] == 1e-6


def test_no_rates_give_no_minimum_time() -> None:
    assert set(minimum_times("same_rail", fabric(4, 2)).values()) == {None}
    assert set(minimum_times("same_rail", fabric(4, 2, per_leaf=4, gbit_per_s=np.nan)).values()) == {None}


def test_record_has_minimum_time_and_its_share() -> None:
    (phase,) = measure("same_rail", fabric(2, 1, per_leaf=2), Settings(iterations=6)).record.phases
    assert phase.bound_us == pytest.approx(0.512)
    assert phase.bound_gb_per_s == pytest.approx(1.0)
    assert phase.time_us is not None
    assert phase.share_of_bound == pytest.approx(0.512 / phase.time_us.p50)
