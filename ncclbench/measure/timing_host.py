"""The timing loops on the host, with as little Python as possible.

Each loop returns durations in seconds, shape (samples, columns). The first column is the whole iteration. If a case has
phases of more than one name, one column per name follows, with NaN in iterations of a variant without that phase. The
start barrier and refills are outside the timed interval, and garbage collection is off inside it.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from ncclbench.analysis.summary import Floats
from ncclbench.transports.base import DeviceStream, Program, Step

Clock = Callable[[], float]
BranchColumns = tuple[list[int], Callable[[], Callable[[], Sequence[float]]]]

# nccl-tests' own default for -n.
LAUNCHES_PER_BLOCK = 20


class Progress:
    """The progress of this rank; written by the measuring thread, read by the watchdog's thread.

    It has plain attributes: storing one costs tens of nanoseconds, which must not affect the measurement. `announce` is
    called at the begin of each stage, before anything is timed.
    """

    __slots__ = ("announce", "case", "iteration", "stage", "ticks")

    def __init__(self) -> None:
        """Start without progress, and without a watchdog."""
        self.announce: Callable[[], None] = lambda: None
        self.case = -1
        self.stage = "start"
        self.iteration = -1
        self.ticks = 0

    def enter(self, stage: str) -> None:
        """Begin a new stage of the case: ``compile``, ``check``, ``warmup``, ``timed``, ..."""
        self.stage = stage
        self.iteration = -1
        self.ticks += 1
        self.announce()


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Everything that a timing loop uses.

    Attributes:
        programs: launched in turn: one for each variant and set of buffers.
        barrier: lets all ranks start together.
        clock: seconds, monotonic.
        refill: restores in-place buffers.
        refill_every: number of launches after which they would overflow.
        progress: updated for the watchdog.
        launches_per_block: N of the pipelined regime.
        stream: the stream of device regimes; None on the host.
        device_barrier: whether gated iterations need a barrier on the device between them.
        remarks: notes for the record; loops add to it.
    """

    programs: tuple[Program, ...]
    barrier: Callable[[], None]
    clock: Clock
    refill: Callable[[], None]
    refill_every: int
    progress: Progress
    launches_per_block: int = LAUNCHES_PER_BLOCK
    stream: DeviceStream | None = None
    device_barrier: bool = False
    remarks: set[str] = field(default_factory=set)

    def program_of(self, iteration: int) -> Program:
        """The program whose turn it is."""
        return self.programs[iteration % len(self.programs)]

    def step(self, iteration: int) -> None:
        """Report an iteration to the watchdog."""
        self.progress.iteration = iteration
        self.progress.ticks += 1

    @property
    def columns(self) -> list[str]:
        """The phase label of each column of a loop's samples in the isolated regime."""
        steps = [step for program in self.programs for step in program.steps]
        labels = list(dict.fromkeys(name for step in steps for name in (step.label, *_part_labels(step))))
        return ["total", *labels] if len(labels) > 1 else ["total"]

    @property
    def step_columns(self) -> list[list[int]]:
        """The column of each step of each program; empty lists if there is only the total."""
        columns = self.columns
        return [
            [columns.index(step.label) for step in program.steps if step.label in columns] for program in self.programs
        ]

    @property
    def parts(self) -> "list[dict[int, BranchColumns]]":
        """For each program, by step: the columns of its branches, and the step's `part_seconds`."""
        columns = self.columns
        return [
            {
                k: ([columns.index(label) for label in _part_labels(step)], step.part_seconds)
                for k, step in enumerate(program.steps)
                if step.part_seconds is not None
            }
            for program in self.programs
        ]


def isolated(loop: Loop, samples: int) -> Floats:
    """Time every iteration separately by the host clock, after a barrier that is not timed."""
    measure = _many_phases if len(loop.columns) > 1 else _single_phase
    with quiet_gc():
        return measure(loop, samples)


def _single_phase(loop: Loop, samples: int) -> Floats:
    # As little as possible between the barrier and the call, and around it. 0.1 us here becomes several in the result,
    # since it changes how the ranks' threads meet.
    calls = [program.complete for program in loop.programs]
    barrier, clock, progress, turns = loop.barrier, loop.clock, loop.progress, len(calls)
    seconds = [0.0] * samples
    for i in range(samples):
        if i % loop.refill_every == 0:
            loop.refill()
        progress.iteration = i
        progress.ticks += 1
        call = calls[i % turns]
        barrier()
        start = clock()
        call()
        end = clock()
        progress.ticks += 1
        seconds[i] = end - start
    return np.array(seconds)[:, None]


def _many_phases(loop: Loop, samples: int) -> Floats:
    finish, barrier, clock, progress = loop.programs[0].finish, loop.barrier, loop.clock, loop.progress
    turns = [[step.launch for step in program.steps] for program in loop.programs]
    columns, parts = (
        [np.array(numbers) for numbers in loop.step_columns],
        [list(parts.values()) for parts in loop.parts],
    )
    seconds = np.full((samples, len(loop.columns)), np.nan)
    for i in range(samples):
        launches = turns[i % len(turns)]
        marks = [0.0] * (len(launches) + 1)
        if i % loop.refill_every == 0:
            loop.refill()
        progress.iteration = i
        progress.ticks += 1
        barrier()
        marks[0] = clock()
        for k, launch in enumerate(launches, 1):
            launch()
            finish()
            marks[k] = clock()
        progress.ticks += 1
        seconds[i, 0] = marks[-1] - marks[0]
        seconds[i, columns[i % len(turns)]] = np.diff(marks)
        for place, part_seconds in parts[i % len(turns)]:
            seconds[i, place] = part_seconds()()
    return seconds


def _part_labels(step: Step) -> list[str]:
    """The column labels of a step's branches."""
    return [f"{step.label}.{name}" for name in step.parts]


def pipelined(loop: Loop, samples: int) -> Floats:
    """Time blocks of N back-to-back launches, wall time / N, as nccl-tests does. One sample is one block."""
    turns = [loop.program_of(i).steps for i in range(loop.launches_per_block)]
    launches = [step.launch for steps in turns for step in steps]
    finish, clock = loop.programs[0].finish, loop.clock
    seconds = np.empty((samples, 1))
    with quiet_gc():
        for i in range(samples):
            loop.refill()
            finish()
            loop.step(i * loop.launches_per_block)
            loop.barrier()
            start = clock()
            for launch in launches:
                launch()
            finish()
            end = clock()
            loop.progress.ticks += 1
            seconds[i, 0] = (end - start) / loop.launches_per_block
    return seconds


@contextmanager
def quiet_gc() -> Iterator[None]:
    """Disable the garbage collector during timing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
