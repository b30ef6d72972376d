"""Which GPUs a rank started here would see, asked without CUDA: who starts the ranks opens no context of its own."""

import os
import re
from collections.abc import Mapping
from pathlib import Path


def gpus_here(environ: Mapping[str, str] = os.environ, dev: Path = Path("/dev")) -> int:
    """The GPUs in `dev`, as far as ``CUDA_VISIBLE_DEVICES`` shows them.

    The variable lists indices or UUIDs (``GPU-...``, ``MIG-...``), and what follows the first that names no GPU is not
    seen either (CUDA C++ Programming Guide, "CUDA Environment Variables"). Whether a UUID names one is not asked. Of
    MIG instances a process sees the first alone.
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
    """Whether what runs here is to run on GPUs: there are some, and nobody has hidden them all.

    All ranks must answer alike. A rank that is shown a GPU that is not there means one, and is told so later.
    """
    return _there(dev) > 0 and environ.get("CUDA_VISIBLE_DEVICES", "all").strip() not in ("", "-1", "NoDevFiles")


def _there(dev: Path) -> int:
    return sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in dev.glob("nvidia*"))


def _names_a_gpu(name: str, there: int) -> bool:
    return int(name) < there if name.isdecimal() else name.startswith(("GPU-", "MIG-"))
