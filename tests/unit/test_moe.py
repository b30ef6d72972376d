"""MoE dispatch and combine on threads: bitwise right in every variant, wrong where something was done wrong."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ncclbench.buffers import Buffers
from ncclbench.cli.run import command
from ncclbench.errors import EnvironmentFault, Unable, UsageError
from ncclbench.measure import case as case_room
from ncclbench.measure.case import build_variants, memory_needed, run_case
from ncclbench.plan import Settings
from ncclbench.schedule import AllToAllV, Case, RowKernel, RowPlan, RowWork, Schedule, Timing
from ncclbench.schedule.experts.control import equal_rows
from ncclbench.schedule.experts.rows import Placement
from ncclbench.schedule.phases import Collective, Ints, SimplePhase, flatten
from ncclbench.schedule.rowformats import FORMATS, bf16_to_float, float_to_bf16
from ncclbench.store.records import Record
from ncclbench.topology import Link, Topology
from ncclbench.transports.base import Program, Step
from ncclbench.transports.threads import ThreadTransport, play, received

QUICK = Settings(iterations=2, warmup=1)
ONCE = Settings(iterations=1, warmup=0)
SMALL: dict[str, Any] = {"hidden": 32, "tokens": "12", "experts": 16, "top_k": 4, "routings": 2}
WORLD_SIZES = (1, 2, 5, 8)
ROUTINGS = ["uniform", "zipf:1.5", "hot-rank:0.7"]


def case_of(**params: Any) -> Case:
    return Case(pattern="moe_dispatch", nbytes=64, dtype="bfloat16", params={**SMALL, **params})


def shape_for(ranks: int) -> str:
    return f"{ranks // 2}x2" if ranks % 2 == 0 else f"{ranks}x1"


def variants_for(ranks: int) -> list[dict[str, Any]]:
    return [
        {"variant": "flat"},
        {"variant": "flat", "dedup": "selection"},
        {"variant": "cached"},
        {"variant": "padded"},
        {"variant": "control"},
        {"variant": "hierarchical", "placement": shape_for(ranks)},
        {"variant": "flat", "quad": True},
        {"variant": "hierarchical", "placement": shape_for(ranks), "quad": True},
    ]


def run(case: Case, ranks: int, topology: Topology | None = None, settings: Settings = QUICK) -> Record:
    where = topology or Topology.single_node(ranks)
    measured = play(ranks, lambda transport: run_case(case, transport, where, settings))[0]
    assert measured is not None
    return measured.record


VARIANTS = [params for params in variants_for(2) if not params.get("quad")]


def cases_of(ranks: int, routing: str) -> Iterator[dict[str, Any]]:
    """Every variant in every format; scales and the backward twins, which are independent, change from case to case."""
    w, r = WORLD_SIZES.index(ranks), ROUTINGS.index(routing)
    known = [params for params in variants_for(ranks) if not params.get("quad")]
    for (v, params), (f, form) in product(enumerate(known), enumerate(FORMATS)):
        found = {**params, "routing": routing, "format": form, "routings": 1}
        if params["variant"] != "control":
            found["quad"] = (r + w // 2 + f) % 2 == 1
            if form != "bf16":
                found["scales"] = ("packed", "separate")[(r + w + v) % 2]
        yield found


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("ranks", WORLD_SIZES)
def test_every_variant_and_format_is_right_to_the_bit(ranks: int, routing: str) -> None:
    for params in cases_of(ranks, routing):
        record = run(case_of(**params), ranks, settings=ONCE)
        assert (record.status, record.wrong, record.tolerance) == ("ok", 0, 0.0), record.case


def test_the_cases_above_leave_nothing_out() -> None:
    """Every variant, format and routing at every world size; every pair of those with scales and with quad."""
    cases = [(ranks, routing, case) for ranks, routing in product(WORLD_SIZES, ROUTINGS)
             for case in cases_of(ranks, routing)]  # fmt: skip
    dimensions = Counter[tuple[Any, ...]]()
    pairs = set()
    for ranks, routing, case in cases:
        variant = (case["variant"], case.get("dedup", "rank"))
        dimensions[ranks, routing, variant, case["format"]] += 1
        if variant[0] != "control":
            both = (case["quad"], case.get("scales", "packed"))
            pairs |= {(place, what, *both) for place, what in enumerate((ranks, routing, variant, case["format"]))}
    assert len(dimensions) == dimensions.total() == len(WORLD_SIZES) * len(ROUTINGS) * len(VARIANTS) * len(FORMATS)
    seen = len(WORLD_SIZES) + len(ROUTINGS) + len(VARIANTS) - 1 + len(FORMATS)
    assert len(pairs) == 4 * seen - 2  # bf16 has no scales to separate


@pytest.mark.parametrize("ranks", WORLD_SIZES)
def test_fractional_weights_are_right_within_a_tolerance_that_is_said(ranks: int) -> None:
    for params in variants_for(ranks):
        if params["variant"] == "control":
            continue
        record = run(case_of(**params, weights="float", routings=1), ranks, settings=ONCE)
        assert (record.status, record.wrong) == ("ok", 0), record.reason
        assert record.tolerance is not None
        assert 0 < record.tolerance < 0.02
        assert any("fractional weights" in note for note in record.notes)


@pytest.mark.parametrize(
    "params",
    [
        {"tokens": "5,0,9,1", "uneven": 0.0},
        {"uneven": 1.0, "routings": 5},
        {"experts": 10},
        {"experts": 3, "top_k": 3},
        {"top_k": 1},
        {"experts": 40, "top_k": 32},
        {"hidden": 176, "format": "fp8"},
        {"ep": 2},
        {"ep": 1},
    ],
    ids=str,
)
def test_odd_shapes_are_right_too(params: dict[str, Any]) -> None:
    for variant in variants_for(2 if "ep" in params else 4):
        if "ep" in params and "placement" in variant:
            variant["placement"] = "1x2" if params["ep"] == 2 else "1x1"
        record = run(case_of(**{"routings": 1, **variant, **params}), 4, settings=ONCE)
        assert (record.status, record.wrong) == ("ok", 0), (record.case, record.reason)


@pytest.mark.parametrize("timing", [Timing.ISOLATED, Timing.PIPELINED])
def test_both_host_regimes(timing: Timing) -> None:
    case = replace_timing(case_of(), timing)
    record = run(case, 4, settings=Settings(iterations=5, warmup=2))
    assert (record.status, record.variants) == ("ok", 2)
    assert bool(record.subtotals) == (timing is Timing.ISOLATED)


def replace_timing(case: Case, timing: Timing) -> Case:
    return Case(pattern=case.pattern, nbytes=case.nbytes, dtype=case.dtype, timing=timing, params=case.params)


# Mutations. Each is what a faulty library, kernel or bookkeeping would do, put where it would happen; the schedule's
# expectations stay as they were.

Spoil = Callable[["Spoiler", int], None]


class Spoiler(ThreadTransport):
    """Does what threads do, and on its victim something more after the phases whose label begins with `after`."""

    def __init__(self, real: ThreadTransport, after: str, spoil: Spoil, victim: int) -> None:
        super().__init__(real.world, real.rank)
        self.after, self.spoil, self.victim = after, spoil, victim
        self.memory: dict[tuple[int, str], NDArray[Any]] = {}
        self.harm = 0
        self.buffers: Buffers
        self.phase: SimplePhase

    def compile(self, schedule: Schedule, buffers: Buffers) -> Program:
        program, number = super().compile(schedule, buffers), self._programs
        steps = [
            Step(step.label, self._spoiled(step, phase, buffers, number))
            if self.rank == self.victim and step.label.startswith(self.after)
            and not step.label.endswith("_bwd") else step
            for step, phase in zip(program.steps, flatten(schedule.phases), strict=True)
        ]  # fmt: skip
        return Program(tuple(steps))

    def _spoiled(self, step: Step, phase: SimplePhase, buffers: Buffers, number: int) -> Callable[[], None]:
        def launch() -> None:
            step.launch()
            self.buffers, self.phase = buffers, phase
            before = buffers[phase.write].copy()
            self.spoil(self, number)
            self.harm += int(np.count_nonzero(before != buffers[phase.write]))

        return launch

    @property
    def arrived(self) -> NDArray[np.uint8]:
        """The rows that came in the all-to-all just over, shape (n, bytes)."""
        phase = self.phase
        assert isinstance(phase, AllToAllV)
        group, member = (int(x) for x in np.argwhere(phase.groups == self.rank)[0])
        rows = int(phase.rows[group, :, member].sum())
        return self.buffers[phase.write][: rows * phase.row_bytes].reshape(rows, phase.row_bytes)


def drop_row(spoiler: Spoiler, _number: int) -> None:
    rows = spoiler.arrived
    rows[:-1] = rows[1:].copy()


def double_row(spoiler: Spoiler, _number: int) -> None:
    rows = spoiler.arrived
    rows[1:] = rows[:-1].copy()


def lose_row(spoiler: Spoiler, _number: int) -> None:
    spoiler.arrived[-1] = 0xA5


def stay_stale(spoiler: Spoiler, number: int) -> None:
    """What arrived when this program ran first is still there later."""
    rows = spoiler.arrived
    rows[:] = spoiler.memory.setdefault((number, spoiler.phase.label), rows.copy())


def wrong_weight(spoiler: Spoiler, _number: int) -> None:
    weights = spoiler.arrived.view(np.float32)
    weights[0, 1] *= 2


def wrong_expert(spoiler: Spoiler, _number: int) -> None:
    """The first choice of the first row says another expert."""
    spoiler.arrived.view(np.int32)[0, 0] ^= 1


def flip_bit(spoiler: Spoiler, _number: int) -> None:
    spoiler.buffers[spoiler.phase.write][3] ^= 1


def named(value: Any) -> str:
    """The id of a test's parameter."""
    if isinstance(value, dict):
        return "-".join(map(str, value.values()))
    return str(getattr(value, "__name__", value))


ALL: list[dict[str, Any]] = [
    {"variant": "flat"},
    {"variant": "flat", "dedup": "selection"},
    {"variant": "flat", "format": "fp8", "scales": "separate"},
    {"variant": "flat", "format": "nvfp4"},
    {"variant": "cached"},
    {"variant": "padded", "format": "mxfp8"},
    {"variant": "control"},
    {"variant": "hierarchical", "placement": "2x2"},
    {"variant": "flat", "quad": True},
    {"variant": "hierarchical", "placement": "2x2", "quad": True, "format": "fp8"},
]
WITH_META = [params for params in ALL if params["variant"] != "control"]
MUTATIONS: list[tuple[dict[str, Any], str, Spoil]] = [
    *((params, "dispatch", spoil) for params in ALL for spoil in (drop_row, double_row, lose_row, stay_stale)),
    *(({"variant": "control"}, label, spoil) for label in ("control_dispatch", "control_combine")
      for spoil in (drop_row, double_row, lose_row, stay_stale)),
    *((params, "combine", spoil) for params in ALL for spoil in (drop_row, double_row, lose_row, stay_stale)),
    *((params, "dispatch_domain", spoil) for params in ALL if "placement" in params for spoil in (drop_row, lose_row)),
    *((params, "dispatch_rail_meta" if "placement" in params else "dispatch_meta", spoil)
      for params in WITH_META for spoil in (wrong_weight, wrong_expert, stay_stale)),
    *((params, label, flip_bit) for params in WITH_META for label in ("expert", "expert_reduce", "unpack", "pack")),
    ({"variant": "flat"}, "counts", flip_bit),
    ({"variant": "flat", "format": "fp8", "scales": "separate"}, "dispatch_scales", drop_row),
]  # fmt: skip


@pytest.mark.parametrize(
    ("params", "after", "spoil"),
    MUTATIONS,
    ids=lambda value: (
        value.__name__ if callable(value) else "-".join(map(str, value.values())) if isinstance(value, dict) else value
    ),
)
def test_what_goes_wrong_on_one_rank_is_found_there(params: dict[str, Any], after: str, spoil: Spoil) -> None:
    victim, harm = 2, [0] * 4

    def main(real: ThreadTransport) -> Any:
        spoiler = Spoiler(real, after, spoil, victim)
        measured = run_case(case_of(**params, routings=1), spoiler, Topology.single_node(4), ONCE)
        harm[real.rank] = spoiler.harm
        return measured

    measured = play(4, main)[0]
    assert harm[victim] > 0, "the mutation did nothing"
    assert measured.record.status == "wrong"
    assert victim in measured.record.wrong_ranks


@pytest.mark.parametrize("params", ALL, ids=named)
def test_the_same_harness_without_a_mutation_is_good(params: dict[str, Any]) -> None:
    def main(real: ThreadTransport) -> Any:
        idle = Spoiler(real, "dispatch", lambda *_: None, 2)
        return run_case(case_of(**params, routings=1), idle, Topology.single_node(4), ONCE)

    assert play(4, main)[0].record.status == "ok"


def mutated(monkeypatch: pytest.MonkeyPatch, change: Callable[[SimplePhase], SimplePhase]) -> None:
    """All schedules have their phases changed, and room for what a wrong phase writes."""
    original = build_variants

    def changed(case: Case, topology: Topology) -> tuple[Schedule, ...]:
        return tuple(
            replace(
                schedule,
                phases=tuple(change(phase) for phase in flatten(schedule.phases)),
                buffers={name: 4 * nbytes for name, nbytes in schedule.buffers.items()},
            )
            for schedule in original(case, topology)
        )

    monkeypatch.setattr(case_room, "build_variants", changed)


@pytest.mark.parametrize("verb", ["dispatch", "combine"])
@pytest.mark.parametrize(
    "params", [p for p in ALL if p["variant"] != "padded"], ids=lambda p: "-".join(map(str, p.values()))
)
def test_transposed_splits_are_found(monkeypatch: pytest.MonkeyPatch, params: dict[str, Any], verb: str) -> None:
    """Padded splits are all equal, so there is nothing to transpose."""
    done = []

    def transpose(phase: SimplePhase) -> SimplePhase:
        if isinstance(phase, AllToAllV) and phase.label.startswith(verb):
            turned = phase.rows.transpose(0, 2, 1)
            done.append(not np.array_equal(turned, phase.rows))
            return replace(phase, rows=turned)
        return phase

    mutated(monkeypatch, transpose)
    assert run(case_of(**{**SMALL, **params, "tokens": "13,2,30,7", "routings": 1}), 4, settings=ONCE).status == "wrong"
    assert any(done)


@pytest.mark.parametrize("params", WITH_META, ids=named)
def test_two_experts_swapped_are_found(monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]) -> None:
    """Expert 4 computes what is for 5, and 5 what is for 4; nothing is lost and nothing is doubled."""

    def swap(phase: SimplePhase) -> SimplePhase:
        if isinstance(phase, RowWork) and phase.kernel is RowKernel.SCALE:
            plan = phase.plan

            def swapped(rank: int) -> RowPlan:
                found = plan(rank)
                exponents = np.where(rank == 1, 1 - found.exponents, found.exponents).astype(np.int8)
                return RowPlan(found.index, exponents)

            return replace(phase, plan=swapped)
        return phase

    mutated(monkeypatch, swap)
    record = run(case_of(**params, routings=1), 4, settings=ONCE)
    assert record.status == "wrong"
    assert 1 in record.wrong_ranks


def test_two_experts_whose_rows_change_places_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where both compute the same: rows of experts 4 and 6, which both double nothing."""

    def swap(phase: SimplePhase) -> SimplePhase:
        if isinstance(phase, RowWork) and phase.kernel is RowKernel.SCALE:
            plan = phase.plan
            return replace(phase, plan=lambda rank: RowPlan(plan(rank).index[::-1], plan(rank).exponents))
        return phase

    mutated(monkeypatch, swap)
    assert run(case_of(), 4).status == "wrong"


def test_ranks_that_drew_other_routings_are_named() -> None:
    def main(real: ThreadTransport) -> Any:
        case = case_of(seed=1 if real.rank == 2 else 0)
        with pytest.raises(EnvironmentFault, match="ranks 2 drew another routing than rank 0"):
            run_case(case, real, Topology.single_node(4), QUICK)

    play(4, main)


# The ledger against what was seen on the wire.


class Wire(ThreadTransport):
    """Counts the bytes of every pair in every phase as they are read from the other rank's buffer."""

    def __init__(self, real: ThreadTransport, seen: Counter[tuple[str, int, int]]) -> None:
        super().__init__(real.world, real.rank)
        self.seen = seen

    def compile(self, schedule: Schedule, buffers: Buffers) -> Program:
        program = super().compile(schedule, buffers)
        steps = [
            Step(step.label, self._counted(step, phase))
            for step, phase in zip(program.steps, flatten(schedule.phases), strict=True)
        ]
        return replace(program, steps=tuple(steps))

    def _counted(self, step: Step, phase: SimplePhase) -> Callable[[], None]:
        def launch() -> None:
            if isinstance(phase, AllToAllV | Collective):
                self._note(phase)
            step.launch()

        return launch

    def _note(self, phase: AllToAllV | Collective) -> None:
        """Play the phase on buffers whose every byte is the name of the rank that has it."""
        group = next(list(map(int, ranks)) for ranks in phase.groups if self.rank in ranks)
        named = {rank: np.full(self.capacity, rank, np.uint8) for rank in group}
        arrived = np.concatenate([values for _, values in received(phase, self.rank, group, named, 1)])
        for rank in group:
            count, key = int(np.count_nonzero(arrived == rank)), (phase.label, rank, self.rank)
            assert self.seen.setdefault(key, count) == count  # every launch moves the same

    capacity = 1 << 17


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    tokens=st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any),
    params=st.sampled_from([p for p in ALL if not p.get("quad")]),
    routing=st.sampled_from(ROUTINGS),
)
def test_the_ledger_counts_what_is_on_the_wire(
    seed: int, tokens: list[int], params: dict[str, Any], routing: str
) -> None:
    case = case_of(**params, seed=seed, tokens=",".join(map(str, tokens)), routing=routing, routings=1)
    seen: Counter[tuple[str, int, int]] = Counter()
    once = Settings(iterations=1, warmup=0, check=False)
    topology = Topology.from_hosts(["x", "x", "y", "y"])
    if "placement" in params:
        case = case_of(**{**case.params, "placement": "2x2"})
    measured = play(4, lambda real: run_case(case, Wire(real, seen), topology, once))[0]
    assert measured is not None
    for phase in measured.record.phases:
        by_link = Counter[str]()
        for (label, src, dst), nbytes in seen.items():
            if label == phase.label:
                by_link[Link(int(topology.link_classes(src, dst))).label] += nbytes
        assert {k: v for k, v in phase.ledger["sent_bytes"].items() if v} == dict(by_link), phase.label
    check_the_matrices(case, measured.record, seen)


def check_the_matrices(case: Case, record: Record, seen: Counter[tuple[str, int, int]]) -> None:
    """Rows that the record names are the rows of that phase on the wire."""
    facts, variant = record.facts[0], case.params["variant"]
    if variant in ("padded", "control"):
        return
    basis, label = ("rank_dedup", "dispatch") if case.params.get("dedup") != "selection" else ("selection", "dispatch")
    if variant == "hierarchical":
        basis, label = "domain_dedup", "dispatch_rail"
    row_bytes = facts["row_bytes"]
    if case.params.get("scales") == "separate":
        row_bytes = case.params["hidden"]
    for src, dst in product(range(4), repeat=2):
        assert facts["rows"][basis][0][src][dst] * row_bytes == seen[label, src, dst]


def test_hierarchical_sends_each_token_once_to_a_domain() -> None:
    topology = Topology.from_hosts(["x", "x", "y", "y"])
    params = {"tokens": "40", "experts": 32, "top_k": 8, "routings": 1}
    flat, rail = (run(case_of(**params, variant=v), 4, topology) for v in ("flat", "hierarchical"))
    facts = flat.facts[0]
    assert facts["routing_sha256"] == rail.facts[0]["routing_sha256"]
    tokens_to_other_domain = sum(facts["rows"]["domain_dedup"][0][s][d] for s, d in [(0, 2), (1, 3), (2, 0), (3, 1)])
    assert 0 < tokens_to_other_domain <= 160

    def crossing(record: Record, label: str) -> int:
        sent = next(phase.ledger["sent_bytes"] for phase in record.phases if phase.label == label)
        return int(sent["same_rail"] + sent["cross_rail"])

    assert crossing(rail, "dispatch_rail") == tokens_to_other_domain * 64
    assert crossing(rail, "dispatch_domain") == 0
    assert crossing(flat, "dispatch") > 1.5 * crossing(rail, "dispatch_rail")


# What the record says.


def test_the_record_of_a_flat_dispatch() -> None:
    record = run(case_of(routing="zipf:1.5"), 4, settings=Settings(iterations=8, warmup=1))
    labels = ["counts", "splits", "pack", "dispatch", "pack_meta", "dispatch_meta", "expert", "expert_reduce",
              "combine", "unpack"]  # fmt: skip
    assert [phase.label for phase in record.phases] == labels
    assert all(phase.time_us is not None for phase in record.phases)
    assert record.subtotals["dispatch"].labels == labels[:8]
    assert record.subtotals["combine"].labels == labels[8:]
    assert record.subtotals["comm_only"].labels == ["dispatch", "combine"]
    assert record.subtotals["roundtrip"].time_us.p50 > record.subtotals["comm_only"].time_us.p50
    assert len(record.facts) == record.variants == 2
    facts = record.facts[0]
    assert facts["max_vio"] > 0.5
    assert facts["max_over_mean_received"] > 1
    assert facts["over_capacity"] > 0
    assert len(facts["routing_sha256"]) == 64
    dispatch = record.phases[3].ledger
    assert dispatch["links"]["node"]["bottleneck_bytes"] == dispatch["bottleneck_bytes"]
    bases = [fact["bases"]["rank_dedup"] for fact in record.facts]
    assert dispatch["bottleneck_bytes"] == sum(base["bottleneck_bytes"] for base in bases)
    assert dispatch["sent_bytes"]["node"] == sum(base["remote_bytes"] for base in bases)
    assert record.comparable["deepep_dispatch"].over == "dispatch"
    assert "its own included" in record.comparable["deepep_dispatch"].definition


def test_deepep_counts_the_ranks_own_rows_and_we_do_not() -> None:
    record = run(case_of(routings=1), 2)
    rows = np.array(record.facts[0]["rows"]["rank_dedup"][0])
    assert record.comparable["deepep_dispatch"].bytes == rows.sum(axis=0).max() * 64
    assert record.facts[0]["bases"]["rank_dedup"]["bottleneck_bytes"] == max(rows[0, 1], rows[1, 0]) * 64


def test_padding_is_reported_and_control_moves_the_same_bytes_in_equal_splits() -> None:
    params = {"routing": "zipf:1.5", "routings": 2, "tokens": "50"}
    flat, padded, control = (run(case_of(**params, variant=v), 4) for v in ("flat", "padded", "control"))
    for fact in padded.facts:
        rows = np.array(fact["rows"]["rank_dedup"])
        assert fact["padding_ratio"] == pytest.approx(fact["padded_to"] * 16 / rows.sum())
        assert fact["padded_to"] >= rows.max()
    assert [phase.label for phase in control.phases] == ["dispatch", "combine", "control_dispatch", "control_combine"]
    moved = [sum(p.ledger["sent_bytes"].values()) for p in (flat.phases[3], *control.phases[:3:2])]
    assert moved[0] == moved[1] == moved[2]
    busiest = [phase.ledger["bottleneck_bytes"] for phase in control.phases]
    assert busiest[0] > 1.1 * busiest[2]
    penalty = control.subtotals["comm_only"].time_us.p50 / control.subtotals["control_comm_only"].time_us.p50
    assert control.ratios == {"skew_penalty": pytest.approx(penalty)}
    assert control.variants == 4
    assert len(control.facts) == 2
    assert flat.ratios == {}


@given(st.integers(1, 9), st.integers(0, 400))
def test_equal_splits_are_as_equal_as_whole_rows_can_be(members: int, total: int) -> None:
    matrix: Ints = np.zeros((members, members), np.int64)
    matrix[0, members - 1] = total
    rows = equal_rows(matrix)
    assert rows.sum() == total
    assert rows.max() - rows.min() <= 1
    for axis in (0, 1):
        sums = rows.sum(axis=axis)
        assert sums.max() - sums.min() <= 1


# Formats.


@pytest.mark.parametrize(("name", "nbytes"), [("bf16", 14336), ("fp8", 7392), ("mxfp8", 7392), ("nvfp4", 4032)])
def test_row_bytes_are_those_of_the_reference(name: str, nbytes: int) -> None:
    assert FORMATS[name].row_bytes(7168) == nbytes


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("hidden", [16, 176, 256])
def test_rows_are_decoded_to_what_they_were(name: str, hidden: int) -> None:
    form, rng = FORMATS[name], np.random.default_rng(0)
    codes = rng.integers(0, 5, (7, hidden), dtype=np.uint8)
    exponents = rng.integers(0, 2, (7, form.blocks(hidden)), dtype=np.uint8)
    payload, scales = form.encode(codes, exponents)
    assert payload.shape[1] == form.payload_bytes(hidden)
    assert scales.shape[1] == form.scale_bytes(hidden)
    expected = codes.astype(np.float32)
    if form.block:
        expected *= np.repeat(2.0 ** exponents.astype(np.float32), form.block, axis=1)[:, :hidden]
    assert np.array_equal(form.decode(payload, scales, hidden, form.tables()), expected)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50))
def test_rounding_to_bfloat16_is_to_the_nearest(values: list[float]) -> None:
    import ml_dtypes

    array = np.array(values, np.float32)
    assert np.array_equal(float_to_bf16(array), array.astype(ml_dtypes.bfloat16).view(np.uint16))
    assert np.array_equal(bf16_to_float(float_to_bf16(array)), array.astype(ml_dtypes.bfloat16).astype(np.float32))


# Placement.


def test_groups_take_as_many_domains_as_are_asked_for() -> None:
    two = Topology.from_hosts(["a"] * 4 + ["b"] * 4)
    placed = Placement.of(two, 4, "2x2")
    assert placed.groups.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert placed.domains.tolist() == [[0, 0, 1, 1]] * 2
    assert placed.assumed is None
    inside = Placement.of(two, 4, "4x1")
    assert inside.groups.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    alone = Placement.of(Topology.single_node(4), 4, "1x4")
    assert alone.domains.tolist() == [[0, 1, 2, 3]]
    assert alone.assumed == "1x4: this job is one domain, played as 4"


@pytest.mark.parametrize(
    ("ep", "shape", "error", "words"),
    [
        (3, "", Unable, "needs a multiple of 3 ranks; this job has 8"),
        (4, "4", UsageError, "RANKSxDOMAINS"),
        (4, "0x4", UsageError, "RANKSxDOMAINS"),
        (4, "2x3", UsageError, "is 6 ranks, and ep is 4"),
        (8, "2x4", Unable, "do not make groups of 4 domains"),
    ],
)
def test_an_impossible_placement_is_refused(ep: int, shape: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Placement.of(Topology.from_hosts(["a"] * 4 + ["b"] * 4), ep, shape)


def test_hierarchical_needs_equal_domains() -> None:
    record = run(case_of(variant="hierarchical"), 3, Topology.from_hosts(["a", "a", "b"]))
    assert record.status == "skipped"
    assert record.reason is not None
    assert "domains of equal size" in record.reason


# What is refused.


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"top_k": 17}, "top_k = 17 of 16 experts"),
        ({"tokens": "0"}, "tokens are 0 on every rank"),
        ({"tokens": "0,0,0,0"}, "tokens are 0 on every rank"),
        ({"tokens": "many"}, "whole number, or one for each rank"),
        ({"tokens": "-3"}, "whole number"),
        ({"tokens": str(1 << 25)}, "at most 16777216"),
        ({"hidden": 20}, "multiple of 16"),
        ({"format": "fp4"}, "no row format 'fp4'; there are: bf16, fp8, mxfp8, nvfp4"),
        ({"scales": "separate"}, "bf16 rows have no scales"),
        ({"routing": "random"}, "no routing 'random'"),
        ({"routings": 0}, "routings must be 1 to 256"),
        ({"uneven": 2}, "uneven must be from 0 to 1"),
        ({"capacity": 0}, "capacity must be positive"),
        ({"model": "gpt-5"}, "no model 'gpt-5'"),
        ({"variant": "flatt"}, "variant = 'flatt': it must be one of flat, hierarchical"),
        ({"variant": "padded", "dedup": "selection"}, "dedup = selection goes with"),
        ({"variant": "control", "quad": True}, "every variant but control"),
        ({"ep": -1}, "must not be negative"),
        ({"routing": "trace:/none.jsonl", "tokens": "5"}, "leave tokens and uneven away"),
        ({"routing": "trace:/none.jsonl", "tokens": ""}, "cannot read the trace"),
        ({"routing": "maxvio:100"}, "cannot be"),
    ],
)
def test_what_makes_no_sense_is_refused(params: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build_variants(case_of(**params), Topology.single_node(4))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"ep": 3}, "needs a multiple of 3 ranks"),
        ({"tokens": "1,2,3"}, "tokens has 3 numbers, and this job 4 ranks"),
        ({"experts": 64, "top_k": 40, "format": "fp8"}, "no values whose sums are exact"),
    ],
)
def test_what_cannot_run_here_is_skipped_with_the_reason(params: dict[str, Any], words: str) -> None:
    record = run(case_of(**params), 4)
    assert record.status == "skipped"
    assert record.reason is not None
    assert words in record.reason


def test_more_rows_than_an_int32_counts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import ncclbench.schedule.experts.parallel as room

    monkeypatch.setattr(room, "_MOST_ROWS", 10)
    with pytest.raises(Unable, match="more than 10 rows between two ranks"):
        build_variants(case_of(), Topology.single_node(2))


def test_a_graph_cannot_hold_counts_that_the_host_must_see() -> None:
    first = {v: build_variants(case_of(variant=v), Topology.single_node(2))[0].waits_for_host
             for v in ("flat", "hierarchical", "cached", "padded", "control")}  # fmt: skip
    assert first == {"flat": True, "hierarchical": True, "cached": False, "padded": False, "control": False}


def test_memory_is_that_of_the_busiest_rank_and_variant() -> None:
    topology = Topology.single_node(4)
    needed = memory_needed(case_of(variant="cached", routing="hot-rank:1.0", routings=3), topology)
    each = [
        s.memory_bytes for s in build_variants(case_of(variant="cached", routing="hot-rank:1.0", routings=3), topology)
    ]
    assert needed >= max(each) > memory_needed(case_of(variant="cached", routings=1), topology)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(command, list(args))


def test_the_command_line_of_the_readme(cli: Callable[..., Any]) -> None:
    done = cli("moe_dispatch", "--dry-run", "--nproc", "32", "--param", "model=deepseek-v3", "--param", "ep=32",
               "--param", "tokens=64", "--param", "routing=zipf:1.0")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "moe_dispatch/bfloat16/917504/isolated/ep=32/routing=zipf:1.0/tokens=64" in done.output


def test_sizes_and_types_are_not_for_the_command_line(cli: Callable[..., Any]) -> None:
    for flags in (("-b", "1K"), ("-e", "1K"), ("-f", "3"), ("--dtype", "float32")):
        done = cli("moe_dispatch", "--dry-run", "--nproc", "2", *flags)
        assert isinstance(done.exception, UsageError)
        assert "its parameters say how much is moved" in str(done.exception)


def test_too_much_memory_is_refused_before_anything_is_allocated(cli: Callable[..., Any]) -> None:
    params = ("tokens=1000", f"hidden={1 << 26}", "routings=1", "experts=8", "top_k=2")
    flags = [text for param in params for text in ("--param", param)]
    done = cli("moe_dispatch", "--transport", "threads", "--nproc", "2", *flags)
    assert isinstance(done.exception, UsageError)
    assert "is free" in str(done.exception)


def test_a_run_from_the_command_line_is_stored(cli: Callable[..., Any], tmp_path: Path) -> None:
    trace = tmp_path / "a.jsonl"
    trace.write_text("".join(
        json.dumps({"rank": r, "token": t, "experts": [r, t + 4]}) + "\n" for r in range(2) for t in range(3)
    ))  # fmt: skip
    done = cli("moe_dispatch", "--transport", "threads", "--nproc", "2", "-n", "6", "-w", "1", "-o", "run",
               "--param", "hidden=32", "--param", "experts=8", "--param", "top_k=2",
               "--param", f"routing=trace:{trace}")  # fmt: skip
    assert done.exit_code == 0, done.output
    (record,) = [json.loads(line) for line in Path("run/results.jsonl").read_text().splitlines()]
    assert (record["status"], record["wrong"], record["facts"][0]["tokens"]["total"]) == ("ok", 0, 6)
    assert Path("run", record["samples"]).exists()


@pytest.mark.parametrize("tokens", ["0,5", "5,0", "3,5"])
@pytest.mark.parametrize(
    "params",
    [{"experts": 70, "top_k": 65}, {"experts": 70, "top_k": 33, "format": "fp8"}, {"top_k": 65, "experts": 66}],
)
def test_too_many_choices_are_skipped_on_every_rank_also_where_there_is_no_token(
    tokens: str, params: dict[str, Any]
) -> None:
    case = case_of(tokens=tokens, hidden=128, routings=1, **params)
    with pytest.raises(Unable, match=f"top {params['top_k']}: no values"):
        memory_needed(case, Topology.single_node(2))  # also what a dry run asks
    record = run(case, 2)
    assert (record.status, record.wrong) == ("skipped", None)


def test_a_bad_parameter_names_its_case_among_many() -> None:
    case = case_of(tokens=8, routing="maxvio:0", routings=1)
    with pytest.raises(UsageError, match=r"^moe_dispatch/.*routing=maxvio:0.*: routing maxvio:0 is below"):
        build_variants(case, Topology.single_node(2))


def test_a_rank_that_is_unable_when_others_have_begun_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import ncclbench.schedule.experts.layer as room
    from ncclbench.schedule.experts.values import Values

    monkeypatch.setattr(room, "refuse_without_values", lambda _top_k, _format: None)
    honest = Values.numbers

    def unable(values: Values, rank_n: Any, tok_n: Any) -> Any:
        if len(rank_n):
            raise Unable("no values")
        return honest(values, rank_n, tok_n)

    monkeypatch.setattr(Values, "numbers", unable)
    with pytest.raises(RuntimeError, match="found to be impossible when other ranks had begun: no values"):
        run(case_of(tokens="0,5", routings=1), 2)
