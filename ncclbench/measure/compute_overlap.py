"""Overlap of a collective with computing: each iteration is timed alone, and again with computing in between.

If a library moves data in its own thread, or the NIC does, a rank can compute meanwhile. If a library moves data only
inside its calls, nothing is hidden. The definition is that of OSU's micro-benchmarks (``osu_iallreduce`` and others,
``calculate_and_print_stats`` in ``osu_util_mpi.c``). The computing takes as long as the collective alone, and

    share = max(0, 100 - (overlapped - compute) / pure * 100)

from means over all ranks and iterations. As in OSU's default, MPI is not called while computing.
"""

import time
from collections.abc import Callable, Sequence
from itertools import repeat

import numpy as np

from ncclbench.analysis.summary import MICRO, Floats
from ncclbench.errors import Unable
from ncclbench.measure.timing_host import Clock, Loop, quiet_gc
from ncclbench.schedule.case import Timing
from ncclbench.schedule.phases import Collective, flatten
from ncclbench.schedule.schedule import Schedule
from ncclbench.store.records import Overlap
from ncclbench.transports.base import Control, Program, Split

# Columns of the samples: the collective alone, the collective with computing in between, and the computing.
TOTAL, OVERLAPPED, COMPUTE = COLUMNS = ("total", "overlapped", "compute")

# OSU multiplies a matrix of this many rows by a vector.
_ROWS = 25
_UNITS_TIMED = 200
_ROUNDS = 7
_PURE_RUNS = 20


def is_overlapped(variants: Sequence[Schedule], timing: Timing) -> bool:
    """Whether a case asks for overlap.

    Raises:
        Unable: if it cannot be measured this way.
    """
    asked = [p for v in variants for p in flatten(v.phases) if isinstance(p, Collective) and p.overlap]
    if asked and timing is not Timing.ISOLATED:
        raise Unable(f"overlap is measured in the isolated regime, not in {timing}")
    if asked and any(len(variant.phases) != 1 for variant in variants):
        raise Unable("overlap is measured where an iteration is one collective")
    return bool(asked)


def split_of(program: Program) -> Split:
    """The program's only call, which can be overlapped."""
    (step,) = program.steps
    assert isinstance(step.launch, Split), "a transport that cannot split a call says so when it compiles it"
    return step.launch


def run_with_work(program: Program) -> None:
    """Run one iteration with computing in between, untimed, so that its data are checked as well."""
    split = split_of(program)
    split.start()
    Work(time.perf_counter).do(_UNITS_TIMED)
    split.wait()


class Work:
    """Computing that stays in the processor's caches.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Clock) -> None:
        """Measure the time of one unit of computing."""
        self._matrix, self._vector = np.ones((_ROWS, _ROWS)), np.ones(_ROWS)
        self._out = np.empty(_ROWS)
        self._clock = clock
        self.seconds_per_unit = min(self._time_units() for _ in range(_ROUNDS)) / _UNITS_TIMED

    def _time_units(self) -> float:
        began = self._clock()
        self.do(_UNITS_TIMED)
        return self._clock() - began

    def units(self, seconds: float) -> int:
        """The number of units that take about `seconds`; at least one."""
        return max(1, round(seconds / max(self.seconds_per_unit, 1e-12)))

    def do(self, units: int) -> None:
        """Compute `units` units."""
        dot, matrix, vector, out = np.dot, self._matrix, self._vector, self._out
        for _ in repeat(None, units):
            dot(matrix, vector, out)


def overlapped(loop: Loop, control: Control) -> Callable[[int], Floats]:
    """The loop that times every iteration twice; all ranks compute for the same time.

    Args:
        loop: as for the isolated regime; each iteration makes two launches.
        control: gathers the times of the collective.
    """
    splits = [split_of(program) for program in loop.programs]
    pure_N = np.array([_pure(loop, splits[0]) for _ in range(_PURE_RUNS)])
    loop.refill()
    slowest_N = control.all_gather(pure_N).max(axis=0)
    work = Work(loop.clock)
    units = work.units(float(np.median(slowest_N)))

    def measure(samples: int) -> Floats:
        seconds = np.empty((samples, len(COLUMNS)))
        with quiet_gc():
            for i in range(samples):
                if i % max(1, loop.refill_every // 2) == 0:
                    loop.refill()
                loop.step(i)
                split = splits[i % len(splits)]
                seconds[i, 0] = _pure(loop, split)
                seconds[i, 1:] = _with_work(loop, split, work, units)
        return seconds

    return measure


def _pure(loop: Loop, split: Split) -> float:
    clock = loop.clock
    loop.barrier()
    began = clock()
    split.start()
    split.wait()
    return clock() - began


def _with_work(loop: Loop, split: Split, work: Work, units: int) -> tuple[float, float]:
    clock = loop.clock
    loop.barrier()
    began = clock()
    split.start()
    computing = clock()
    work.do(units)
    computed = clock()
    split.wait()
    return clock() - began, computed - computing


def overlap_of(labels: list[str], seconds_RNK: Floats) -> Overlap | None:
    """The overlap, from samples with these columns; None if nothing was overlapped."""
    if OVERLAPPED not in labels:
        return None
    pure, both, compute = (float(seconds_RNK[:, :, labels.index(name)].mean()) for name in COLUMNS)
    return Overlap(
        share_percent=share_percent(pure, both, compute),
        pure_us=pure * MICRO,
        overlapped_us=both * MICRO,
        compute_us=compute * MICRO,
    )


def share_percent(pure: float, overlapped: float, compute: float) -> float:
    """OSU's share; no more than 100, since the overlapped iteration contains the computing."""
    return max(0.0, 100.0 - (overlapped - compute) / pure * 100.0) if pure > 0 else 0.0
