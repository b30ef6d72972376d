"""What the options of ``ncclbench run`` ask for: the plan, the transport, how many ranks, and where they sit."""

import os
from typing import Any

from ncclbench.errors import EnvironmentFault, UsageError

_MOST_RANKS_HERE = 1024
_ON_CPUS = ("gloo", "threads")  # these transports have no use for a GPU


def plan_of(options: dict[str, Any]) -> Any:
    """The plan: a file's, or one made of the command line."""
    from ncclbench.plan.plan import Entry, make_plan, read_plan

    names = ("iterations", "warmup", "precision", "max_seconds", "check", "timeout", "seed", "cache", "buffers")
    overrides = {name: options[name] for name in names if options[name] is not None}
    if options["plan_name"] is not None:
        own = {
            "min_bytes": "-b",
            "max_bytes": "-e",
            "factor": "-f",
            "dtypes": "--dtype",
            "timings": "--timing",
            "params": "--param",
        }
        for name, flag in own.items():
            if options[name] not in (None, ()):
                raise UsageError(f"{flag} does not go with --plan, which has its own; edit a copy of the plan")
        return read_plan(options["plan_name"], overrides, only=options["patterns"])
    if not options["patterns"]:
        raise UsageError("name a pattern (see `ncclbench list patterns`) or a plan with --plan")
    shared = Entry(
        min_bytes=8,
        max_bytes="64M",
        timing=list(options["timings"]) or "isolated",
        params=_params(options["params"]),
    )
    # What was said of sizes and types is each pattern's own, so that one which has no use for it can refuse it.
    said = {name: options[name] for name in ("min_bytes", "max_bytes", "factor")}
    said["dtype"] = list(options["dtypes"]) or None
    entries = [Entry(pattern=pattern, **said) for pattern in options["patterns"]]
    return make_plan("-".join(options["patterns"])[:60], entries, shared, "command line", overrides=overrides)


def _params(pairs: tuple[str, ...]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise UsageError(f"--param must be NAME=VALUE, got {pair!r}")
        if name in params:
            raise UsageError(f"--param {name} is given twice")
        params[name] = value
    return params


def choose_transport(name: str, launcher: str | None, elsewhere: str | None = None) -> str:
    """The transport to use; its libraries are looked for, not imported.

    Ranks that --launcher starts `elsewhere` see for themselves what there is.
    """
    from importlib.util import find_spec

    from ncclbench.config.plugins import exists, names
    from ncclbench.config.refusals import unknown
    from ncclbench.topology.visible_gpus import gpus_are_meant

    if elsewhere is not None and name in ("auto", *names("transports")):
        return name
    if name == "auto":
        name = "nccl" if gpus_are_meant() else "gloo"
        if launcher in ("openmpi", "mpich") and find_spec("torch") is None:
            name = "mpi"
    if not exists("transports", name):
        raise UsageError(unknown("transport", name, ["auto", *names("transports")]))
    if name in ("gloo", "nccl") and find_spec("torch") is None:
        raise EnvironmentFault(
            f"the {name} transport needs torch, which is not installed: pip install 'ncclbench[cpu]' "
            "(or [gpu]); --transport threads needs nothing"
        )
    if name == "mpi" and find_spec("mpi4py") is None:
        raise EnvironmentFault(
            "the mpi transport needs mpi4py, which is not installed: pip install mpi4py, and openmpi (or mpich) where "
            "the machine has no MPI library of its own"
        )
    return name


def nproc_of(options: dict[str, Any], transport: str) -> int:
    """How many ranks to start here: as asked, or one a GPU that is seen, or on CPUs one a core, 2 to 8."""
    from importlib.util import find_spec

    from ncclbench.topology.visible_gpus import gpus_here

    nproc: int | None = options["nproc"]
    if nproc is None:
        on_cpus = transport in _ON_CPUS or options["device"] == "cpu"
        on_cpus |= transport == "mpi" and options["device"] == "auto" and not find_spec("cupy")
        return (0 if on_cpus else gpus_here()) or max(2, min(8, os.cpu_count() or 2))
    if not 1 <= nproc <= _MOST_RANKS_HERE:
        raise UsageError(f"--nproc must be 1 to {_MOST_RANKS_HERE}, got {nproc}")
    return nproc


def topology_file(options: dict[str, Any]) -> Any:
    """What --topology names, read and checked; None without it."""
    from ncclbench.topology.topology_file import read_topology

    return read_topology(options["topology_file"]) if options["topology_file"] else None


def planned_topology(nproc: int, options: dict[str, Any]) -> Any:
    """Where ranks that have not started will sit: one node, or by --topology."""
    from ncclbench.topology import Topology
    from ncclbench.topology.placement import plan_placement

    found = topology_file(options)
    return plan_placement(found, nproc) if found else Topology.single_node(nproc)
