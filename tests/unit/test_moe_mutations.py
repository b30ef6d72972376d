"""MoE dispatch and combine: wrong, and said to be, where something was done wrong."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ncclbench.buffers import Buffers
from ncclbench.errors import EnvironmentFault
from ncclbench.measure import case as case_room
from ncclbench.measure.case import build_variants, run_case
from ncclbench.schedule import AllToAllV, Case, RowKernel, RowPlan, RowWork, Schedule
from ncclbench.schedule.phases import SimplePhase, flatten
from ncclbench.topology import Topology
from ncclbench.transports.base import Program, Step
from ncclbench.transports.threads import ThreadTransport, play
from tests.moe_cases import ALL, ONCE, QUICK, SMALL, case_of, named, run

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
