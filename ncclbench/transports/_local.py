"""What transports share: work on a rank's own buffers, and branches that run at the same time."""

import math
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from ncclbench.buffers.arrays import Buffers
from ncclbench.errors import Unable
from ncclbench.schedule.dtypes import Array, Dtype
from ncclbench.schedule.phases import (
    REDUCING,
    AllToAllV,
    Collective,
    Concurrent,
    Exchange,
    Kernel,
    Local,
    Op,
    Phase,
    SimplePhase,
)
from ncclbench.schedule.row_work import RowWork
from ncclbench.transports._row_work import row_call
from ncclbench.transports.base import Call, Step

# NCCL has these as groups of sends and receives.
_GROUPED = frozenset({Op.ALL_TO_ALL, Op.GATHER, Op.SCATTER})
# NCCL writes 64 bytes a message into a ring of 1 MiB; with a share of the queue for every 16 of them it is half full.
_MESSAGES_A_SHARE = 16
# What one launch of NCCL puts into a stream's queue: it waits for a stream of its own, runs the kernel and records an
# event, and torch records another. Exchanges of torch's run on a stream of their own, which ours waits for.
COLLECTIVE_LAUNCHES, EXCHANGE_LAUNCHES = 4, 6
# NCCL has floats of 8 bits from 2.24 on, and adds them on GPUs from Hopper on.
_NCCL_OF_FLOAT8, _GPU_OF_FLOAT8 = 22400, 90


def local_call(phase: Local | RowWork, rank: int, buffers: Buffers) -> Call:
    """The ready call of a phase that stays on a rank; works on NumPy and on CuPy arrays.

    Raises:
        Unable: if it adds elements on a GPU.
    """
    if isinstance(phase, RowWork):
        return row_call(phase, rank, buffers)
    read, write, count = buffers[phase.read], buffers[phase.write], phase.count
    if phase.kernel is Kernel.COPY:
        return partial(_copy, write[:count], read[:count])
    if phase.kernel is Kernel.REDUCE_CHUNKS:
        if not isinstance(write, np.ndarray):  # CuPy has no bfloat16: buffers there are bits, whose sums mean nothing
            raise Unable(
                f"{phase.label}: reduce_chunks runs on the host only; --transport gloo, mpi or threads have it"
            )
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


def steps_of(
    phases: Sequence[Phase],
    call: Callable[[SimplePhase, tuple[int, ...]], Call],
    concurrent: "Callable[[Concurrent, Sequence[Sequence[Call]]], Step] | None" = None,
) -> tuple[Step, ...]:
    """One step a phase; the branches of a `Concurrent` one run in threads.

    Args:
        phases: a schedule's.
        call: makes the ready call of a phase; told in which branch it is, ``(b,)``, or ``()`` outside branches. What
            runs at the same time must not share a communicator, so each branch has its own.
        concurrent: makes the step of a concurrent phase of its branches' calls; `branches_step` by default.
    """
    steps = []
    for phase in phases:
        if isinstance(phase, Concurrent):
            branches = [[call(step, (b,)) for step in branch] for b, branch in enumerate(phase.branches)]
            steps.append((concurrent or branches_step)(phase, branches))
        else:
            steps.append(Step(phase.label, call(phase, ()), launches=launches_of(phase)))
    return tuple(steps)


def launches_of(phase: SimplePhase) -> int:
    """How much of a gated queue a phase takes.

    Groups of sends and receives also take room in a ring of NCCL's (NCCL_WORK_FIFO_BYTES), for which it waits; behind a
    gate there would never be any.
    """
    if isinstance(phase, Local | RowWork):
        return 1
    if isinstance(phase, Exchange):
        both = np.concatenate([phase.src, phase.dst])
        return max(EXCHANGE_LAUNCHES, math.ceil(int(np.bincount(both).max()) / _MESSAGES_A_SHARE) if len(both) else 0)
    grouped = isinstance(phase, AllToAllV) or phase.op in _GROUPED
    return max(COLLECTIVE_LAUNCHES, math.ceil(int(phase.groups.shape[1]) / _MESSAGES_A_SHARE) if grouped else 0)


def adds_float8(phase: Collective, dtype: Dtype) -> bool:
    """Whether a phase needs arithmetic on floats of 8 bits; what is only moved is bytes."""
    return phase.op in REDUCING and dtype.is_float and dtype.itemsize == 1


def refuse_float8(dtype: Dtype, nccl: int, capability: int) -> None:
    """Refuse to add floats of 8 bits by an NCCL, or on a GPU, that cannot.

    Args:
        dtype: which of them.
        nccl: version of the library, as NCCL tells it: 22809 is 2.28.9.
        capability: compute capability of the GPU: 90 is 9.0.

    Raises:
        Unable: saying which of them it is.
    """
    if nccl < _NCCL_OF_FLOAT8:
        raise Unable(f"NCCL has reductions of {dtype.name} from 2.24 on; this one's code is {nccl}")
    if capability < _GPU_OF_FLOAT8:
        raise Unable(f"NCCL has reductions of {dtype.name} from compute capability 9.0 on; this GPU's is {capability}")


def branches_launches(phase: Concurrent) -> int:
    """The same of branches on streams of their own: each also waits for the main stream, ends, and is waited for."""
    return 1 + sum(sum(map(launches_of, branch)) + 3 for branch in phase.branches)


class Branches:
    """A call that runs each branch in a thread of its own, and returns when all are done.

    The threads wait for the next iteration, and end with the program that they are part of.

    Attributes:
        seconds: from the start of the last call to the end of each branch.
    """

    def __init__(self, branches: Sequence[Sequence[Call]]) -> None:
        """Start a thread for each branch, to be used again and again."""
        self._branches = branches
        pool = ThreadPoolExecutor(max_workers=len(branches), thread_name_prefix="branch")
        self._submit = pool.submit
        self.seconds = [0.0] * len(branches)
        weakref.finalize(self, pool.shutdown, wait=False)

    def __call__(self) -> None:
        """Run all."""
        start = time.perf_counter()
        running = [
            self._submit(_run_branch, calls, self.seconds, number, start) for number, calls in enumerate(self._branches)
        ]
        for branch in running:
            branch.result()


def _run_branch(calls: Sequence[Call], seconds: list[float], number: int, start: float) -> None:
    for call in calls:
        call()
    seconds[number] = time.perf_counter() - start


def branches_step(phase: Concurrent, branches: Sequence[Sequence[Call]]) -> Step:
    """The step of a concurrent phase on the host; branches that have names are timed by themselves."""
    run = Branches(branches)
    return Step(phase.label, run, phase.names, (lambda: run.seconds.copy) if phase.names else None)
