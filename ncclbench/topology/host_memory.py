"""The host memory that is free, for buffers and for the tables that schedules are made of."""

import os
from collections.abc import Iterator
from pathlib import Path


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory that can be allocated now: what the kernel has, or what the control groups leave of it.

    A limit may be set at any level above this process's own group, in version 1 or 2 of control groups.
    """
    left = [_left_in(folder, files) for folder, files in _memory_groups(proc, cgroup)]
    return min([_meminfo(proc / "meminfo"), *(free for free in left if free is not None)])


# Of each version: the limit, what is used, and the line of memory.stat with cached files that can be dropped.
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _memory_groups(proc: Path, cgroup: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folders of this process's control groups and of those above them, with the names of their files.

    Inside a container the path may not exist below `cgroup`, which then is the container's own group.
    """
    yield cgroup, _VERSION_2
    yield cgroup / "memory", _VERSION_1
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        root, files = (cgroup / "memory", _VERSION_1) if controllers else (cgroup, _VERSION_2)
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for depth in range(1, len(parts) + 1):
            yield root.joinpath(*parts[:depth]), files


def _left_in(folder: Path, files: tuple[str, str, str]) -> int | None:
    """What a control group leaves of its limit; None if there is no such group, or no limit."""
    limit_file, used_file, cached = files
    limit, used = _number(folder / limit_file), _number(folder / used_file)
    if limit is None or used is None:
        return None
    return max(0, limit - max(0, used - _droppable(folder / "memory.stat", cached)))


def _droppable(path: Path, name: str) -> int:
    """Bytes of cached files that the kernel gives up before it refuses memory."""
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
        return int(fields.get(name, 0))
    except (OSError, ValueError):
        return 0


def _meminfo(path: Path) -> int:
    try:
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass  # not Linux: only the total is known
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return None
