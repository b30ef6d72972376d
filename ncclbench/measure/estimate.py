"""How long a case will take, guessed before anything is measured."""

from ncclbench.measure.regimes import LAUNCHES_PER_BLOCK
from ncclbench.measure.sampling import FEWEST_SAMPLES, MAX_SAMPLES
from ncclbench.plan import PlannedCase
from ncclbench.schedule.case import Timing

# Between a laptop's gloo (200 us, 1 GB/s) and a GPU (10 us, 300 GB/s), on the slow side.
_SECONDS_AN_ITERATION = 100e-6
_BYTES_PER_SECOND = 1e9


def estimate_seconds(planned: PlannedCase, memory_bytes: int) -> float:
    """Seconds for warm-up, validation and timing; at most `max_seconds` of timing unless iterations are fixed."""
    settings = planned.settings
    each = _SECONDS_AN_ITERATION + memory_bytes / _BYTES_PER_SECOND
    block = 1
    if planned.case.timing is Timing.PIPELINED:
        block = settings.iterations or LAUNCHES_PER_BLOCK
    if settings.iterations is not None:
        timed = each * (FEWEST_SAMPLES * block if planned.case.timing is Timing.PIPELINED else settings.iterations)
    else:
        timed = min(max(settings.max_seconds, FEWEST_SAMPLES * block * each), MAX_SAMPLES * block * each)
    checks = 2 * (each + 2 * memory_bytes / _BYTES_PER_SECOND) if settings.check else 0.0
    return timed + checks + settings.warmup * each
