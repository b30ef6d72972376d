"""The stream that the timing loops use, the identity of a GPU, and the version of the loaded NCCL.

Python's launch costs are not in device timings: with all launches enqueued behind a gate, or captured in a graph, the
device runs one after the other without waiting for the host.
"""

from collections.abc import Callable, Sequence

import cupy
import numpy as np

from ncclbench.schedule.dtypes import Dtype
from ncclbench.schedule.phases import Collective
from ncclbench.transports.base import Call, nothing
from ncclbench.transports.cuda.cupy_protocols import CupyEvent, CupyStream
from ncclbench.transports.cuda.gpu_ownership import unusable_cupy
from ncclbench.transports.cuda.nccl_limits import adds_float8, refuse_float8

# One thread spins on a flag in pinned host memory until the host opens the gate. If the host does not (a peer died, or
# a queue is full), the gate opens by itself after `limit` nanoseconds and writes 2 to the flag.
_GATE = r"""
extern "C" __global__ void gate(volatile int* flag, unsigned long long limit) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    while (*flag == 0) {
        __nanosleep(200);
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
        if (now - start > limit) { *flag = 2; break; }
    }
}
"""


def make_current(stream: CupyStream) -> None:
    """Make `stream` CuPy's current stream permanently.

    CuPy itself enters `with` blocks of streams, for instance to fetch an array that is not contiguous. The exit of such
    a block restores the stream that was entered before it. A stream that was only made current by `use` was not
    entered. The null stream would replace it, and later launches would race with the measured ones.
    """
    stream.__enter__()


class CudaStream:
    """The stream that a transport launches on, with what is needed to time it.

    Args:
        stream: the CuPy stream.
        capture: turns launches into one call that replays them; for libraries with their own capture rules.
        device_barrier: launches a small operation of all ranks; a single rank needs none.
    """

    def __init__(
        self,
        stream: CupyStream,
        capture: Callable[[Sequence[Call]], Call] | None = None,
        device_barrier: Call = nothing,
    ) -> None:
        """Make `stream` CuPy's; the gate's flag is in pinned memory, which the device reads by the same address."""
        self.stream = stream
        self._own_capture = capture
        self._device_barrier = device_barrier
        self._pinned = cupy.cuda.alloc_pinned_memory(64)
        self._flag = np.frombuffer(self._pinned, np.int32, 1)
        self._flag[0] = 1
        self._gate = cupy.RawKernel(_GATE, "gate")
        try:
            self._gate.compile()
        except Exception as error:  # CuPy's first compilation: the compiler of its CUDA may be missing
            raise unusable_cupy(error, "--transport gloo") from error
        self.make_current()

    def make_current(self) -> None:
        """Make this CuPy's current stream again, in a process with two transports."""
        make_current(self.stream)

    def mark(self) -> CupyEvent:
        """Record an event."""
        event: CupyEvent = cupy.cuda.Event()
        event.record(self.stream)
        return event

    def seconds_between(self, start: object, end: object) -> float:
        """Seconds between two events that are complete."""
        return float(cupy.cuda.get_elapsed_time(start, end)) * 1e-3

    def hold(self, limit_seconds: float) -> None:
        """Close the gate: nothing launched from here on runs before `release`."""
        self._flag[0] = 0
        arguments = (np.uint64(self._pinned.ptr), np.uint64(int(limit_seconds * 1e9)))
        self._gate((1,), (1,), arguments)

    def release(self) -> None:
        """Open the gate."""
        if self._flag[0] == 0:
            self._flag[0] = 1

    @property
    def opened_by_itself(self) -> bool:
        """Whether the last gate reached its time limit."""
        return bool(self._flag[0] == 2)

    def device_barrier(self) -> None:
        """Launch an operation that ends only when all ranks have reached it."""
        self._device_barrier()

    def synchronize(self) -> None:
        """Wait until everything launched has run.

        Raises:
            RuntimeError: if another stream has become CuPy's current one, since this one would not wait for it.
        """
        self.stream.synchronize()
        if cupy.cuda.get_current_stream().ptr != self.stream.ptr:
            raise RuntimeError("CuPy's current stream is no longer the one that is measured")

    def capture(self, launches: Sequence[Call]) -> Call:
        """Capture `launches` in a CUDA graph; returns the call that replays it."""
        if self._own_capture is not None:
            return self._own_capture(launches)
        self.stream.begin_capture()
        for launch in launches:
            launch()
        graph = self.stream.end_capture()
        graph.upload(self.stream)
        return lambda: graph.launch(self.stream)


class BranchMarks:
    """Events at the begin of a concurrent phase and at the end of each branch; new ones for every launch.

    Iterations are enqueued long before they run, so a reused event would keep only the last one's time.
    """

    def __init__(self) -> None:
        """Have no events yet."""
        self._begun: CupyEvent | None = None
        self._ended: list[CupyEvent] = []

    def begin(self, stream: CupyStream) -> CupyEvent:
        """Record the begin of a launch on `stream`; returns the event that its branches wait for."""
        self._ended = []
        begun: CupyEvent = cupy.cuda.Event()
        self._begun = begun
        begun.record(stream)
        return begun

    def end(self, stream: CupyStream) -> CupyEvent:
        """Record the end of the next branch on `stream`; returns the event."""
        self._ended.append(cupy.cuda.Event())
        self._ended[-1].record(stream)
        return self._ended[-1]

    def last(self) -> Callable[[], list[float]]:
        """A function for the last launch; once that is complete, it returns the seconds from begin to each end."""
        begun, ended = self._begun, self._ended
        return lambda: [float(cupy.cuda.get_elapsed_time(begun, end)) * 1e-3 for end in ended]


def gpu_id(device: int) -> str:
    """The GPU's UUID, which is unique."""
    return bytes(cupy.cuda.runtime.getDeviceProperties(device)["uuid"]).hex()


def refuse_float8_here(phase: Collective, dtype: Dtype) -> None:
    """Refuse reductions of 8-bit floats if the loaded NCCL or this GPU has none.

    Raises:
        Unable: naming the library or the GPU.
    """
    if adds_float8(phase, dtype):
        from cupy.cuda import nccl  # not at the top: it loads the NCCL that CuPy finds

        refuse_float8(dtype, int(nccl.get_version()), int(cupy.cuda.Device().compute_capability))


def nccl_version() -> str:
    """Version of the NCCL that CuPy has loaded, from the library itself."""
    code = int(cupy.cuda.nccl.get_version())
    return f"{code // 10000}.{code % 10000 // 100}.{code % 100}"
