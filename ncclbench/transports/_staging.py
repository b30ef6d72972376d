"""GPU buffers over MPI: passed to the library directly where it can read them, or staged through the host.

A CUDA-aware MPI takes device pointers; any other MPI crashes on them. So the library is queried first. If it says yes,
a small transfer is tried and its result checked. Otherwise each phase copies its data to pinned host memory, MPI moves
that, and the phase copies the received data back. All of it is timed, and the record has ``"staged": true``.

MPI does not know streams. Everything enqueued must be complete before MPI reads, so the stream is synchronised before
every call.
"""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, assert_never

import numpy as np
from numpy.typing import NDArray

from ncclbench.buffers.arrays import Buffers, pinned_bytes
from ncclbench.schedule.dtypes import Array
from ncclbench.schedule.phases import AllToAllV, Collective, Exchange, Local, SimplePhase
from ncclbench.schedule.row_work import RowWork
from ncclbench.schedule.schedule import Schedule
from ncclbench.schedule.symbolic_trace import pieces
from ncclbench.transports.base import Call, Split

# A range of a buffer in bytes: start and stop.
ByteRange = tuple[int, int]

_MPICH_CUDA = 0  # MPIX_GPU_SUPPORT_CUDA


class Memory(Protocol):
    """The device operations that staging needs; tests have their own implementation.

    Attributes:
        identity: unique for each GPU.
        pci: its PCI address.
    """

    identity: str
    pci: str

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Page-locked host memory, which the device reads and writes directly."""

    def to_host(self, host: Array, device: Array) -> None:
        """Enqueue a copy of bytes; both have the same length."""

    def to_device(self, device: Array, host: Array) -> None:
        """Enqueue a copy of bytes; both have the same length."""

    def synchronize(self) -> None:
        """Wait until all enqueued work is done."""


class CupyMemory:
    """This rank's GPU, through CuPy.

    Args:
        device: its index.
    """

    def __init__(self, device: int) -> None:
        """Make the GPU current, with a new stream."""
        import cupy

        from ncclbench.transports.cuda.stream import gpu_id, make_current

        self._cupy = cupy
        cupy.cuda.Device(device).use()
        self.identity = gpu_id(device)
        self.pci = cupy.cuda.runtime.deviceGetPCIBusId(device)
        self.stream = cupy.cuda.Stream(non_blocking=True)
        make_current(self.stream)

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Page-locked host memory, freed with the array."""
        return pinned_bytes(nbytes)

    def to_host(self, host: Array, device: Any) -> None:
        """Enqueue a copy from the device."""
        self._copy(host.ctypes.data, device.data.ptr, host.nbytes, self._cupy.cuda.runtime.memcpyDeviceToHost)

    def to_device(self, device: Any, host: Array) -> None:
        """Enqueue a copy to the device."""
        self._copy(device.data.ptr, host.ctypes.data, host.nbytes, self._cupy.cuda.runtime.memcpyHostToDevice)

    def _copy(self, target: int, source: int, nbytes: int, kind: int) -> None:
        self._cupy.cuda.runtime.memcpyAsync(target, source, nbytes, kind, self.stream.ptr)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self.stream.synchronize()


def library_says_cuda(maps: Path = Path("/proc/self/maps")) -> bool:
    """Whether the MPI library in this process says that it takes device pointers, by Open MPI's or MPICH's query."""
    for path in sorted(
        {line.split()[-1] for line in maps.read_text().splitlines() if "libmpi" in line and "/" in line}
    ):
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        if hasattr(library, "MPIX_Query_cuda_support"):
            return bool(library.MPIX_Query_cuda_support())
        if hasattr(library, "MPIX_GPU_query_support"):
            answer = ctypes.c_int(0)
            library.MPIX_GPU_query_support(ctypes.c_int(_MPICH_CUDA), ctypes.byref(answer))
            return bool(answer.value)
    return False


def transfer_arrives(memory: Memory, send: Array, recv: Array, exchange: Callable[[Array, Array], object]) -> bool:
    """Whether a small transfer between two device buffers of bytes arrives complete.

    Args:
        memory: the device.
        send: filled with a pattern before the transfer.
        recv: filled with other values before; must hold the pattern afterwards.
        exchange: sends the first buffer into the second by MPI.
    """
    host = memory.pinned(len(send))
    pattern = np.resize(np.arange(251, dtype=np.uint8), len(send))
    for device, values in ((recv, ~pattern), (send, pattern)):
        host[:] = values
        memory.to_device(device, host)
        memory.synchronize()
    exchange(send, recv)
    memory.to_host(host, recv)
    memory.synchronize()
    return bool(np.array_equal(host, pattern))


class Staging:
    """Host copies of a schedule's device buffers, and calls that go through them.

    Args:
        memory: the device.
        schedule: the schedule that uses the buffers.
        buffers: the buffers on the device.
        rank: this rank.

    Attributes:
        twins: the buffers on the host, by the same names.
    """

    def __init__(self, memory: Memory, schedule: Schedule, buffers: Buffers, rank: int) -> None:
        """Allocate the twins."""
        self._memory, self._itemsize, self._rank = memory, schedule.dtype.itemsize, rank
        self._device = {name: buffer.view(np.uint8) for name, buffer in buffers.items()}
        self._host = {name: memory.pinned(buffer.nbytes) for name, buffer in buffers.items()}
        self.twins: Buffers = {name: host.view(schedule.dtype.numpy) for name, host in self._host.items()}

    def around(self, phase: SimplePhase, call: Call) -> Call:
        """`call`, which works on the host copies, as a call on the device's buffers."""
        reads = merged(sent_by(phase, self._rank, self._itemsize))
        writes = merged(written_by(phase, self._rank, self._itemsize))

        def copy_to_host() -> None:
            for start, stop in reads:
                self._memory.to_host(self._host[phase.read][start:stop], self._device[phase.read][start:stop])
            self._memory.synchronize()

        def copy_to_device() -> None:
            for start, stop in writes:
                self._memory.to_device(self._device[phase.write][start:stop], self._host[phase.write][start:stop])
            self._memory.synchronize()

        return _between(copy_to_host, call, copy_to_device)


def after_synchronising(memory: Memory, call: Call) -> Call:
    """`call`, which works on device buffers, after all work enqueued before it is done."""
    return _between(memory.synchronize, call, None)


def _between(before: Call, call: Call, after: Call | None) -> Call:
    if isinstance(call, Split):
        return Split(_all_of(before, call.start), _all_of(call.wait, after) if after else call.wait)
    return _all_of(before, call, *([after] if after else []))


def _all_of(*calls: Call) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def sent_by(phase: SimplePhase, rank: int, itemsize: int) -> Iterator[ByteRange]:
    """The ranges of its `read` buffer that a rank reads in `phase`."""
    match phase:
        case Exchange():
            for k in np.flatnonzero(phase.src == rank):
                start = int(phase.send_offset[k])
                yield start, start + int(phase.nbytes[k])
        case AllToAllV():
            for group, member in np.argwhere(phase.groups == rank).tolist():
                yield 0, int(phase.splits(group, member)[0].sum())
        case Collective():
            if np.any(phase.groups == rank):
                yield 0, phase.read_count * itemsize
        case Local() | RowWork():  # these run on the device
            return
        case _:
            assert_never(phase)


def written_by(phase: SimplePhase, rank: int, itemsize: int) -> Iterator[ByteRange]:
    """The ranges of its `write` buffer that a rank writes in `phase`; nothing else may be copied back."""
    for piece in pieces(phase, rank, itemsize):
        if piece.sources:  # without sources the content is undefined, and is not copied back
            yield piece.start * itemsize, piece.stop * itemsize


def merged(ranges: Iterator[ByteRange]) -> list[ByteRange]:
    """The same bytes in the fewest ranges, without empty ones."""
    joined: list[ByteRange] = []
    for start, stop in sorted(ranges):
        if start == stop:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return joined
