"""How many GPUs a rank started here would see, asked without CUDA: who starts the ranks opens no context of its own."""

import os
import re
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path


def gpus_here(environ: Mapping[str, str] = os.environ, dev: Path = Path("/dev")) -> int:
    """The GPUs in `dev`, as far as ``CUDA_VISIBLE_DEVICES`` shows them.

    The variable lists indices or UUIDs (``GPU-...``, ``MIG-...``), and what follows the first that names no GPU is not
    seen either (CUDA C++ Programming Guide, "CUDA Environment Variables"). Whether a UUID names one is not asked.
    """
    there = sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in dev.glob("nvidia*"))
    shown = environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None or there == 0:
        return there
    return len([*takewhile(lambda name: _names_a_gpu(name, there), map(str.strip, shown.split(",")))])


def _names_a_gpu(name: str, there: int) -> bool:
    return int(name) < there if name.isdecimal() else name.startswith(("GPU-", "MIG-"))
