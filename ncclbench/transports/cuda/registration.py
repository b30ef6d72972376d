"""Buffers from ncclMemAlloc, registered with the communicators that move them, so that NCCL need not copy.

NCCL needs registered buffers on all ranks of a call or on none. So either all ranks register or no rank does.
"""

from collections.abc import Iterable

import numpy as np

from ncclbench.buffers.arrays import Buffers, device_address
from ncclbench.buffers.nccl_library import NcclLibrary
from ncclbench.buffers.nccl_mem_alloc import BLOCKS
from ncclbench.transports.base import Control


def register_buffers(control: Control, communicators: Iterable[int], buffers: Buffers) -> bool:
    """Register all `buffers` with all of this rank's communicators; returns whether every rank could.

    All ranks call it, with buffers of the same kind. Buffers that are not from ncclMemAlloc are skipped.
    """
    memories = [memory for array in buffers.values() if (memory := BLOCKS.at(device_address(array))) is not None]
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
