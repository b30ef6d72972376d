"""From a request to a prepared run: its plan, its transport, the number of ranks, and the topology."""

import datetime
import os
from dataclasses import dataclass
from pathlib import Path

from ncclbench.config.plugins import exists, names
from ncclbench.config.refusals import unknown
from ncclbench.errors import UsageError
from ncclbench.launch.listener import Listener
from ncclbench.launch.request import RunRequest
from ncclbench.plan.plan import Entry, Plan, make_plan, read_plan
from ncclbench.topology import Topology
from ncclbench.topology.file_model import TopologyFile
from ncclbench.topology.placement import plan_placement
from ncclbench.topology.topology_file import read_topology
from ncclbench.topology.visible_gpus import gpus_are_meant, gpus_here
from ncclbench.transports.capabilities import Hosting, automatic, capabilities_of

_MOST_RANKS_HERE = 1024


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A request with what was decided for it; the same on all ranks, except `listener`.

    Attributes:
        request: the request.
        plan: the cases.
        transport: name of the transport.
        out: the run directory.
        listener: receives the events on rank 0.
        topology: a topology file that places the ranks; None to place them by host names.
        start: number of this process start; None for the first that is not finished.
    """

    request: RunRequest
    plan: Plan
    transport: str
    out: Path
    listener: Listener
    topology: TopologyFile | None = None
    start: int | None = None


def plan_of(request: RunRequest) -> Plan:
    """Read the plan that the request names, or make one from its patterns, sizes and dtypes.

    Raises:
        UsageError: if the plan or the options are invalid.
    """
    if request.plan is not None:
        for value, flag in (
            (request.min_bytes, "-b"),
            (request.max_bytes, "-e"),
            (request.factor, "-f"),
            (request.dtypes, "--dtype"),
            (request.timings, "--timing"),
            (request.params, "--param"),
        ):
            if value not in (None, (), {}):
                raise UsageError(f"{flag} does not go with --plan; change a copy of the plan instead")
        return read_plan(request.plan, request, only=request.patterns)
    if not request.patterns:
        raise UsageError("name a pattern (see `ncclbench list patterns`) or a plan with --plan")
    shared = Entry(
        min_bytes=8,
        max_bytes="64M",
        timing=list(request.timings) or "isolated",
        params=dict(request.params),
    )
    # Sizes and dtypes go into each entry, not into the defaults: a pattern that does not use them then refuses them.
    entries = [
        Entry(
            pattern=pattern,
            min_bytes=request.min_bytes,
            max_bytes=request.max_bytes,
            factor=request.factor,
            dtype=list(request.dtypes) or None,
        )
        for pattern in request.patterns
    ]
    return make_plan("-".join(request.patterns)[:60], entries, shared, "command line", overrides=request)


def default_run_directory(name: str) -> Path:
    """The run directory if -o names none: a plan or profile, the time and the process id."""
    return Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"


def choose_transport(name: str, launcher: str | None, elsewhere: str | None = None, *, dry_run: bool = False) -> str:
    """Choose the transport and check that its packages are installed, without importing them.

    Args:
        name: the requested transport, or ``auto``.
        launcher: the name of the launcher that started this process.
        elsewhere: the command of ``--launcher``; its ranks choose the transport on their own hosts.
        dry_run: skip the check for packages, because a forecast needs none of them.

    Raises:
        UsageError: if there is no such transport.
        EnvironmentFault: if a package is not installed.
    """
    if elsewhere is not None and name in ("auto", *names("transports")):
        return name
    if name == "auto":
        name = automatic(launcher, gpus=gpus_are_meant())
    if not exists("transports", name):
        raise UsageError(unknown("transport", name, ["auto", *names("transports")]))
    if not dry_run:
        capabilities_of(name).refuse_without_packages()
    return name


def nproc_of(request: RunRequest, transport: str) -> int:
    """The number of ranks to start here: --nproc, or one per visible GPU, or on CPUs one per core, 2 to 8."""
    nproc, capabilities = request.nproc, capabilities_of(transport)
    if nproc is None:
        on_cpus = capabilities.on_cpus(request.device)
        return (0 if on_cpus else gpus_here()) or max(2, min(8, os.cpu_count() or 2))
    if nproc < 1 or (nproc > _MOST_RANKS_HERE and capabilities.hosting is not Hosting.NONE):
        raise UsageError(f"--nproc must be 1 to {_MOST_RANKS_HERE}, got {nproc}")
    return nproc


def topology_of(request: RunRequest) -> TopologyFile | None:
    """Read and check the topology file that the request names; None without one."""
    return read_topology(request.topology) if request.topology else None


def planned_topology(nproc: int, request: RunRequest) -> Topology:
    """The topology of ranks that have not started: by the topology file, or all on one node."""
    file = topology_of(request)
    return plan_placement(file, nproc) if file else Topology.single_node(nproc)
