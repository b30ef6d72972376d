"""Intervals of medians that assume nothing about the distribution; over iterations, and over whole runs."""

from fractions import Fraction
from functools import cache

CONFIDENCE = 0.95
# Up to here exact arithmetic takes under a millisecond. Importing scipy.stats takes a second, which every run would
# spend before its first result; exact arithmetic takes that long from 100,000 samples on.
_MOST_EXACT = 1000


@cache
def median_interval(n: int, confidence: float = CONFIDENCE) -> tuple[int, int] | None:
    """The order statistics that bound the median of `n` samples, from 0; None if there are none (n < 6 at 95%).

    The number of samples below the true median is binomial(n, 1/2), whatever the distribution. Source: Conover,
    Practical Nonparametric Statistics, section 3.2.
    """
    tail = (1.0 - confidence) / 2.0
    below = _exact_quantile(tail, n) if n <= _MOST_EXACT else _quantile(tail, n)
    return (below - 1, n - below) if below else None


def _exact_quantile(tail: float, n: int) -> int:
    """The smallest k for which a binomial(n, 1/2) variable is at most k with a probability above `tail`."""
    scaled_tail = Fraction(tail) * 2**n
    k, outcomes, total = 0, 1, 1
    while total <= scaled_tail:
        outcomes = outcomes * (n - k) // (k + 1)
        k += 1
        total += outcomes
    return k


def _quantile(tail: float, n: int) -> int:
    from scipy.stats import binom

    return int(binom.ppf(tail, n, 0.5))
