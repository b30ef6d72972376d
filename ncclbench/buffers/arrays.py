"""Where data lives: NumPy arrays on CPUs, CuPy arrays on GPUs, one namespace for both.

Memory is checked before anything is allocated: a size that does not fit is refused, never clamped.
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

# The memory that cases keep from one another; a node's is given back.
ON_GPU = "a GPU"

# What the interpreter, the libraries and the validation need beside the buffers.
_RESERVE = 256 << 20

_MOST_COPIES = 64
_COLD_BY_ITSELF = 4
_PAGE = 4096


def allocate(schedule: Schedule, device: Device, kind: Kind = "pool", *variants: Schedule) -> Buffers:
    """The buffers of `schedule`, and of its other variants, for one rank, one-dimensional, uninitialised.

    On the host they have the schedule's element type; on a GPU they are CuPy arrays of its bits, since CuPy need not
    know every type that a library can send.
    """
    sizes = shared_buffers([schedule, *variants])
    if device == "cpu":
        return {name: _host_bytes(n).view(schedule.dtype.numpy) for name, n in sizes.items()}
    return {name: device_bytes(n, kind).view(schedule.dtype.bits) for name, n in sizes.items()}


def _host_bytes(nbytes: int) -> NDArray[np.uint8]:
    """Host memory that begins on a page, so that neither alignment nor a neighbour shows in what is measured."""
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
    """Page-locked host memory, which a device copies from and to without a detour; given back with the array."""
    import cupy

    return np.frombuffer(cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)


def uploader(device: Device) -> Callable[[Array], Array]:
    """What brings a NumPy array to `device`."""
    if device == "cpu":
        return np.asarray
    import cupy

    upload: Callable[[Array], Array] = cupy.asarray
    return upload


def free_device_memory() -> int:
    """Bytes of this rank's GPU that can be taken now."""
    import cupy

    return int(cupy.cuda.runtime.memGetInfo()[0])


def l2_bytes() -> int:
    """Size of the L2 cache of this rank's GPU."""
    import cupy

    return int(cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())["l2CacheSize"])


class Rotation(NamedTuple):
    """Sets of buffers that iterations rotate over, and whether L2 then does not hold what is touched next."""

    copies: int
    cold: bool


WARM = Rotation(1, False)


def rotation(nbytes: int, l2: int, cache: Cache, variants: int = 1) -> Rotation:
    """How a case rotates over its buffers if memory allows.

    One set of `_COLD_BY_ITSELF` times L2 is cold without: an iteration leaves only its own end in the cache, and the
    next begins elsewhere. Below some MiB no rotation of `_MOST_COPIES` or fewer can leave the cache, and one set is
    used.

    Args:
        nbytes: of one set.
        l2: bytes of the cache.
        cache: what was asked for.
        variants: through how many schedules iterations rotate as well; they and the sets meet in every pair.
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
        ranks: how many ranks share it.
        available: bytes that are free in it.
        where: its name.
    """

    ranks: int
    available: int
    where: str


def memory_limits(device: Device, staged: bool | None, local_size: int, ranks_per_gpu: int = 1) -> list[MemoryLimit]:
    """Every memory that a rank's buffers must fit into.

    Args:
        device: where the buffers are.
        staged: whether they have twins in host memory as well.
        local_size: ranks on this node.
        ranks_per_gpu: ranks on one GPU.
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
        TooLarge: naming the case, what it needs and what there is.
    """
    needed = needed_per_rank * local_ranks
    if needed + _RESERVE * local_ranks > available:
        raise TooLarge(
            f"{case_id} needs {format_bytes(needed)} on {where} ({local_ranks} ranks x "
            f"{format_bytes(needed_per_rank)}), and of the {format_bytes(available)} that is free "
            f"{format_bytes(_RESERVE)} a rank is kept for libraries: lower --max-bytes or --nproc"
        )
