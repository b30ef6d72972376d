"""Summaries of durations: medians with non-parametric intervals, percentiles only where there are enough samples."""

from fractions import Fraction
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ncclbench.store.records import Skew, Summary

Floats = NDArray[np.float64]

MICRO = 1e6
CONFIDENCE = 0.95
# Below these a percentile would be little more than the largest sample under another name.
MIN_SAMPLES_P95 = 20
MIN_SAMPLES_P99 = 100


@cache
def median_interval(n: int, confidence: float = CONFIDENCE) -> tuple[int, int] | None:
    """Which order statistics bound the median of `n` samples, counted from 0; None where none can (n < 6 at 95%).

    The number of samples below the true median is binomial(n, 1/2), whatever the distribution. Source: Conover,
    Practical Nonparametric Statistics, section 3.2.
    """
    # Exact in whole numbers. scipy has this too, and the tests compare; importing it would cost the first result of
    # every run a sixth of a second.
    tail = Fraction((1.0 - confidence) / 2.0) * 2**n
    below, outcomes, total = 0, 1, 1
    while total <= tail:
        outcomes = outcomes * (n - below) // (below + 1)
        below += 1
        total += outcomes
    return (below - 1, n - below) if below else None


def summarise(seconds: Floats) -> Summary:
    """The summary of durations in seconds, in microseconds.

    Raises:
        ValueError: without samples.
    """
    if len(seconds) == 0:
        raise ValueError("no samples to summarise")
    us = np.sort(seconds) * MICRO
    n, mean = len(us), float(us.mean())
    interval = median_interval(n)
    return Summary(
        n=n,
        min=float(us[0]),
        p50=float(np.median(us)),
        p50_lo=float(us[interval[0]]) if interval else None,
        p50_hi=float(us[interval[1]]) if interval else None,
        p95=float(np.quantile(us, 0.95)) if n >= MIN_SAMPLES_P95 else None,
        p99=float(np.quantile(us, 0.99)) if n >= MIN_SAMPLES_P99 else None,
        max=float(us[-1]),
        mean=mean,
        cv=float(us.std(ddof=1) / mean) if n > 1 and mean > 0 else None,
    )


def relative_width(summary: Summary) -> float:
    """Half the width of the median's interval over the median; infinite where there is no interval."""
    if summary.p50_lo is None or summary.p50_hi is None or summary.p50 <= 0:
        return float("inf")
    return (summary.p50_hi - summary.p50_lo) / 2 / summary.p50


def skew(seconds_RN: Floats) -> Skew:
    """Max - min over the ranks of each iteration, in microseconds."""
    spread = (seconds_RN.max(axis=0) - seconds_RN.min(axis=0)) * MICRO
    return Skew(p50=float(np.median(spread)), max=float(spread.max()))
