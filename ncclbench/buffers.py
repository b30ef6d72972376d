"""Where data lives: NumPy arrays on CPUs, CuPy arrays on GPUs, one namespace for both.

Memory is checked before anything is allocated: a size that does not fit is refused, never clamped.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ncclbench.errors import UsageError
from ncclbench.schedule.dtypes import Array
from ncclbench.schedule.schedule import Schedule
from ncclbench.units import format_bytes

Device = Literal["cpu", "cuda"]
Buffers = Mapping[str, Array]

# What the interpreter, the libraries and the validation need beside the buffers.
_RESERVE = 256 << 20


def allocate(schedule: Schedule, device: Device) -> Buffers:
    """The buffers of `schedule` for one rank, as one-dimensional arrays of its element type, uninitialised."""
    namespace = namespace_of(device)
    itemsize = schedule.dtype.itemsize
    return {
        name: namespace.empty(nbytes // itemsize * itemsize, np.uint8).view(schedule.dtype.numpy)
        for name, nbytes in schedule.buffers.items()
    }


def namespace_of(device: Device) -> Any:
    """NumPy or CuPy."""
    if device == "cpu":
        return np
    import cupy

    return cupy


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory that can be taken now: what the kernel has, or what the control group leaves of it."""
    free = _meminfo(proc / "meminfo")
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used))
    return free


def _meminfo(path: Path) -> int:
    try:
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass  # not Linux: the total is the best there is
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return None


def refuse_too_large(case_id: str, needed_per_rank: int, local_ranks: int, available: int) -> None:
    """Refuse a case whose buffers do not fit into this node's memory.

    Raises:
        UsageError: naming the case, what it needs and what there is.
    """
    needed = needed_per_rank * local_ranks
    if needed + _RESERVE > available:
        raise UsageError(
            f"{case_id} needs {format_bytes(needed)} on this node ({local_ranks} ranks x "
            f"{format_bytes(needed_per_rank)}), and {format_bytes(available)} is free: lower --max-bytes or --nproc"
        )
