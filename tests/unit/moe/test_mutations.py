"""MoE dispatch and combine with faults: each fault is detected on its rank."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ncclbench.buffers.arrays import Buffers
from ncclbench.errors import EnvironmentFault
from ncclbench.measure import case as case_module
from ncclbench.measure.case import run_case
from ncclbench.schedule import AllToAllV, Case, Collective, RowKernel, RowPlan, RowWork, Schedule
from ncclbench.schedule.pattern import build_variants
from ncclbench.schedule.phases import SimplePhase, flatten
from ncclbench.topology import Topology
from ncclbench.transports.base import Program, Step
from ncclbench.transports.threads import ThreadTransport, play
from tests.helpers.exhaustive import exhaustive_if
from tests.helpers.moe_cases import ALL, ONCE, QUICK, case_of, named, run

# Mutations. Each is the fault of a library, a kernel or the bookkeeping, at its real point in the run. The expected
# contents of the schedule stay unchanged.

Spoil = Callable[["Spoiler", int], None]


class Spoiler(ThreadTransport):
    """The threads transport with a mutation on the victim rank after the phase with label `after`."""

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
            if self.rank == self.victim and step.label == self.after else step
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
        """The rows received in the preceding all-to-all, shape (n, bytes)."""
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
    """The data received in the first run of this program remain in later runs."""
    rows = spoiler.arrived
    rows[:] = spoiler.memory.setdefault((number, spoiler.phase.label), rows.copy())


def wrong_weight(spoiler: Spoiler, _number: int) -> None:
    weights = spoiler.arrived.view(np.float32)
    weights[0, 1] *= 2


def wrong_expert(spoiler: Spoiler, _number: int) -> None:
    """The first choice of the first row names another expert."""
    spoiler.arrived.view(np.int32)[0, 0] ^= 1


def flip_bit(spoiler: Spoiler, _number: int) -> None:
    spoiler.buffers[spoiler.phase.write][3] ^= 1


def weigh_twice(spoiler: Spoiler, _number: int) -> None:
    """A sum is twice as large, as if the weights were not those of the tokens."""
    sums = spoiler.buffers[spoiler.phase.write].view(np.uint16)
    rows = spoiler.phase
    assert isinstance(rows, RowWork)
    first = sums[: rows.write_row // 2]
    first[first != 0] += 1 << 7


WITH_META = [params for params in ALL if params["variant"] != "control"]
ON_ROWS, ON_ENTRIES = (drop_row, double_row, lose_row, stay_stale), (wrong_weight, wrong_expert)


def kind_of(phase: SimplePhase) -> str:
    """The kind of a phase: payload, metadata, scales or counts on the wire, or a kernel."""
    if isinstance(phase, AllToAllV):
        return next((kind for kind in ("meta", "scales") if phase.label.endswith(kind)), "payload")
    assert isinstance(phase, RowWork | Collective)
    return str(phase.kernel) if isinstance(phase, RowWork) else "counts"


SPOILS: dict[str, tuple[Spoil, ...]] = {
    "payload": ON_ROWS,
    "scales": ON_ROWS,
    "meta": (*ON_ROWS, *ON_ENTRIES),
    "counts": (flip_bit,),
    "take": (flip_bit,),
    "scale": (flip_bit,),
    "sum": (flip_bit, weigh_twice),
    "to_host": (),  # it does not change its buffer
}
"""The mutations of each kind of phase."""


def labels_of(params: dict[str, Any]) -> dict[str, str]:
    """The kind of each phase of a variant by its label, backward phases included."""
    schedules = build_variants(case_of(**params, routings=1), Topology.single_node(4))
    return {phase.label: kind_of(phase) for schedule in schedules for phase in flatten(schedule.phases)}


# The fast suite: a variant that has every kind of phase, and the control.
FEW = [ALL[2], ALL[6]]


@pytest.mark.parametrize("params", exhaustive_if(lambda params: params not in FEW, ALL), ids=named)
@pytest.mark.parametrize("spoil", sorted({s for spoils in SPOILS.values() for s in spoils}, key=named), ids=named)
def test_fault_in_one_phase_is_found_on_its_rank(params: dict[str, Any], spoil: Spoil) -> None:
    """Each phase by itself: payload is lost while its metadata is intact, and vice versa."""
    victim, labels = 2, [label for label, kind in labels_of(params).items() if spoil in SPOILS[kind]]
    assert labels or (params["variant"] == "control" and spoil not in ON_ROWS), "nothing that this could befall"
    for label in labels:
        harm = [0] * 4

        def main(real: ThreadTransport, label: str = label, harm: list[int] = harm) -> Any:
            spoiler = Spoiler(real, label, spoil, victim)
            measured = run_case(case_of(**params, routings=1), spoiler, Topology.single_node(4), ONCE)
            harm[real.rank] = spoiler.harm
            return measured

        measured = play(4, main)[0]
        assert harm[victim] > 0, f"{label}: the mutation did nothing"
        assert measured.record.status == "wrong", label
        assert victim in measured.record.wrong_ranks, label


def test_every_kind_of_phase_has_a_mutation() -> None:
    """Ensures that no test here passes because a phase is missing, in the fast suite either."""
    assert {kind for params in FEW for kind in labels_of(params).values()} == set(SPOILS)
    kinds = {named(params): Counter(labels_of(params).values()) for params in ALL}
    for params in ALL:
        found, hops = kinds[named(params)], 2 if params["variant"] == "hierarchical" else 1
        if params["variant"] == "control":
            # Bare all-to-alls: no experts, weights or counts to change. Both splits, out and back.
            assert found == {"payload": 4}
            continue
        passes = 2 if params.get("quad") else 1
        assert found["payload"] == 2 * hops * passes
        assert found["meta"] == hops  # the backward phases use the metadata of the forward pass
        assert found["scales"] == (hops if params.get("scales") == "separate" else 0)
        assert found["counts"] == found["to_host"] == (hops if params["variant"] in ("flat", "hierarchical") else 0)
        assert found["scale"] == passes
        assert found["sum"] == (1 + hops) * passes
        assert found["take"] == hops * passes + found["meta"] + found["scales"]


@pytest.mark.parametrize("params", ALL, ids=named)
def test_harness_without_mutation_passes(params: dict[str, Any]) -> None:
    def main(real: ThreadTransport) -> Any:
        idle = Spoiler(real, "combine", lambda *_: None, 2)
        return run_case(case_of(**params, routings=1), idle, Topology.single_node(4), ONCE)

    assert play(4, main)[0].record.status == "ok"


def mutated(monkeypatch: pytest.MonkeyPatch, change: Callable[[SimplePhase], SimplePhase]) -> None:
    """Changes the phases of all schedules, and enlarges buffers for the writes of a wrong phase."""
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

    monkeypatch.setattr(case_module, "build_variants", changed)


SKEWED: dict[str, Any] = {"tokens": "13,2,30,7", "routings": 1}


def transposed(phase: SimplePhase) -> AllToAllV | None:
    """The phase with transposed splits; None if they are symmetric."""
    if not isinstance(phase, AllToAllV):
        return None
    turned = phase.rows.transpose(0, 2, 1)
    return None if np.array_equal(turned, phase.rows) else replace(phase, rows=turned)


def turned_at(label: str, phase: SimplePhase) -> SimplePhase:
    """The phase, with transposed splits if it has the label."""
    return (transposed(phase) if phase.label == label else None) or phase


@pytest.mark.parametrize("params", ALL, ids=named)
def test_transposed_splits_are_found(monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]) -> None:
    """Padded splits are all equal, so transposing changes nothing; the control's splits differ by one row."""
    case = case_of(**{**params, **SKEWED})
    schedules = build_variants(case, Topology.single_node(4))
    moving = [p for schedule in schedules for p in flatten(schedule.phases) if isinstance(p, AllToAllV)]
    uneven = [phase.label for phase in moving if transposed(phase)]
    if params["variant"] == "padded":
        assert all(phase.rows.min() == phase.rows.max() > 0 for phase in moving)
        assert not uneven
    else:
        assert len(uneven) == len(moving)
    for label in uneven:
        with monkeypatch.context() as patch:
            mutated(patch, partial(turned_at, label))
            assert run(case, 4, settings=ONCE).status == "wrong", label


@pytest.mark.parametrize("params", WITH_META, ids=named)
def test_swapped_experts_are_found(monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]) -> None:
    """Experts 4 and 5 are exchanged in one pass: no row is lost or doubled."""

    def swap(phase: SimplePhase, label: str) -> SimplePhase:
        if isinstance(phase, RowWork) and phase.label == label:
            plan = phase.plan

            def swapped(rank: int) -> RowPlan:
                found = plan(rank)
                exponents = np.where(rank == 1, 1 - found.exponents, found.exponents).astype(np.int8)
                return RowPlan(found.index, exponents)

            return replace(phase, plan=swapped)
        return phase

    labels = [label for label, kind in labels_of(params).items() if kind == "scale"]
    assert labels == ["expert", "expert_bwd"][: 1 + bool(params.get("quad"))]
    for label in labels:
        with monkeypatch.context() as patch:
            mutated(patch, partial(swap, label=label))
            record = run(case_of(**params, routings=1), 4, settings=ONCE)
            assert record.status == "wrong", label
            assert 1 in record.wrong_ranks, label


def test_swapped_rows_of_two_experts_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """This includes experts of the same factor: 4 and 6."""

    def swap(phase: SimplePhase) -> SimplePhase:
        if isinstance(phase, RowWork) and phase.kernel is RowKernel.SCALE:
            plan = phase.plan
            return replace(phase, plan=lambda rank: RowPlan(plan(rank).index[::-1], plan(rank).exponents))
        return phase

    mutated(monkeypatch, swap)
    assert run(case_of(), 4).status == "wrong"


def test_ranks_with_different_routings_are_named() -> None:
    def main(real: ThreadTransport) -> Any:
        case = case_of(seed=1 if real.rank == 2 else 0)
        with pytest.raises(EnvironmentFault, match="ranks 2 drew another routing than rank 0"):
            run_case(case, real, Topology.single_node(4), QUICK)

    play(4, main)
