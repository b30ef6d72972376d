"""Intervals of medians that assume nothing about the distribution; over iterations, and over whole runs."""

from fractions import Fraction
from functools import cache

CONFIDENCE = 0.95


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
