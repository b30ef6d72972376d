"""Which GPUs the tests of one of several workers have."""

import os
import re
from pathlib import Path


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return list(filter(None, shown.split(",")))
    here = (re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").iterdir())
    return sorted((match[1] for match in here if match), key=int)


def pair_of(worker: str, gpus: list[str]) -> list[str]:
    """The two GPUs of one of several workers; jobs of two workers on one GPU would wait for each other's time slices.

    Args:
        worker: pytest-xdist's name of it, such as ``gw3``; empty without.
        gpus: all there are, by turns where there are fewer pairs than workers.
    """
    if not worker or len(gpus) < 4:
        return gpus
    first = 2 * (int(worker.removeprefix("gw")) % (len(gpus) // 2))
    return gpus[first : first + 2]
