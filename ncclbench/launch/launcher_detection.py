"""Detect the launcher, and this process's rank in its job: the one table of launchers' variables.

Nothing heavy is imported, because ranks read these variables before they load a library.

Each launcher sets its own variables. Half a set means a broken script, and is refused. So is a job that is really
several independent jobs: without this check each would measure a world of one and look healthy.
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

# Set by `ncclbench.launch.local_ranks` for the ranks it starts itself.
LOCAL_STORE = "NCCLBENCH_STORE"
LOCAL_STORE_FD = "NCCLBENCH_STORE_FD"
LOCAL_PARENT = "NCCLBENCH_PARENT"
# Set by `ncclbench.launch.mpiexec` for the ranks of the mpiexec that it starts itself.
OWN_START = "NCCLBENCH_OWN_START"


@dataclass(frozen=True)
class Launcher:
    """The variables by which a launcher tells a process its rank.

    Attributes:
        name: as in the manifest.
        rank: variable of the rank.
        size: variable of the world size.
        local_rank: variable of the rank's number on this node.
        local_size: variable of the number of ranks on this node; None where the launcher has none.
        also: further variables that must be set.
        marker: the variable that identifies this launcher; by default, any of `rank` and `size`.
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
        """What this launcher would set for `rank` of `size` ranks on one node."""
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
# SLURM_NTASKS is set in a batch script as well, where nothing was started yet; the step's variables are not.
_SLURM = Launcher("slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", None, marker="SLURM_STEP_NUM_TASKS")
# Set by torchrun's agent, also where the rank's own variables were overwritten.
_TORCHRUN_ID = "TORCHELASTIC_RUN_ID"

# Ranks that `ncclbench.launch.local_ranks` starts have torchrun's variables, and a store of their own.
LOCAL = replace(_TORCHRUN, name="local", also=(LOCAL_STORE,), marker=LOCAL_STORE)

# The first that is present is the one that is used: torchrun may itself have been started by one of the others.
LAUNCHERS = (
    LOCAL,
    _TORCHRUN,
    _OPEN_MPI,
    # Slurm and Flux speak PMI as well, without the rank's number on the node, which their own variables tell.
    replace(_HYDRA, marker=_HYDRA.local_rank),
    _SLURM,
    Launcher("flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", None, marker="FLUX_TASK_RANK"),
    _HYDRA,
)


def detect(environ: Mapping[str, str]) -> RankIdentity | None:
    """This process's rank and how it meets the others, or None if no launcher started it.

    Raises:
        EnvironmentFault: if a launcher's variables are incomplete, are no numbers, contradict each other, or if
            several independent jobs were started instead of one.
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
    from ncclbench.transports.base import RankIdentity  # NumPy comes with it

    rank, size = _number(launcher.rank, environ), _number(launcher.size, environ)
    local_rank = _number(launcher.local_rank, environ)
    local_size = _number(launcher.local_size, environ) if launcher.local_size else _slurm_local_size(environ, size)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise EnvironmentFault(
            f"{launcher.name} says rank {rank} of {size}, and {local_rank} of {local_size} on this node, "
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
            "only ncclbench itself sets it, for ranks that it starts"
        )
    return host, int(port)


def _number(name: str, environ: Mapping[str, str]) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise EnvironmentFault(f"{name} must be a whole number, and is {environ[name]!r}") from None


def _slurm_local_size(environ: Mapping[str, str], size: int) -> int:
    """Tasks on this node: Slurm gives them for all nodes at once, as ``2(x3),1``."""
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
    """An outer launcher started several processes, and the inner one made a job of its own in each."""
    if any(not environ.get(name) for name in (outer.rank, outer.size)):
        return
    outer_size = _number(outer.size, environ)
    # torchrun says how many agents make up its job. An mpirun inside a Slurm allocation may use fewer nodes than
    # Slurm has started its daemons on, so of others only worlds of one are certain to be jobs of their own.
    agents = _number("GROUP_WORLD_SIZE", environ) if "GROUP_WORLD_SIZE" in environ else outer_size
    if outer_size > 1 and (identity.world_size == 1 or agents < outer_size):
        raise EnvironmentFault(
            f"{outer.name} started {outer_size} processes, but {identity.launcher} makes a job of "
            f"{identity.world_size} in each: these are {outer_size} independent jobs, not one. "
            "Start the ranks with one launcher only"
        )


def is_rank_0(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one that prints: rank 0 of its job, or started alone."""
    found = detect(environ)
    return found is None or found.rank == 0


def own_rank(environ: Mapping[str, str] = os.environ) -> str:
    """This process's rank as its launcher's environment has it, before anything is checked; "0" without one."""
    ranks = (environ.get(launcher.rank) for launcher in (_TORCHRUN, _OPEN_MPI, _HYDRA, _SLURM))
    return next((rank for rank in ranks if rank), "0")


def under_mpiexec(environ: Mapping[str, str]) -> bool:
    """Whether an mpiexec started this process directly; under torchrun that is torchrun's affair."""
    by_mpiexec = _OPEN_MPI.rank in environ or _HYDRA.local_rank in environ
    return "LOCAL_WORLD_SIZE" not in environ and by_mpiexec


def ends_with_first_rank(environ: Mapping[str, str]) -> bool:
    """Whether the launcher is one of those that end the whole job with the first rank that ends."""
    return any(name in environ for name in (_OPEN_MPI.rank, _HYDRA.rank, _TORCHRUN_ID))


def ends_with_failed_rank(environ: Mapping[str, str]) -> bool:
    """Whether the launcher is certain to end this rank as soon as another has ended in an error."""
    known = any(name in environ for name in (_OPEN_MPI.rank, _TORCHRUN_ID))
    return known or hydra_descriptor(environ) is not None


def hydra_descriptor(environ: Mapping[str, str]) -> int | None:
    """Where Hydra listens to this rank; None where another launcher has started it, or MPI has the descriptor now."""
    text = environ.get("PMI_FD", "")
    ours = _HYDRA.local_rank in environ and "LOCAL_WORLD_SIZE" not in environ and "mpi4py.MPI" not in sys.modules
    return int(text) if ours and text.isdecimal() else None


def is_rank_of_mpiexec(variables: Iterable[str]) -> bool:
    """Whether a process with these variables, each as ``NAME=VALUE``, is a rank that an mpiexec has started."""
    return any(item.startswith((f"{_OPEN_MPI.rank}=", f"{_HYDRA.rank}=")) for item in variables)


def without_rank(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` for a process that is no rank, although its parent may be one."""
    return {name: value for name, value in environ.items() if not name.startswith(("OMPI_COMM_WORLD", "PMI"))}


def job_size(environ: Mapping[str, str]) -> str | None:
    """How many ranks the job has, as its launcher says it; None if it does not."""
    sizes = (environ.get(launcher.size) for launcher in (_TORCHRUN, _SLURM, _OPEN_MPI))
    return next((size for size in sizes if size), None)


def slurm_step_nodes(environ: Mapping[str, str]) -> str | None:
    """How many nodes this Slurm step has, as text."""
    return environ.get("SLURM_STEP_NUM_NODES")


def slurm_allocation_nodes(environ: Mapping[str, str]) -> int:
    """How many nodes the Slurm allocation around this process has; 0 outside of one."""
    nodes = environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES") or ""
    return int(nodes) if environ.get("SLURM_JOB_ID") and nodes.isdecimal() else 0


def slurm_step(environ: Mapping[str, str]) -> tuple[str, int, int]:
    """Node list, job and number of this Slurm step.

    Raises:
        KeyError, ValueError: if Slurm has not set them, or not as numbers.
    """
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_NODELIST"]
    return nodes, int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_STEP_ID", "0"))
