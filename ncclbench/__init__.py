"""Collective-communication benchmark and acceptance suite for GPU clusters.

The package measures how fast collectives and point-to-point patterns really go, with the slowest rank of every
iteration as the headline, and keeps every sample. ``docs/architecture.md`` shows its packages, ``docs/api.md`` what a
program may call: the names below, and all of `ncclbench.api`.

Importing this package loads nothing heavy: torch, mpi4py, cupy, NumPy and pandas are loaded by what needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ncclbench.accept.request import AcceptRequest
    from ncclbench.api import LoadedRun, compare, import_logs, load_run, load_runs, run
    from ncclbench.launch.request import RunRequest

__version__ = "0.1.0"

__all__ = [
    "AcceptRequest",
    "LoadedRun",
    "RunRequest",
    "__version__",
    "compare",
    "import_logs",
    "load_run",
    "load_runs",
    "run",
]

# Name -> its module. `accept` is a package, so the function of that name is `ncclbench.api.accept` alone.
_HOMES = {
    "AcceptRequest": "ncclbench.accept.request",
    "RunRequest": "ncclbench.launch.request",
    **dict.fromkeys(("LoadedRun", "compare", "import_logs", "load_run", "load_runs", "run"), "ncclbench.api"),
}


def __getattr__(name: str) -> object:
    """A public name, loaded when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted({*globals(), *_HOMES})
