"""Buffers: NumPy arrays on CPUs, CuPy arrays on GPUs.

Memory is checked before anything is allocated. A size that does not fit is refused, never reduced.
"""

from collections.abc import Callable, Iterable, Mapping
from math import gcd
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ncclbench.buffers.kinds import Cache, Device, Kind, is_registered
from ncclbench.buffers.nccl_mem_alloc import BLOCKS
from ncclbench.errors import TooLarge
from ncclbench.schedule.dtypes import Array
from ncclbench.schedule.schedule import Schedule, shared_buffers
from ncclbench.topology.host_memory import available_memory
from ncclbench.units import format_bytes

Buffers = Mapping[str, Array]

# The memory whose blocks are kept between cases; a node's memory is freed.
ON_GPU = "a GPU"

# Memory per rank for the interpreter, the libraries and the validation.
_RESERVE = 256 << 20

_MOST_COPIES = 64
_COLD_BY_ITSELF = 4
_PAGE = 4096


def allocate(schedule: Schedule, device: Device, kind: Kind = "pool", *variants: Schedule) -> Buffers:
    """The buffers of `schedule` and its other variants for one rank: one-dimensional and uninitialised.

    On the host they have the schedule's element type. On a GPU they are CuPy arrays of unsigned integers of that size,
    since CuPy does not have every type that a library can send.
    """
    sizes = shared_buffers([schedule, *variants])
    if device == "cpu":
        return {name: _host_bytes(n).view(schedule.dtype.numpy) for name, n in sizes.items()}
    return {name: device_bytes(n, kind).view(schedule.dtype.bits) for name, n in sizes.items()}


def _host_bytes(nbytes: int) -> NDArray[np.uint8]:
    """Host memory that begins on a page, so that neither alignment nor other data affects the measurement."""
    whole = np.empty(nbytes + _PAGE, np.uint8)
    return whole[-whole.ctypes.data % _PAGE :][:nbytes]


def device_bytes(nbytes: int, kind: Kind = "pool") -> Array:
    """Device memory: from CuPy's pool, from ncclMemAlloc, or from torch's caching allocator."""
    import cupy

    found: Array
    if is_registered(kind):
        block = BLOCKS.take(nbytes)
        memory = cupy.cuda.UnownedMemory(block.pointer, block.nbytes, block)
        found = cupy.ndarray(nbytes, np.uint8, cupy.cuda.MemoryPointer(memory, 0))
    elif kind == "torch":
        import torch

        found = cupy.from_dlpack(torch.empty(nbytes, dtype=torch.uint8, device="cuda"))
    else:
        found = cupy.empty(nbytes, np.uint8)
    return found


def device_address(array: Any) -> int:
    """The address of a CuPy array on the device. NumPy's type, which `Buffers` has for both, lacks it."""
    return int(array.data.ptr)


def pinned_bytes(nbytes: int) -> NDArray[np.uint8]:
    """Page-locked host memory, which a device reads and writes directly; freed with the array."""
    import cupy

    return np.frombuffer(cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)


def uploader(device: Device) -> Callable[[Array], Array]:
    """A function that copies a NumPy array to `device`."""
    if device == "cpu":
        return np.asarray
    import cupy

    upload: Callable[[Array], Array] = cupy.asarray
    return upload


def free_device_memory() -> int:
    """Free bytes of this rank's GPU."""
    import cupy

    return int(cupy.cuda.runtime.memGetInfo()[0])


def l2_bytes() -> int:
    """Size of the L2 cache of this rank's GPU."""
    import cupy

    return int(cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())["l2CacheSize"])


class Rotation(NamedTuple):
    """The number of buffer sets that iterations rotate over, and whether L2 is cold for each iteration."""

    copies: int
    cold: bool


WARM = Rotation(1, False)


def rotation(nbytes: int, l2: int, cache: Cache, variants: int = 1) -> Rotation:
    """The buffer sets that a case rotates over if memory allows.

    One set of `_COLD_BY_ITSELF` times L2 is cold without rotation: an iteration leaves only its last part in the
    cache, and the next iteration begins elsewhere. Below some MiB, even `_MOST_COPIES` sets fit into the cache. Then
    one set is used, and the case is warm.

    Args:
        nbytes: bytes of one set.
        l2: bytes of the cache.
        cache: the user's setting.
        variants: number of schedules that iterations rotate over as well. Every schedule is paired with every set.
    """
    if cache == "warm":
        return WARM
    if nbytes >= _COLD_BY_ITSELF * l2:
        return Rotation(1, True)
    copies = -(-2 * l2 // nbytes) + 1
    while gcd(copies, variants) > 1:
        copies += 1
    return Rotation(copies, True) if copies <= _MOST_COPIES else WARM


class MemoryLimit(NamedTuple):
    """Memory that buffers must fit into.

    Attributes:
        ranks: number of ranks that share it.
        available: free bytes.
        where: name of the memory.
    """

    ranks: int
    available: int
    where: str


def memory_limits(device: Device, staged: bool | None, local_size: int, ranks_per_gpu: int = 1) -> list[MemoryLimit]:
    """Every memory that a rank's buffers must fit into.

    Args:
        device: where the buffers are.
        staged: whether they have copies in host memory as well.
        local_size: number of ranks on this node.
        ranks_per_gpu: number of ranks on one GPU.
    """
    limits = [] if device == "cpu" else [MemoryLimit(ranks_per_gpu, free_device_memory(), ON_GPU)]
    if device == "cpu" or staged:
        limits.append(MemoryLimit(local_size, available_memory(), "this node"))
    return limits


def budget_of_one_rank(limits: Iterable[MemoryLimit]) -> int:
    """Bytes of buffers that one rank may have within all `limits`."""
    return min(available // ranks - _RESERVE for ranks, available, _where in limits)


def refuse_too_large(
    case_id: str, needed_per_rank: int, local_ranks: int, available: int, where: str = "this node"
) -> None:
    """Refuse a case whose buffers do not fit into the memory of `where`.

    Raises:
        TooLarge: naming the case, the memory that it needs and the memory that is free.
    """
    needed = needed_per_rank * local_ranks
    if needed + _RESERVE * local_ranks > available:
        raise TooLarge(
            f"{case_id} needs {format_bytes(needed)} on {where} ({local_ranks} ranks x "
            f"{format_bytes(needed_per_rank)}), and of the {format_bytes(available)} that is free "
            f"{format_bytes(_RESERVE)} a rank is kept for libraries: lower --max-bytes or --nproc"
        )
