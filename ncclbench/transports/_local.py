"""What transports share: work on a rank's own buffers, and branches that run at the same time."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ncclbench.buffers import Buffers
from ncclbench.schedule.dtypes import Array
from ncclbench.schedule.phases import Kernel, Local
from ncclbench.schedule.rowwork import RowWork
from ncclbench.transports._rows import row_call
from ncclbench.transports.base import Call


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


def branches_call(branches: Sequence[Sequence[Call]]) -> Call:
    """A call that runs each branch in a thread of its own, and returns when all are done."""
    pool = ThreadPoolExecutor(max_workers=len(branches), thread_name_prefix="branch")

    def run() -> None:
        running = [pool.submit(_run_all, branch) for branch in branches]
        for branch in running:
            branch.result()

    return run


def _run_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
