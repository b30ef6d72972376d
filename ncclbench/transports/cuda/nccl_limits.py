"""What NCCL takes of a gated queue, and which element types it adds; needs neither CuPy nor a GPU."""

import math
from typing import assert_never

import numpy as np

from ncclbench.errors import Unable
from ncclbench.schedule.dtypes import Dtype
from ncclbench.schedule.phases import REDUCING, AllToAllV, Collective, Concurrent, Exchange, Local, Op, SimplePhase
from ncclbench.schedule.row_work import RowWork

# NCCL has these as groups of sends and receives.
_GROUPED = frozenset({Op.ALL_TO_ALL, Op.GATHER, Op.SCATTER})
# NCCL writes 64 bytes a message into a ring of 1 MiB; with a share of the queue for every 16 of them it is half full.
_MESSAGES_A_SHARE = 16
# What one launch of NCCL puts into a stream's queue: it waits for a stream of its own, runs the kernel and records an
# event, and torch records another. Exchanges of torch's run on a stream of their own, which ours waits for.
COLLECTIVE_LAUNCHES, EXCHANGE_LAUNCHES = 4, 6
# NCCL has floats of 8 bits from 2.24 on, and adds them on GPUs from Hopper on.
_NCCL_OF_FLOAT8, _GPU_OF_FLOAT8 = 22400, 90


def launches_of(phase: SimplePhase) -> int:
    """How much of a gated queue a phase takes.

    Groups of sends and receives also take space in a ring of NCCL's (NCCL_WORK_FIFO_BYTES), for which it waits; behind
    a gate none would ever become free.
    """
    match phase:
        case Local() | RowWork():
            return 1
        case Exchange():
            both = np.concatenate([phase.src, phase.dst])
            shares = math.ceil(int(np.bincount(both).max()) / _MESSAGES_A_SHARE) if len(both) else 0
            return max(EXCHANGE_LAUNCHES, shares)
        case AllToAllV():
            return _grouped_launches(phase.groups.shape[1])
        case Collective():
            return _grouped_launches(phase.groups.shape[1]) if phase.op in _GROUPED else COLLECTIVE_LAUNCHES
        case _:
            assert_never(phase)


def _grouped_launches(members: int) -> int:
    return max(COLLECTIVE_LAUNCHES, math.ceil(members / _MESSAGES_A_SHARE))


def branches_launches(phase: Concurrent) -> int:
    """The same of branches on streams of their own: each also waits for the main stream, ends, and is waited for."""
    return 1 + sum(sum(map(launches_of, branch)) + 3 for branch in phase.branches)


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
