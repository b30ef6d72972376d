"""Buffers from ncclMemAlloc, registered with the communicators that move them, so that NCCL need not copy.

NCCL wants all ranks of a call to pass registered buffers, or none: so all register, or nobody does.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ncclbench.buffers.arrays import Buffers
from ncclbench.buffers.nccl_library import NcclLibrary
from ncclbench.buffers.nccl_mem_alloc import BLOCKS, NcclMemory
from ncclbench.transports.base import Control


def register_buffers(control: Control, communicators: Iterable[int], buffers: Buffers) -> bool:
    """Register every one of `buffers` with every one of this rank's communicators; whether that was done everywhere.

    All ranks call it, with buffers of the same kind; buffers that are not from ncclMemAlloc are left alone.
    """
    memories = [memory for array in buffers.values() if (memory := _block_of(array)) is not None]
    if not memories:
        return False
    library = NcclLibrary.only()
    done = library is not None
    for communicator in communicators if library is not None else ():
        done = all([memory.register(communicator) for memory in memories]) and done
    if control.all_gather(np.array([done])).all():
        return True
    for memory in memories:
        memory.deregister()
    return False


def _block_of(array: Any) -> NcclMemory | None:
    """The memory from ncclMemAlloc that a device array begins at; None for any other array."""
    return BLOCKS.at(int(array.data.ptr))
