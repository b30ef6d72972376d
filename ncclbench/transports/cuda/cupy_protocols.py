"""Types for the parts of CuPy that are used, since CuPy has none; importing this needs no CuPy."""

from collections.abc import Callable
from typing import Protocol


class CupyEvent(Protocol):
    """A `cupy.cuda.Event`."""

    def record(self, stream: "CupyStream") -> None:
        """Record the time at which all work launched on `stream` so far is done."""


class Graph(Protocol):
    """A `cupy.cuda.Graph`."""

    def upload(self, stream: "CupyStream") -> None:
        """Prepare it for launches on `stream`."""

    def launch(self, stream: "CupyStream") -> None:
        """Launch it on `stream`."""


class CupyStream(Protocol):
    """A `cupy.cuda.Stream`, or one that another library made."""

    @property
    def ptr(self) -> int:
        """CUDA's handle."""

    def __enter__(self) -> object:
        """Make this stream current, until the matching exit."""

    def use(self) -> object:
        """Make this stream current, until another stream is used."""

    def synchronize(self) -> None:
        """Wait until all work launched on this stream is done."""

    def wait_event(self, event: CupyEvent) -> None:
        """Have later launches on this stream wait for `event`."""

    def begin_capture(self) -> None:
        """Capture later launches in a graph."""

    def end_capture(self) -> Graph:
        """End the capture and return the graph."""


class RawModule(Protocol):
    """A `cupy.RawModule`."""

    def get_function(self, name: str) -> Callable[..., object]:
        """The kernel called `name`."""


class Communicator(Protocol):
    """A `cupy.cuda.nccl.NcclCommunicator`: addresses, counts, and numbers of `nccl.h` for types and reductions."""

    @property
    def comm(self) -> int:
        """NCCL's own pointer."""

    def allReduce(self, send: int, recv: int, count: int, dtype: int, op: int, stream: int) -> None:
        """``ncclAllReduce``."""

    def reduceScatter(self, send: int, recv: int, count: int, dtype: int, op: int, stream: int) -> None:
        """``ncclReduceScatter``."""

    def allGather(self, send: int, recv: int, count: int, dtype: int, stream: int) -> None:
        """``ncclAllGather``."""

    def broadcast(self, send: int, recv: int, count: int, dtype: int, root: int, stream: int) -> None:
        """``ncclBroadcast``."""

    def reduce(self, send: int, recv: int, count: int, dtype: int, op: int, root: int, stream: int) -> None:
        """``ncclReduce``."""

    def send(self, buffer: int, count: int, dtype: int, peer: int, stream: int) -> None:
        """``ncclSend``."""

    def recv(self, buffer: int, count: int, dtype: int, peer: int, stream: int) -> None:
        """``ncclRecv``."""

    def destroy(self) -> None:
        """``ncclCommDestroy``."""
