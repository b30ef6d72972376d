"""What transports share: work on a rank's own buffers, and branches that run at the same time."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ncclbench.buffers import Buffers
from ncclbench.schedule.dtypes import Array
from ncclbench.schedule.phases import Concurrent, Kernel, Local
from ncclbench.schedule.rowwork import RowWork
from ncclbench.transports._rows import row_call
from ncclbench.transports.base import Call, Step


def local_call(phase: Local | RowWork, rank: int, buffers: Buffers) -> Call:
    """The ready call of a phase that stays on a rank; works on NumPy and on CuPy arrays."""
    if isinstance(phase, RowWork):
        return row_call(phase, rank, buffers)
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


class Branches:
    """A call that runs each branch in a thread of its own, and returns when all are done.

    Attributes:
        seconds: from the start of the last call to the end of each branch.
    """

    def __init__(self, branches: Sequence[Sequence[Call]]) -> None:
        """Start a thread for each branch, to be used again and again."""
        self._branches = branches
        self._pool = ThreadPoolExecutor(max_workers=len(branches), thread_name_prefix="branch")
        self.seconds = [0.0] * len(branches)

    def __call__(self) -> None:
        """Run all."""
        start = time.perf_counter()
        running = [self._pool.submit(self._run, number, start) for number in range(len(self._branches))]
        for branch in running:
            branch.result()

    def _run(self, number: int, start: float) -> None:
        for call in self._branches[number]:
            call()
        self.seconds[number] = time.perf_counter() - start


def branches_step(phase: Concurrent, branches: Sequence[Sequence[Call]]) -> Step:
    """The step of a concurrent phase on the host; branches that have names are timed by themselves."""
    run = Branches(branches)
    return Step(phase.label, run, phase.names, (lambda: run.seconds) if phase.names else None)
