"""Detect the launcher and this process's rank; the one table of the launchers' variables.

Ranks read these variables before they load a library, so this module imports nothing heavy.

Each launcher sets its own variables. An incomplete set means a broken script and is refused. Several independent jobs
that look like one are refused too: otherwise each would measure a world of one and appear healthy.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ncclbench.errors import EnvironmentFault

if TYPE_CHECKING:
    from ncclbench.transports.base import RankIdentity

# Set by `ncclbench.launch.local_ranks` for the ranks that it starts.
LOCAL_STORE = "NCCLBENCH_STORE"
LOCAL_STORE_FD = "NCCLBENCH_STORE_FD"
LOCAL_PARENT = "NCCLBENCH_PARENT"
# Set by `ncclbench.launch.mpiexec` for the mpiexec that it starts and its ranks.
OWN_START = "NCCLBENCH_OWN_START"


@dataclass(frozen=True)
class Launcher:
    """The variables in which a launcher passes a process its rank.

    Attributes:
        name: the launcher's name in the manifest.
        rank: variable of the rank.
        size: variable of the world size.
        local_rank: variable of the local rank on this node.
        local_size: variable of the number of ranks on this node; None if the launcher has none.
        also: further required variables.
        marker: the variable that identifies this launcher; by default `rank` or `size`.
    """

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str | None
    also: tuple[str, ...] = ()
    marker: str | None = None

    @property
    def required(self) -> tuple[str, ...]:
        """All variables that must be set together."""
        own = (self.rank, self.size, self.local_rank, self.local_size, *self.also)
        return tuple(name for name in own if name is not None)

    def present(self, environ: Mapping[str, str]) -> bool:
        """Whether this launcher started the process."""
        markers = (self.marker,) if self.marker else (self.rank, self.size)
        return any(name in environ for name in markers)

    def variables(self, rank: int, size: int) -> dict[str, str]:
        """The variables that this launcher would set for `rank` of `size` ranks on one node."""
        values = {self.rank: rank, self.size: size, self.local_rank: rank}
        if self.local_size:
            values[self.local_size] = size
        return {name: str(value) for name, value in values.items()}


_HYDRA = Launcher("mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")

_TORCHRUN = Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", ("MASTER_ADDR", "MASTER_PORT"))
_OPEN_MPI = Launcher(
    "openmpi",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
# A batch script has SLURM_NTASKS too, before any task is started. The variables of the step exist only in tasks.
_SLURM = Launcher("slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", None, marker="SLURM_STEP_NUM_TASKS")
# Set by torchrun's agent; it remains if the rank's own variables are overwritten.
_TORCHRUN_ID = "TORCHELASTIC_RUN_ID"

# Ranks that `ncclbench.launch.local_ranks` starts have torchrun's variables and LOCAL_STORE.
LOCAL = replace(_TORCHRUN, name="local", also=(LOCAL_STORE,), marker=LOCAL_STORE)

# In order of precedence: torchrun may itself have been started by one of the launchers after it.
LAUNCHERS = (
    LOCAL,
    _TORCHRUN,
    _OPEN_MPI,
    # Slurm and Flux set PMI's rank and size too, but not the local rank, which their own variables have.
    replace(_HYDRA, marker=_HYDRA.local_rank),
    _SLURM,
    Launcher("flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", None, marker="FLUX_TASK_RANK"),
    _HYDRA,
)


def detect(environ: Mapping[str, str]) -> RankIdentity | None:
    """This process's rank and rendezvous address; None if no launcher started it.

    Raises:
        EnvironmentFault: if a launcher's variables are incomplete, not numbers, or contradictory, or if several
            independent jobs were started instead of one.
    """
    present = [launcher for launcher in LAUNCHERS if launcher.present(environ)]
    if not present:
        return None
    chosen = present[0]
    identity = _read_identity(chosen, environ)
    for outer in present[1:]:
        if not _same_variables(outer, chosen):
            _refuse_independent_jobs(identity, outer, environ)
    return identity


def _same_variables(one: Launcher, other: Launcher) -> bool:
    return one.rank == other.rank


def _read_identity(launcher: Launcher, environ: Mapping[str, str]) -> RankIdentity:
    missing = [name for name in launcher.required if not environ.get(name)]
    if missing:
        there = [name for name in launcher.required if environ.get(name)]
        raise EnvironmentFault(
            f"{launcher.name} has set {', '.join(there)} but not {', '.join(missing)}: "
            "start the job with a launcher, or unset them to start ranks with --nproc"
        )
    from ncclbench.transports.base import RankIdentity  # it imports NumPy

    rank, size = _number(launcher.rank, environ), _number(launcher.size, environ)
    local_rank = _number(launcher.local_rank, environ)
    local_size = _number(launcher.local_size, environ) if launcher.local_size else _slurm_local_size(environ, size)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise EnvironmentFault(
            f"{launcher.name} says rank {rank} of {size} and local rank {local_rank} of {local_size}, "
            "which contradict each other"
        )
    return RankIdentity(
        rank=rank,
        world_size=size,
        local_rank=local_rank,
        local_size=local_size,
        launcher=launcher.name,
        address=_local_store(environ) if launcher.name == "local" else None,
        listen_fd=_number(LOCAL_STORE_FD, environ) if environ.get(LOCAL_STORE_FD) else None,
    )


def _local_store(environ: Mapping[str, str]) -> tuple[str, int]:
    host, _, port = environ[LOCAL_STORE].partition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise EnvironmentFault(
            f"{LOCAL_STORE} must be HOST:PORT, and is {environ[LOCAL_STORE]!r}: unset it; "
            "only ncclbench sets it, for the ranks that it starts"
        )
    return host, int(port)


def _number(name: str, environ: Mapping[str, str]) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise EnvironmentFault(f"{name} must be a whole number, and is {environ[name]!r}") from None


def _slurm_local_size(environ: Mapping[str, str], size: int) -> int:
    """Number of tasks on this node, from Slurm's list for all nodes, such as ``2(x3),1``."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    node = _number("SLURM_NODEID", environ) if environ.get("SLURM_NODEID") else 0
    counts: list[int] = []
    try:
        for part in text.split(",") if text else []:
            tasks, _, times = part.partition("(x")
            counts += [int(tasks)] * int(times.rstrip(")") or 1)
    except ValueError:
        raise EnvironmentFault(f"SLURM_STEP_TASKS_PER_NODE must be like 2(x3),1, and is {text!r}") from None
    return counts[node] if node < len(counts) else size


def _refuse_independent_jobs(identity: RankIdentity, outer: Launcher, environ: Mapping[str, str]) -> None:
    """Refuse an outer launcher of several processes in each of which the inner launcher made a separate job."""
    if any(not environ.get(name) for name in (outer.rank, outer.size)):
        return
    outer_size = _number(outer.size, environ)
    # torchrun states the number of agents in its job. An mpirun inside a Slurm allocation may use fewer nodes than it
    # has daemons on. For launchers other than torchrun, only a world of one is certainly a separate job.
    agents = _number("GROUP_WORLD_SIZE", environ) if "GROUP_WORLD_SIZE" in environ else outer_size
    if outer_size > 1 and (identity.world_size == 1 or agents < outer_size):
        raise EnvironmentFault(
            f"{outer.name} started {outer_size} processes, but {identity.launcher} makes a job of "
            f"{identity.world_size} in each: these are {outer_size} independent jobs, not one. "
            "Start the ranks with one launcher only"
        )


def is_rank_0(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process prints results: it is rank 0, or no launcher started it."""
    identity = detect(environ)
    return identity is None or identity.rank == 0


def own_rank(environ: Mapping[str, str] = os.environ) -> str:
    """This process's rank as text, read from the variables without any check; "0" without a launcher."""
    ranks = (environ.get(launcher.rank) for launcher in (_TORCHRUN, _OPEN_MPI, _HYDRA, _SLURM))
    return next((rank for rank in ranks if rank), "0")


def under_mpiexec(environ: Mapping[str, str]) -> bool:
    """Whether an mpiexec started this process directly, and not through torchrun."""
    by_mpiexec = _OPEN_MPI.rank in environ or _HYDRA.local_rank in environ
    return "LOCAL_WORLD_SIZE" not in environ and by_mpiexec


def ends_with_first_rank(environ: Mapping[str, str]) -> bool:
    """Whether the launcher ends the whole job with the first rank that ends."""
    return any(name in environ for name in (_OPEN_MPI.rank, _HYDRA.rank, _TORCHRUN_ID))


def ends_with_failed_rank(environ: Mapping[str, str]) -> bool:
    """Whether the launcher certainly ends this rank as soon as another rank fails."""
    known = any(name in environ for name in (_OPEN_MPI.rank, _TORCHRUN_ID))
    return known or hydra_descriptor(environ) is not None


def hydra_descriptor(environ: Mapping[str, str]) -> int | None:
    """The descriptor on which Hydra reads from this rank; None under other launchers, or once MPI uses it."""
    text = environ.get("PMI_FD", "")
    ours = _HYDRA.local_rank in environ and "LOCAL_WORLD_SIZE" not in environ and "mpi4py.MPI" not in sys.modules
    return int(text) if ours and text.isdecimal() else None


def is_rank_of_mpiexec(variables: Iterable[str]) -> bool:
    """Whether a process with these variables, each as ``NAME=VALUE``, is a rank of an mpiexec."""
    return any(item.startswith((f"{_OPEN_MPI.rank}=", f"{_HYDRA.rank}=")) for item in variables)


def without_rank(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without the variables that make a child process a rank of this process's MPI job."""
    return {name: value for name, value in environ.items() if not name.startswith(("OMPI_COMM_WORLD", "PMI"))}


def job_size(environ: Mapping[str, str]) -> str | None:
    """The number of ranks of the job as text; None if the launcher does not set it."""
    sizes = (environ.get(launcher.size) for launcher in (_TORCHRUN, _SLURM, _OPEN_MPI))
    return next((size for size in sizes if size), None)


def slurm_step_nodes(environ: Mapping[str, str]) -> str | None:
    """The number of nodes of this Slurm step as text."""
    return environ.get("SLURM_STEP_NUM_NODES")


def slurm_allocation_nodes(environ: Mapping[str, str]) -> int:
    """The number of nodes of the Slurm allocation; 0 outside of one."""
    nodes = environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES") or ""
    return int(nodes) if environ.get("SLURM_JOB_ID") and nodes.isdecimal() else 0


def slurm_step(environ: Mapping[str, str]) -> tuple[str, int, int]:
    """Node list, job id and step id of this Slurm step.

    Raises:
        KeyError, ValueError: if a variable is missing or not a number.
    """
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_NODELIST"]
    return nodes, int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_STEP_ID", "0"))
