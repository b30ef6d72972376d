"""What transports share: work on a rank's own buffers, and branches that run at the same time."""

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ncclbench.buffers import Buffers
from ncclbench.errors import Unable
from ncclbench.schedule.dtypes import Array
from ncclbench.schedule.phases import Collective, Concurrent, Kernel, Local, Phase, SimplePhase
from ncclbench.transports.base import Call, Step


def local_call(phase: Local, rank: int, buffers: Buffers) -> Call:
    """The ready call of a `Local` phase; works on NumPy and on CuPy arrays."""
    read, write, count = buffers[phase.read], buffers[phase.write], phase.count
    if phase.kernel is Kernel.COPY:
        return partial(_copy, write[:count], read[:count])
    if phase.kernel is Kernel.REDUCE_CHUNKS:
        chunks = read[: count * phase.chunks].reshape(phase.chunks, count)
        return partial(_sum_rows, write[:count], chunks)
    rows = phase.rows[rank]
    source = read[: len(read) // count * count].reshape(-1, count)
    return partial(_take_rows, write[: len(rows) * count].reshape(-1, count), source, rows)


def _copy(target: Array, source: Array) -> None:
    target[:] = source


def _sum_rows(target: Array, rows: Array) -> None:
    target[:] = rows[0]
    for row in rows[1:]:
        target += row


def _take_rows(target: Array, source: Array, rows: Array) -> None:
    target[:] = source[rows]


def refuse_what_only_mpi_has(phase: Collective, who: str) -> None:
    """A case that asks for it is skipped, on all ranks alike.

    Raises:
        Unable: if the collective is to be persistent, or overlapped with computing.
    """
    if phase.persistent:
        raise Unable(f"{who} no persistent collectives; --transport mpi has")
    if phase.overlap:
        raise Unable(f"{who} no overlap of a collective with computing; --transport mpi has")


def steps_of(phases: Sequence[Phase], call: Callable[[SimplePhase, tuple[int, ...]], Call]) -> tuple[Step, ...]:
    """One step a phase; the branches of a `Concurrent` one run in threads.

    Args:
        phases: a schedule's.
        call: makes the ready call of a phase; told in which branch it is, ``(b,)``, or ``()`` outside branches. What
            runs at the same time must not share a communicator, so each branch has its own.
    """
    steps = []
    for phase in phases:
        if isinstance(phase, Concurrent):
            branches = [[call(step, (b,)) for step in branch] for b, branch in enumerate(phase.branches)]
            steps.append(Step(phase.label, branches_call(branches)))
        else:
            steps.append(Step(phase.label, call(phase, ())))
    return tuple(steps)


def branches_call(branches: Sequence[Sequence[Call]]) -> Call:
    """A call that runs each branch in a thread of its own, and returns when all are done."""
    return _Branches(branches)


class _Branches:
    """Threads that wait for the next iteration, and end with the program that they are part of."""

    def __init__(self, branches: Sequence[Sequence[Call]]) -> None:
        self._branches = branches
        pool = ThreadPoolExecutor(max_workers=len(branches), thread_name_prefix="branch")
        self._submit = pool.submit
        weakref.finalize(self, pool.shutdown, wait=False)

    def __call__(self) -> None:
        running = [self._submit(_run_all, branch) for branch in self._branches]
        for branch in running:
            branch.result()


def _run_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
