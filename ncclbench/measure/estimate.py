"""How long a case will take, guessed before anything is measured."""

from dataclasses import dataclass

from ncclbench.measure.sampling import FEWEST_SAMPLES, MAX_SAMPLES
from ncclbench.measure.timing_host import LAUNCHES_PER_BLOCK
from ncclbench.plan.plan import PlannedCase
from ncclbench.schedule.case import Timing


@dataclass(frozen=True)
class Pace:
    """What is taken for granted before anything is measured, on the slow side.

    Attributes:
        seconds: of an iteration that moves nothing.
        bytes_per_second: how fast an iteration goes through its buffers.
        start_seconds: of a process start: loading libraries, meeting, connecting.
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
HOST, GPU = Pace(100e-6, 1e9, 3.0), Pace(50e-6, 50e9, 30.0)


def pace_of(transport: str) -> Pace:
    """The pace of a transport: NCCL runs on GPUs only."""
    return GPU if transport in ("nccl", "cupy_nccl") else HOST


def estimate_seconds(planned: PlannedCase, memory_bytes: int, pace: Pace = HOST) -> float:
    """Seconds for warm-up, validation and timing; at most `max_seconds` of timing unless iterations are fixed."""
    settings = planned.settings
    each = pace.seconds + memory_bytes / pace.bytes_per_second
    block = 1
    if planned.case.timing is Timing.PIPELINED:
        block = settings.iterations or LAUNCHES_PER_BLOCK
    if settings.iterations is not None:
        timed = each * (FEWEST_SAMPLES * block if planned.case.timing is Timing.PIPELINED else settings.iterations)
    else:
        timed = min(max(settings.max_seconds, FEWEST_SAMPLES * block * each), MAX_SAMPLES * block * each)
    checks = 2 * (each + 2 * memory_bytes / pace.bytes_per_second) if settings.check else 0.0
    return timed + checks + settings.warmup * each
