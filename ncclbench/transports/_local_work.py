"""Ready calls for work on a rank's own buffers: the kernels of `Local`. Those of `RowWork` are in `_row_work`."""

from functools import partial
from typing import assert_never

import numpy as np

from ncclbench.buffers.arrays import Buffers
from ncclbench.errors import Unable
from ncclbench.schedule.dtypes import Array
from ncclbench.schedule.phases import Kernel, Local
from ncclbench.schedule.row_work import RowWork
from ncclbench.transports._row_work import row_call
from ncclbench.transports.base import Call


def local_call(phase: Local | RowWork, rank: int, buffers: Buffers) -> Call:
    """The ready call of a phase that stays on one rank, on NumPy or CuPy arrays.

    Raises:
        Unable: if the phase adds elements on a GPU.
    """
    if isinstance(phase, RowWork):
        return row_call(phase, rank, buffers)
    read, write, count = buffers[phase.read], buffers[phase.write], phase.count
    match phase.kernel:
        case Kernel.COPY:
            return partial(_copy, write[:count], read[:count])
        case Kernel.REDUCE_CHUNKS:
            # CuPy has no bfloat16. Buffers on a GPU hold the bits as integers, which cannot be added as floats.
            if not isinstance(write, np.ndarray):
                raise Unable(
                    f"{phase.label}: reduce_chunks runs on the host only; --transport gloo, mpi or threads have it"
                )
            chunks = read[: count * phase.chunks].reshape(phase.chunks, count)
            return partial(_sum_rows, write[:count], chunks)
        case Kernel.GATHER_ROWS:
            rows = phase.rows[rank]
            source = read[: len(read) // count * count].reshape(-1, count)
            return partial(_take_rows, write[: len(rows) * count].reshape(-1, count), source, rows)
        case _:
            assert_never(phase.kernel)


def _copy(target: Array, source: Array) -> None:
    target[:] = source


def _sum_rows(target: Array, rows: Array) -> None:
    target[:] = rows[0]
    for row in rows[1:]:
        target += row


def _take_rows(target: Array, source: Array, rows: Array) -> None:
    target[:] = source[rows]
