"""What the GPU transports share: the stream as the timing loops see it, a GPU's identity, and the NCCL that is loaded.

Kept off the clock, Python costs nothing: with everything enqueued behind a gate, or captured in a graph, the device
runs launch after launch without waiting for the host.
"""

from collections.abc import Callable, Sequence

import cupy
import numpy as np

from ncclbench.schedule.dtypes import Dtype
from ncclbench.schedule.phases import Collective
from ncclbench.transports.base import Call, nothing
from ncclbench.transports.cuda.cupy_types import CupyEvent, CupyStream
from ncclbench.transports.cuda.gpu_ownership import unusable_cupy
from ncclbench.transports.cuda.nccl_limits import adds_float8, refuse_float8

# One thread spins on a flag in pinned host memory until the host opens the gate. If the host never does (a peer died,
# a queue is full), the gate opens by itself after `limit` nanoseconds and leaves a 2 in the flag.
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
    """Have CuPy launch on `stream` from here on, for good.

    CuPy enters and leaves `with` blocks of its own, such as to fetch an array that is not contiguous, and a block that
    is left makes that stream current which was entered before. A stream that is only in `use` was never entered: the
    null stream would take its place, and what is launched from then on would race with what is measured.
    """
    stream.__enter__()


class CudaStream:
    """The stream that a transport launches on, with what is needed to time it.

    Args:
        stream: the CuPy stream.
        capture: turns launches into one call that replays them; a library with capture rules of its own brings one.
        device_barrier: launches a small operation of all ranks; for a rank by itself there is none.
    """

    def __init__(
        self,
        stream: CupyStream,
        capture: Callable[[Sequence[Call]], Call] | None = None,
        device_barrier: Call = nothing,
    ) -> None:
        """Make it CuPy's, and put the gate's flag into pinned memory, which the device reads by the same address."""
        self.stream = stream
        self._own_capture = capture
        self._device_barrier = device_barrier
        self._pinned = cupy.cuda.alloc_pinned_memory(64)
        self._flag = np.frombuffer(self._pinned, np.int32, 1)
        self._flag[0] = 1
        self._gate = cupy.RawKernel(_GATE, "gate")
        try:
            self._gate.compile()
        except Exception as error:  # the first that CuPy compiles here: the compiler of its own CUDA may not be there
            raise unusable_cupy(error, "--transport gloo") from error
        self.make_current()

    def make_current(self) -> None:
        """Have CuPy launch here; for whoever has two transports in one process."""
        make_current(self.stream)

    def mark(self) -> CupyEvent:
        """An event, recorded now."""
        event: CupyEvent = cupy.cuda.Event()
        event.record(self.stream)
        return event

    def seconds_between(self, start: object, end: object) -> float:
        """Time between two events that have happened."""
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
        """Whether the last gate gave up waiting for the host."""
        return bool(self._flag[0] == 2)

    def device_barrier(self) -> None:
        """Launch what ends on no rank before all have come to it."""
        self._device_barrier()

    def synchronize(self) -> None:
        """Wait until everything launched has run.

        Raises:
            RuntimeError: if CuPy launches on another stream meanwhile, where nothing here waits for it.
        """
        self.stream.synchronize()
        if cupy.cuda.get_current_stream().ptr != self.stream.ptr:
            raise RuntimeError("CuPy's current stream is no longer the one that is measured")

    def capture(self, launches: Sequence[Call]) -> Call:
        """One call that replays `launches`, captured in a CUDA graph."""
        if self._own_capture is not None:
            return self._own_capture(launches)
        self.stream.begin_capture()
        for launch in launches:
            launch()
        graph = self.stream.end_capture()
        graph.upload(self.stream)
        return lambda: graph.launch(self.stream)


class BranchMarks:
    """When the branches of a concurrent phase ended, by events on their own streams; anew in every launch.

    Iterations are enqueued long before they run, so an event that is used again would only know the last of them.
    """

    def __init__(self) -> None:
        """Nothing has been launched yet."""
        self._begun: CupyEvent | None = None
        self._ended: list[CupyEvent] = []

    def begin(self, stream: CupyStream) -> CupyEvent:
        """A launch begins on `stream`; returns the event that its branches wait for."""
        self._ended = []
        begun: CupyEvent = cupy.cuda.Event()
        self._begun = begun
        begun.record(stream)
        return begun

    def end(self, stream: CupyStream) -> CupyEvent:
        """The next branch has been launched on `stream`; returns the event of its end."""
        self._ended.append(cupy.cuda.Event())
        self._ended[-1].record(stream)
        return self._ended[-1]

    def last(self) -> Callable[[], list[float]]:
        """What tells, once it has run, how long each branch of the last launch took, in seconds from its begin."""
        begun, ended = self._begun, self._ended
        return lambda: [float(cupy.cuda.get_elapsed_time(begun, end)) * 1e-3 for end in ended]


def gpu_id(device: int) -> str:
    """The GPU's UUID, which no two GPUs share."""
    return bytes(cupy.cuda.runtime.getDeviceProperties(device)["uuid"]).hex()


def refuse_float8_here(phase: Collective, dtype: Dtype) -> None:
    """Refuse to add floats of 8 bits where the NCCL that is loaded, or this GPU, cannot.

    Raises:
        Unable: saying which of them it is.
    """
    if adds_float8(phase, dtype):
        from cupy.cuda import nccl  # loads the NCCL that CuPy has found, which is not always wanted

        refuse_float8(dtype, int(nccl.get_version()), int(cupy.cuda.Device().compute_capability))


def nccl_version() -> str:
    """Version of the NCCL that CuPy has loaded, asked of the library itself."""
    code = int(cupy.cuda.nccl.get_version())
    return f"{code // 10000}.{code % 10000 // 100}.{code % 100}"
