"""The interface of a transport, which moves data for one rank.

A transport *compiles* a schedule into a program of ready calls before anything is timed. The timed loop only calls
them. Control messages (decisions, samples) go through `Control`, over a CPU group or MPI. They are never pickled.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import msgspec
import numpy as np

from ncclbench.buffers.arrays import Buffers
from ncclbench.buffers.kinds import Device
from ncclbench.schedule.dtypes import Array
from ncclbench.schedule.schedule import Schedule
from ncclbench.store.records import GpuState, PathRecord
from ncclbench.transports.capabilities import Capabilities

Call = Callable[[], object]
# Versions and settings of a library, as plain JSON data. Each library has its own keys.
Facts: TypeAlias = Mapping[str, object]


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank's library and GPU report before or after a case.

    Attributes:
        path: the path of the data, as the library logged it; None if it logged none.
        gpu: the state of the rank's GPU; None without a GPU or without NVML.
    """

    path: PathRecord | None = None
    gpu: GpuState | None = None


def nothing() -> None:
    """Do nothing: the call of a rank that takes no part in a phase."""


@dataclass(frozen=True)
class Split:
    """A call in two halves, between which a rank may compute; calling the object runs both and blocks."""

    start: Call
    wait: Call

    def __call__(self) -> None:
        """Start, then wait."""
        self.start()
        self.wait()


@dataclass(frozen=True)
class Step:
    """One phase of a program.

    Attributes:
        label: its name in samples.
        launch: launches the phase.
        parts: names of the branches that are timed separately.
        part_seconds: called after a launch, returns a function; once the launch is complete, that function returns the
            seconds from the launch's start to each branch's end. None without parts.
        launches: an upper limit for the operations that the phase puts on a stream; a gated queue must hold them all.
    """

    label: str
    launch: Call
    parts: tuple[str, ...] = ()
    part_seconds: Callable[[], Callable[[], Sequence[float]]] | None = None
    launches: int = 1


@dataclass(frozen=True)
class Program:
    """A compiled schedule.

    Attributes:
        steps: one per phase, in order.
        finish: waits until everything launched is complete; `nothing` where launching blocks.
        notes: notes for the record on how the schedule is run.
    """

    steps: tuple[Step, ...]
    finish: Call = nothing
    notes: tuple[str, ...] = ()

    def run(self) -> None:
        """Run one whole iteration."""
        for step in self.steps:
            step.launch()
        self.finish()

    @property
    def complete(self) -> Call:
        """The shortest call for one whole iteration: for a single phase whose launch blocks, the launch itself."""
        return self.steps[0].launch if len(self.steps) == 1 and self.finish is nothing else self.run


# The network interface of control messages, if it differs from that of the measured messages.
CONTROL_NETWORK = "NCCLBENCH_CONTROL_IFNAME"
# If set to 1, ranks may share GPUs; see `ncclbench.transports.cuda.gpu_ownership`.
SHARE_GPU = "NCCLBENCH_SHARE_GPU"


class Control(Protocol):
    """Collectives for ncclbench's own small messages; arrays have the same shape and type on all ranks."""

    def gather(self, array: Array) -> Array | None:
        """All ranks' arrays stacked in rank order, on rank 0; None elsewhere."""

    def all_gather(self, array: Array) -> Array:
        """All ranks' arrays stacked in rank order, on every rank."""

    def broadcast(self, array: Array) -> Array:
        """Rank 0's array, on every rank."""


class DeviceStream(Protocol):
    """A stream of a device, which runs asynchronously to the host, as the timing loops use it."""

    def mark(self) -> object:
        """Record an event."""

    def seconds_between(self, start: object, end: object) -> float:
        """Seconds on the device's clock between two events that are complete."""

    def hold(self, limit_seconds: float) -> None:
        """Close a gate: nothing launched from here on runs before `release`, or before the limit has passed."""

    def release(self) -> None:
        """Open the gate."""

    @property
    def opened_by_itself(self) -> bool:
        """Whether the last gate's limit passed before `release`."""

    def device_barrier(self) -> None:
        """Launch an operation that ends only when all ranks have reached it; the host does not wait."""

    def synchronize(self) -> None:
        """Wait until everything launched has run."""

    def capture(self, launches: Sequence[Call]) -> Call:
        """Capture `launches` in one graph; returns the call that replays it."""


class Transport(ABC):
    """Moves data for one rank; the base class of all transports, with defaults for what few of them have.

    Attributes:
        name: as on the command line and in records.
        capabilities: what its module declares.
        rank: this rank.
        world_size: number of ranks.
        device: where the buffers of `compile` must be.
        stream: the stream of its programs, where launching does not block; None on the host.
        control: for ncclbench's own messages.
        staged: whether GPU buffers go through the host; None if the transport has no such choice.
        ranks_per_gpu: the largest number of ranks on one GPU.
        registered: whether the buffers of the last program are registered with the library, on all ranks.
    """

    name: str
    capabilities: Capabilities
    rank: int
    world_size: int
    device: Device
    stream: DeviceStream | None = None
    control: Control
    staged: bool | None = None
    ranks_per_gpu: int = 1
    registered: bool = False

    @abstractmethod
    def compile(self, schedule: Schedule, buffers: Buffers) -> Program:
        """Ready calls for this rank's part of `schedule` on these buffers.

        Communicators are created here, once per group, in the same order on all ranks.

        Raises:
            Unable: if the library cannot run the schedule; the case is skipped with that reason.
            TransportError: if the library fails.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Return when all ranks have called it."""

    @abstractmethod
    def translating(self, what: str) -> AbstractContextManager[None]:
        """Convert the library's errors inside to a `TransportError` that names `what` and this rank."""

    @abstractmethod
    def describe(self) -> Facts:
        """Versions and settings for the manifest."""

    def evidence(self) -> Evidence:
        """The path that the library logged, and the state of this rank's GPU.

        It is called before and after each case, on transports that have a stream.
        """
        return Evidence()

    def trouble(self) -> str | None:
        """The library's asynchronous error; any thread may call this while a launch does not return."""
        return None

    def unreachable(self, ranks: Sequence[int], seconds: float) -> list[int] | None:
        """Those of `ranks` that do not answer on the measured network within `seconds`; all ranks call it.

        A transport that cannot test this returns None on all ranks.
        """
        del ranks, seconds
        return None

    @abstractmethod
    def close(self) -> None:
        """Release all resources; all ranks call it."""


@dataclass(frozen=True, kw_only=True)
class RankIdentity:
    """Which rank this process is, and how it reaches the others.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: number of ranks.
        local_rank: index among the ranks of this node.
        local_size: number of ranks on this node.
        launcher: what started it: ``local``, ``torchrun``, ``openmpi``, ...
        device: where buffers must be, for transports that can have them on GPUs and on the host: ``auto``, ``cpu`` or
            ``cuda``.
        address: host and port of rank 0's store, if the launcher's environment does not have it.
        listen_fd: on rank 0, a socket that already listens on that port, so that no other process can take it.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    launcher: str
    device: str = "auto"
    address: tuple[str, int] | None = None
    listen_fd: int | None = None


def all_gather_text(control: Control, text: str) -> list[str]:
    """Every rank's text, in rank order."""
    raw = np.frombuffer(text.encode(), dtype=np.uint8)
    lengths = control.all_gather(np.array([len(raw)], np.int64)).ravel()
    padded = np.zeros(max(1, int(lengths.max())), np.uint8)
    padded[: len(raw)] = raw
    rows = control.all_gather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths.tolist(), strict=True)]


def broadcast_text(control: Control, text: str) -> str:
    """Rank 0's text."""
    raw = np.frombuffer(text.encode(), dtype=np.uint8)
    length = int(control.broadcast(np.array([len(raw)], np.int64))[0])
    padded = np.zeros(max(1, length), np.uint8)
    padded[: min(length, len(raw))] = raw[:length]
    return bytes(control.broadcast(padded)[:length]).decode()
