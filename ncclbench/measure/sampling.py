"""The number of iterations: until the median's interval is narrow enough, or the time limit is reached.

Samples are gathered in batches. After each batch, rank 0 decides the size of the next and broadcasts it, so that all
ranks agree.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ncclbench.analysis.summary import Floats, relative_width, summarise
from ncclbench.transports.base import Control

MIN_SAMPLES = 20
# The fewest samples that give a 95% interval of the median.
FEWEST_SAMPLES = 6
MAX_SAMPLES = 10_000
_LARGEST_BATCH = 1_000


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When to stop; it depends on durations only.

    Attributes:
        fixed: a number of samples set beforehand, or None.
        precision: see `Settings`.
        max_seconds: see `Settings`.
        multiple: every batch is a multiple of it, so that each variant of a case is measured equally often.
    """

    fixed: int | None
    precision: float
    max_seconds: float
    multiple: int = 1

    def whole(self, samples: int) -> int:
        """`samples`, or the next larger multiple."""
        return samples + -samples % self.multiple

    def first(self, seconds_each: float) -> int:
        """Size of the first batch; `seconds_each` is the approximate time of a sample."""
        if self.fixed is not None:
            return self.whole(self.fixed)
        affordable = self.max_seconds / max(seconds_each, 1e-9)
        return self.whole(int(min(MIN_SAMPLES, max(FEWEST_SAMPLES, affordable))))

    def next(self, slowest_N: Floats, elapsed: float) -> tuple[int, str]:
        """Size of the next batch and, if it is 0, what stopped: ``iterations``, ``precision`` or ``time``.

        Args:
            slowest_N: the duration of the slowest rank in each iteration so far.
            elapsed: seconds since the first batch began, including all work between samples.
        """
        n = len(slowest_N)
        if self.fixed is not None:
            return 0, "iterations"
        # Every variant needs enough samples for its own interval.
        if (
            n >= max(MIN_SAMPLES, FEWEST_SAMPLES * self.multiple)
            and relative_width(summarise(slowest_N)) <= self.precision
        ):
            return 0, "precision"
        if n >= MAX_SAMPLES:
            return 0, "iterations"
        affordable = int((self.max_seconds - elapsed) / (elapsed / n)) if elapsed > 0 else n
        batch = min(n, affordable, _LARGEST_BATCH, MAX_SAMPLES - n)
        return (self.whole(batch), "") if batch > 0 else (0, "time")


@dataclass(frozen=True)
class Samples:
    """Durations in seconds of all ranks, shape (R, N, columns). Rank 0 only.

    Attributes:
        labels: one per column.
        seconds_RNK: NaN where an iteration has no such phase.
        stopped: what stopped the sampling.
        mixed: whether a sample is a mean over several variants of the case.
    """

    labels: list[str]
    seconds_RNK: Floats = field(repr=False)
    stopped: str
    mixed: bool = False

    @property
    def slowest_N(self) -> Floats:
        """The duration of the slowest rank in each iteration, t_i."""
        return np.asarray(self.seconds_RNK[:, :, 0].max(axis=0))


def collect(
    measure: Callable[[int], Floats],
    labels: list[str],
    rule: Rule,
    control: Control,
    clock: Callable[[], float],
    seconds_each: float,
) -> Samples | None:
    """Measure in batches until `rule` stops; returns the samples on rank 0, None elsewhere.

    Args:
        measure: times a batch of the given size on this rank; shape (batch, columns).
        labels: one per column.
        rule: when to stop.
        control: gathers samples and broadcasts batch sizes.
        clock: seconds, monotonic.
        seconds_each: a first estimate from the warm-up.
    """
    batches: list[Floats] = []
    batch = int(control.broadcast(np.array([rule.first(seconds_each)], np.int64))[0])
    stopped = "iterations"
    began = clock()
    while batch:
        gathered = control.gather(measure(batch))
        if gathered is not None:
            batches.append(gathered)
            slowest = np.concatenate([b[:, :, 0].max(axis=0) for b in batches])
            batch, stopped = rule.next(slowest, clock() - began)
        batch = int(control.broadcast(np.array([batch], np.int64))[0])
    if not batches:
        return None
    return Samples(labels, np.concatenate(batches, axis=1), stopped)
