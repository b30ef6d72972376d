"""The one seam to everything that moves data: what a transport must offer, and nothing about how.

A transport *compiles* a schedule into a program of ready calls before anything is timed; the timed loop does nothing
but call them. Control traffic (decisions, samples) goes through `Control`, over a CPU group or MPI, never over the
fabric that is measured and never as pickle.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from ncclbench.buffers.arrays import Buffers
from ncclbench.buffers.kinds import Device
from ncclbench.schedule.dtypes import Array
from ncclbench.schedule.schedule import Schedule
from ncclbench.transports.capabilities import Capabilities

Call = Callable[[], object]
# What a library says of itself, as plain JSON data: names, versions, counters; which of them, it decides.
Facts: TypeAlias = Mapping[str, Any]


def nothing() -> None:
    """Do nothing: the step of a rank that has no part in a phase."""


@dataclass(frozen=True)
class Split:
    """A call in two halves, between which a rank may do something else; called as a whole it blocks."""

    start: Call
    wait: Call

    def __call__(self) -> None:
        """Start it, and wait."""
        self.start()
        self.wait()


@dataclass(frozen=True)
class Step:
    """One phase of a program.

    Attributes:
        label: its name in samples.
        launch: launches it.
        parts: names of branches whose durations are known by themselves.
        part_seconds: asked after a launch, returns what tells, once that launch is complete, the seconds from its start
            to each branch's end; None without parts.
        launches: how many operations it puts on a stream, at most; a gated queue must hold all of them.
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
        steps: one a phase, in order.
        finish: waits until everything launched is complete; `nothing` where launching blocks.
        notes: what a reader of the result must know about how it was run.
    """

    steps: tuple[Step, ...]
    finish: Call = nothing
    notes: tuple[str, ...] = ()

    def run(self) -> None:
        """One whole iteration."""
        for step in self.steps:
            step.launch()
        self.finish()

    @property
    def complete(self) -> Call:
        """The barest call that is one whole iteration: where launching blocks, a single phase's own launch."""
        return self.steps[0].launch if len(self.steps) == 1 and self.finish is nothing else self.run


# The network interface of control messages, where it is not to be that of the messages measured.
CONTROL_NETWORK = "NCCLBENCH_CONTROL_IFNAME"
# Set to 1, ranks may share GPUs; see `ncclbench.transports.cuda.gpu_ownership`.
SHARE_GPU = "NCCLBENCH_SHARE_GPU"


class Control(Protocol):
    """A few collectives for the suite's own small messages; arrays have the same shape and type on all ranks."""

    def gather(self, array: Array) -> Array | None:
        """All ranks' arrays stacked in rank order, on rank 0; None elsewhere."""

    def all_gather(self, array: Array) -> Array:
        """All ranks' arrays stacked in rank order, on every rank."""

    def broadcast(self, array: Array) -> Array:
        """Rank 0's array, on every rank."""


class DeviceStream(Protocol):
    """A stream of work on a device that runs behind the host, as the timing loops see it."""

    def mark(self) -> Any:
        """An event, recorded now."""

    def seconds_between(self, start: Any, end: Any) -> float:
        """Time on the device's clock between two events that have happened."""

    def hold(self, limit_seconds: float) -> None:
        """Close a gate: nothing launched from here on runs before `release`, or before the limit is over."""

    def release(self) -> None:
        """Open the gate."""

    @property
    def opened_by_itself(self) -> bool:
        """Whether the last gate's limit was over before `release`."""

    def line_up(self) -> None:
        """Launch what ends on no rank before all have come to it; the host waits for nothing."""

    def synchronize(self) -> None:
        """Wait until everything launched has run."""

    def capture(self, launches: Sequence[Call]) -> Call:
        """One call that replays `launches` as one graph."""


class Transport(ABC):
    """Moves data for one rank. A transport inherits from this class, which has defaults for what few transports have.

    Attributes:
        name: as on the command line and in records.
        capabilities: what its module declares.
        rank: this rank.
        world_size: how many there are.
        device: where the buffers of `compile` must live.
        stream: what programs launch on, where launching does not block; None on the host.
        control: for the suite's own messages.
        staged: whether GPU buffers go through the host; None where buffers are there anyway, or never.
        ranks_per_gpu: ranks on the GPU with most of them.
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

        Communicators are created here, once a group, in the same order on all ranks.

        Raises:
            Unable: if this library cannot do it; the case is skipped with that reason.
            TransportError: if the library fails.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Return when all ranks have called it."""

    @abstractmethod
    def translating(self, what: str) -> AbstractContextManager[None]:
        """Inside, the library's own errors become a `TransportError` that names `what` and this rank."""

    @abstractmethod
    def describe(self) -> Facts:
        """Versions and settings for the manifest."""

    def evidence(self) -> Facts:
        """What the library says of the path it took (`path`), and the state of this rank's GPU (`gpu`).

        Asked before and after each case, of transports that have a stream.
        """
        return {}

    def trouble(self) -> str | None:
        """An asynchronous error of the library, in its words; any thread may ask, while a call does not return."""
        return None

    def silent(self, ranks: Sequence[int], seconds: float) -> list[int] | None:
        """Those of `ranks` that do not answer on the measured network within `seconds`; all ranks call it at once.

        None, on all ranks alike, from a transport that cannot ask.
        """
        del ranks, seconds
        return None

    @abstractmethod
    def close(self) -> None:
        """Give everything back; all ranks call it."""


@dataclass(frozen=True, kw_only=True)
class RankIdentity:
    """Which rank this process is, and how it reaches the others.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: how many ranks there are.
        local_rank: place among the ranks of this node.
        local_size: ranks on this node.
        launcher: who started it: ``local``, ``torchrun``, ``openmpi``, ...
        device: where buffers are to be, for a transport that can have them on a GPU and on the host: ``auto``,
            ``cpu`` or ``cuda``.
        address: host and port of rank 0's store, where the launcher's environment does not say it itself.
        listen_fd: on rank 0, a socket that already listens on that port, so that no other process takes it meanwhile.
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
