"""Summaries of durations: medians with non-parametric intervals, and percentiles if there are enough samples."""

import numpy as np
from numpy.typing import NDArray

from ncclbench.analysis.intervals import median_interval as median_interval
from ncclbench.store.records import Skew, Summary

Floats = NDArray[np.float64]

MICRO = 1e6
# With fewer samples, a percentile is little more than the largest sample.
MIN_SAMPLES_P95 = 20
MIN_SAMPLES_P99 = 100


def summarise(seconds: Floats) -> Summary:
    """Summarize durations in seconds; the summary is in microseconds.

    Raises:
        ValueError: if there are no samples.
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
    """Half the width of the median's interval over the median; infinite if there is no interval."""
    if summary.p50_lo is None or summary.p50_hi is None or summary.p50 <= 0:
        return float("inf")
    return (summary.p50_hi - summary.p50_lo) / 2 / summary.p50


def skew(seconds_RN: Floats) -> Skew:
    """Longest minus shortest rank of each iteration, in microseconds, from durations in seconds."""
    spread = (seconds_RN.max(axis=0) - seconds_RN.min(axis=0)) * MICRO
    return Skew(p50=float(np.median(spread)), max=float(spread.max()))
