"""The operations that NCCL puts on a gated queue, and the element types that it reduces; needs no CuPy and no GPU."""

import math
from typing import assert_never

import numpy as np

from ncclbench.errors import Unable
from ncclbench.schedule.dtypes import Dtype
from ncclbench.schedule.phases import REDUCING, AllToAllV, Collective, Concurrent, Exchange, Local, Op, SimplePhase
from ncclbench.schedule.row_work import RowWork

# NCCL has these as groups of sends and receives.
_GROUPED = frozenset({Op.ALL_TO_ALL, Op.GATHER, Op.SCATTER})
# NCCL writes 64 bytes per message into a ring of 1 MiB. Counting 16 messages as one operation keeps it half full.
_MESSAGES_PER_LAUNCH = 16
# Operations on the stream per launch: NCCL waits for its own stream, runs the kernel and records an event, and torch
# records another. torch runs exchanges on its own stream, for which the measured stream waits.
COLLECTIVE_LAUNCHES, EXCHANGE_LAUNCHES = 4, 6
# NCCL has 8-bit floats from 2.24 on, and reduces them on GPUs from Hopper on.
_NCCL_OF_FLOAT8, _GPU_OF_FLOAT8 = 22400, 90


def launches_of(phase: SimplePhase) -> int:
    """The operations of a gated queue that a phase needs.

    Groups of sends and receives also need space in NCCL's ring (NCCL_WORK_FIFO_BYTES). If the ring is full, NCCL waits
    for space, and behind a gate none becomes free.
    """
    match phase:
        case Local() | RowWork():
            return 1
        case Exchange():
            both = np.concatenate([phase.src, phase.dst])
            needed = math.ceil(int(np.bincount(both).max()) / _MESSAGES_PER_LAUNCH) if len(both) else 0
            return max(EXCHANGE_LAUNCHES, needed)
        case AllToAllV():
            return _grouped_launches(phase.groups.shape[1])
        case Collective():
            return _grouped_launches(phase.groups.shape[1]) if phase.op in _GROUPED else COLLECTIVE_LAUNCHES
        case _:
            assert_never(phase)


def _grouped_launches(members: int) -> int:
    return max(COLLECTIVE_LAUNCHES, math.ceil(members / _MESSAGES_PER_LAUNCH))


def branches_launches(phase: Concurrent) -> int:
    """As `launches_of`, for branches on their own streams; each takes three more operations to fork and join."""
    return 1 + sum(sum(map(launches_of, branch)) + 3 for branch in phase.branches)


def adds_float8(phase: Collective, dtype: Dtype) -> bool:
    """Whether a phase adds 8-bit floats; elements that are only moved are sent as bytes."""
    return phase.op in REDUCING and dtype.is_float and dtype.itemsize == 1


def refuse_float8(dtype: Dtype, nccl: int, capability: int) -> None:
    """Refuse reductions of 8-bit floats if this NCCL or this GPU has none.

    Args:
        dtype: the element type.
        nccl: NCCL's version code: 22809 is 2.28.9.
        capability: compute capability of the GPU: 90 is 9.0.

    Raises:
        Unable: naming the library or the GPU.
    """
    if nccl < _NCCL_OF_FLOAT8:
        raise Unable(f"NCCL has reductions of {dtype.name} from 2.24 on; this one's code is {nccl}")
    if capability < _GPU_OF_FLOAT8:
        raise Unable(f"NCCL has reductions of {dtype.name} from compute capability 9.0 on; this GPU's is {capability}")
