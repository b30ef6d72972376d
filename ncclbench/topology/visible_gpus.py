"""The GPUs that a rank started on this host would see, without CUDA: a launcher must not open a context."""

import os
import re
from collections.abc import Mapping
from pathlib import Path


def gpus_here(environ: Mapping[str, str] = os.environ, dev: Path = Path("/dev")) -> int:
    """The GPUs in `dev`, as far as ``CUDA_VISIBLE_DEVICES`` shows them.

    The variable lists indices or UUIDs (``GPU-...``, ``MIG-...``). Entries after the first that names no GPU are not
    visible either (CUDA C++ Programming Guide, "CUDA Environment Variables"). A UUID is not looked up. Of MIG
    instances a process sees only the first.
    """
    there, shown = _there(dev), environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None or there == 0:
        return there
    seen: dict[str, None] = {}
    for name in map(str.strip, shown.split(",")):
        if name in seen or not _names_a_gpu(name, there):
            break
        seen[name] = None
        if name.startswith("MIG-"):
            break
    return len(seen)


def gpus_are_meant(environ: Mapping[str, str] = os.environ, dev: Path = Path("/dev")) -> bool:
    """Whether ranks on this host must use GPUs: there are GPUs, and ``CUDA_VISIBLE_DEVICES`` does not hide them all.

    All ranks must agree. A rank whose variable names a GPU that is not there counts as one that must use GPUs; it
    fails later with a message.
    """
    return _there(dev) > 0 and environ.get("CUDA_VISIBLE_DEVICES", "all").strip() not in ("", "-1", "NoDevFiles")


def _there(dev: Path) -> int:
    return sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in dev.glob("nvidia*"))


def _names_a_gpu(name: str, there: int) -> bool:
    return int(name) < there if name.isdecimal() else name.startswith(("GPU-", "MIG-"))
