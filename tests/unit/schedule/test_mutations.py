"""Faulty transports: the check after a run must detect each fault, for every pattern.

Each mutation is made of whole steps: the real transport does its work, and then something is undone, swapped or
changed. Where data are expected at all is taken from the schedule (`received`, `kept`), so that a new pattern is
tested by existing; which ranks must be found at fault is known from what the mutation did.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from ncclbench.buffers.arrays import Buffers
from ncclbench.config.plugins import names
from ncclbench.measure.case import Measurement, run_case
from ncclbench.plan.plan import Settings
from ncclbench.schedule import Case, Redop, Schedule, Timing, Unable
from ncclbench.schedule.pattern import build_schedule, load_pattern
from ncclbench.schedule.symbolic_trace import InputElements, NoInput, Term, trace
from ncclbench.store.records import Record
from ncclbench.topology import Topology
from ncclbench.transports.base import Program, Step, nothing
from ncclbench.transports.threads import ThreadTransport, play
from tests.helpers.exhaustive import exhaustive_if

Bits: TypeAlias = NDArray[Any]  # elements seen as unsigned integers

RANKS = 4
# Patterns with one schedule. Those with variants need nodes and rails, and have tests of their own.
PATTERNS = [name for name in names("patterns") if not load_pattern(name).rotates]
TYPES = ["float32", "bfloat16", "uint8"]
SIZES = [256, 100_000]  # below and above the period of the input values
QUICK = Settings(iterations=6, warmup=1)


@dataclass(frozen=True)
class Block:
    """Elements `start` to `stop` of a buffer of `rank`, which must hold `term`."""

    rank: int
    buffer: str
    start: int
    stop: int
    term: Term

    @property
    def size(self) -> int:
        return self.stop - self.start

    def of(self, buffers: Buffers) -> Bits:
        """The bits of these elements; a view."""
        array = buffers[self.buffer]
        return array.view(f"u{array.itemsize}")[self.start : self.stop]


def blocks(schedule: Schedule, *, arrived: bool) -> list[Block]:
    """All blocks with specified contents: those that were received, or those that are there from the start."""
    return [
        Block(rank, name, segment.start, segment.stop, segment.term)
        for rank in range(schedule.world_size)
        for name in schedule.buffers
        for segment in trace(schedule, rank, name)
        if not isinstance(segment.term, NoInput)
        and (segment.term != InputElements(rank, name, segment.start)) == arrived
    ]


def received(schedule: Schedule) -> list[Block]:
    return blocks(schedule, arrived=True)


def kept(schedule: Schedule) -> list[Block]:
    return blocks(schedule, arrived=False)


class WrongTransport(ThreadTransport):
    """Works as the real transport; `before` and `spoil` are called around each run, while no rank is working.

    Args:
        real: the transport of the rank that it replaces.
        all_buffers: the buffers of all ranks, which each rank adds itself.

    Attributes:
        harm: number of elements changed on this rank, per run.
    """

    def __init__(self, real: ThreadTransport, all_buffers: dict[int, Buffers]) -> None:
        super().__init__(real.world, real.rank)
        self.all_buffers = all_buffers
        self.harm: list[int] = []
        self.schedule: Schedule

    def compile(self, schedule: Schedule, buffers: Buffers) -> Program:
        program = super().compile(schedule, buffers)
        self.schedule, self.all_buffers[self.rank] = schedule, buffers
        launches = [step.launch for step in program.steps]
        launches[0] = in_a_row(self.before, launches[0])
        launches[-1] = in_a_row(launches[-1], self.barrier, self.note_harm, self.barrier)
        steps = [Step(step.label, launch) for step, launch in zip(program.steps, launches, strict=True)]
        return replace(program, steps=tuple(steps))

    def note_harm(self) -> None:
        self.harm.append(self.spoil())

    def before(self) -> None:
        """Before the first phase."""

    def spoil(self) -> int:
        """Damage this rank's buffers after the last phase; returns the number of changed elements."""
        return 0

    def mine(self, some: list[Block]) -> list[Bits]:
        return [block.of(self.all_buffers[self.rank]) for block in some if block.rank == self.rank]


def in_a_row(*calls: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        for call in calls:
            call()

    return run


class OneReceivedElement(WrongTransport):
    """One bit of one received element, on the last rank that receives."""

    choose: Callable[[Schedule], list[Block]] = staticmethod(received)

    def spoil(self) -> int:
        for bits in self.mine(self.choose(self.schedule)[-1:]):
            bits[-1] ^= 1
            return 1
        return 0


class OneKeptElement(OneReceivedElement):
    """One bit of one element that no phase may change: an input, or a part of an in-place buffer."""

    choose = staticmethod(kept)


class SwappedBlocks(WrongTransport):
    """Two received blocks of equal size, exchanged."""

    def spoil(self) -> int:
        pair = swappable(received(self.schedule))
        values_of = [block.of(self.all_buffers[block.rank]).copy() for block in pair]
        self.barrier()  # all ranks have read before any rank writes
        changed = 0
        for block, values in zip(pair, reversed(values_of), strict=True):
            for bits in self.mine([block]):
                changed += int(np.count_nonzero(bits != values))
                bits[:] = values
        return changed


def swappable(arrived: list[Block]) -> tuple[Block, Block]:
    """Two blocks to swap, of different ranks if possible.

    After an all_reduce or a broadcast all ranks hold the same, and after a reduce only the root holds anything: there
    is no other block to be mistaken for this one. What goes wrong there is the order inside: two chunks of the ring
    (or of the pipeline) land in each other's place. So the halves of one block are swapped.
    """
    pairs = [(a, b) for a, b in combinations(arrived, 2) if a.size == b.size and a.term != b.term]
    for pair in sorted(pairs, key=lambda pair: pair[0].rank == pair[1].rank):
        return pair
    whole = max(arrived, key=lambda block: block.size)
    middle = whole.start + whole.size // 2
    return replace(whole, stop=middle), replace(whole, start=middle, stop=middle + whole.size // 2)


class StaleBuffer(WrongTransport):
    """The data received in the first run remain after every later run."""

    stale: tuple[Bits, ...] = ()

    def spoil(self) -> int:
        views = self.mine(received(self.schedule))
        self.stale = self.stale or tuple(view.copy() for view in views)
        changed = 0
        for view, old in zip(views, self.stale, strict=True):
            changed += int(np.count_nonzero(view != old))
            view[:] = old
        return changed


class NothingDone(WrongTransport):
    """Returns at once, as a library whose stream was never started."""

    def compile(self, schedule: Schedule, buffers: Buffers) -> Program:
        program = super().compile(schedule, buffers)
        return replace(program, steps=tuple(Step(step.label, nothing) for step in program.steps))


class LostContribution(WrongTransport):
    """The last rank's input counts as zeros in every reduction; the input itself is restored afterwards."""

    put_back: tuple[Bits, ...] = ()

    def before(self) -> None:
        if self.rank == self.world_size - 1:
            self.put_back = tuple(bits.copy() for bits in self.mine(kept(self.schedule)))
            for name in self.schedule.inputs:
                self.all_buffers[self.rank][name][:] = 0

    def spoil(self) -> int:
        if self.put_back:
            for bits, values in zip(self.mine(kept(self.schedule)), self.put_back, strict=True):
                bits[:] = values
        return 0


@dataclass(frozen=True)
class Outcome:
    """The record of a mutated run, and the changes to each rank in the two checked runs."""

    record: Record
    harm_R: list[int]


def topology_of(case: Case, ranks: int) -> Topology:
    """One node, or nodes of two ranks for a pattern that cannot run on one."""
    single = Topology.single_node(ranks)
    try:
        build_schedule(case, single)
    except Unable:
        return Topology.from_hosts([f"node{rank // 2}" for rank in range(ranks)])
    return single


def run_wrong(kind: type[WrongTransport], case: Case, ranks: int = RANKS) -> Outcome:
    topology, all_buffers, harm = topology_of(case, ranks), dict[int, Buffers](), dict[int, list[int]]()

    def main(real: ThreadTransport) -> Measurement | None:
        wrong = kind(real, all_buffers)
        harm[real.rank] = wrong.harm
        return run_case(case, wrong, topology, QUICK)

    measured = play(ranks, main)[0]
    assert measured is not None
    return Outcome(measured.record, [sum([*harm[r][:1], *harm[r][-1:]]) for r in range(ranks)])


def ranks_of(some: list[Block]) -> list[int]:
    return sorted({block.rank for block in some})


def schedule_of(case: Case, ranks: int = RANKS) -> Schedule:
    return build_schedule(case, topology_of(case, ranks))


def keeps_anything(pattern: str) -> bool:
    """Whether an iteration must leave any element unchanged; True if it cannot be built, so that its test fails."""
    try:
        return bool(kept(schedule_of(Case(pattern=pattern, nbytes=SIZES[0]))))
    except Unable:
        return True


def check_exactly_the_harm_was_found(outcome: Outcome) -> None:
    record, harm_R = outcome.record, outcome.harm_R
    assert sum(harm_R) > 0, "the mutation did nothing"
    assert (record.status, record.wrong) == ("wrong", sum(harm_R))
    assert record.wrong_ranks == [rank for rank, harm in enumerate(harm_R) if harm]
    assert record.reason is not None
    assert f"{sum(harm_R)} elements differ" in record.reason


every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
every_kind = pytest.mark.parametrize(
    ("dtype", "nbytes", "timing"),
    [
        *exhaustive_if(  # the period of the values is the same for all three types
            lambda case: case[0] != "float32" and case[1] == SIZES[1],
            [(dtype, nbytes, Timing.ISOLATED) for dtype in TYPES for nbytes in SIZES],
        ),
        ("float32", SIZES[0], Timing.PIPELINED),
    ],
)


@every_kind
@every_pattern
def test_real_transport_passes_in_the_harness(pattern: str, dtype: str, nbytes: int, timing: Timing) -> None:
    """Ensures that the other tests detect the mutation, not the harness."""
    outcome = run_wrong(WrongTransport, Case(pattern=pattern, nbytes=nbytes, dtype=dtype, timing=timing))
    assert (outcome.record.status, outcome.record.wrong, outcome.record.wrong_ranks) == ("ok", 0, [])


@every_kind
@every_pattern
def test_one_changed_element_is_found(pattern: str, dtype: str, nbytes: int, timing: Timing) -> None:
    case = Case(pattern=pattern, nbytes=nbytes, dtype=dtype, timing=timing)
    outcome = run_wrong(OneReceivedElement, case)
    check_exactly_the_harm_was_found(outcome)
    assert outcome.record.wrong == 2  # one in each of the two checks
    assert outcome.record.wrong_ranks == ranks_of(received(schedule_of(case)))[-1:]


@every_kind
@pytest.mark.parametrize("pattern", [p for p in PATTERNS if keeps_anything(p)])
def test_one_changed_untouched_element_is_found(pattern: str, dtype: str, nbytes: int, timing: Timing) -> None:
    case = Case(pattern=pattern, nbytes=nbytes, dtype=dtype, timing=timing)
    outcome = run_wrong(OneKeptElement, case)
    check_exactly_the_harm_was_found(outcome)
    assert outcome.record.wrong == 2
    assert outcome.record.wrong_ranks == ranks_of(kept(schedule_of(case)))[-1:]


@every_kind
@every_pattern
def test_swapped_blocks_are_found(pattern: str, dtype: str, nbytes: int, timing: Timing) -> None:
    case = Case(pattern=pattern, nbytes=nbytes, dtype=dtype, timing=timing)
    outcome = run_wrong(SwappedBlocks, case)
    check_exactly_the_harm_was_found(outcome)
    assert outcome.record.wrong_ranks == ranks_of(list(swappable(received(schedule_of(case)))))


@every_kind
@every_pattern
def test_stale_buffer_is_found(pattern: str, dtype: str, nbytes: int, timing: Timing) -> None:
    case = Case(pattern=pattern, nbytes=nbytes, dtype=dtype, timing=timing)
    outcome = run_wrong(StaleBuffer, case)
    check_exactly_the_harm_was_found(outcome)
    assert outcome.record.wrong_ranks == ranks_of(received(schedule_of(case)))


@every_kind
@every_pattern
def test_missing_work_is_found(pattern: str, dtype: str, nbytes: int, timing: Timing) -> None:
    case = Case(pattern=pattern, nbytes=nbytes, dtype=dtype, timing=timing)
    record = run_wrong(NothingDone, case).record
    assert record.status == "wrong"
    assert record.wrong is not None
    assert record.wrong > 0
    assert record.wrong_ranks == ranks_of(received(schedule_of(case)))


@pytest.mark.parametrize("ranks", [4, 5])
@pytest.mark.parametrize("redop", Redop)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("pattern", [p for p in PATTERNS if "redop" in load_pattern(p).params.__struct_fields__])
def test_lost_contribution_is_found(pattern: str, dtype: str, redop: Redop, ranks: int) -> None:
    """This includes an average over 5 ranks, which has a tolerance."""
    case = Case(pattern=pattern, nbytes=1000, dtype=dtype, params={"redop": redop})
    record = run_wrong(LostContribution, case, ranks).record
    assert record.status == "wrong"
    assert record.wrong_ranks == ranks_of(received(schedule_of(case, ranks)))


def test_faulty_rank_is_named_with_its_error_count() -> None:
    record = run_wrong(OneReceivedElement, Case(pattern="all_gather", nbytes=256)).record
    assert record.reason == "2 elements differ from what they must be, on rank 3"
