"""Non-parametric intervals of medians and quantiles, from order statistics."""

from fractions import Fraction
from functools import cache

import numpy as np

CONFIDENCE = 0.95
# Up to this n, exact arithmetic takes under a millisecond. Importing scipy.stats delays the first result of a run by a
# second; exact arithmetic takes as long only from 100,000 samples on.
_MOST_EXACT = 1000


@cache
def median_interval(n: int, confidence: float = CONFIDENCE) -> tuple[int, int] | None:
    """The indices, from 0, of the order statistics that bound the median of `n` samples; None below 6 at 95%.

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


def quantile_interval(n: int, q: float, confidence: float = 0.95) -> tuple[int, int] | None:
    """The indices, from 0, of the order statistics that bound the quantile `q` of `n` samples; None if n is too small.

    The number of samples below the true quantile is binomial(n, q), whatever the distribution. Source: Conover,
    Practical Nonparametric Statistics, section 3.2.
    """
    # Logarithms, since factorials overflow for large n.
    k = np.arange(n + 1, dtype=np.float64)
    logs = np.cumsum(np.log(np.arange(1, n + 1, dtype=np.float64)))
    factorial = np.concatenate([[0.0], logs])
    chance = factorial[n] - factorial - factorial[::-1] + k * np.log(q) + (n - k) * np.log1p(-q)
    below = np.cumsum(np.exp(chance))
    tail = (1.0 - confidence) / 2
    low = int(np.searchsorted(below, tail, side="right")) - 1
    high = int(np.searchsorted(below, 1.0 - tail, side="left"))
    return (low, high) if low >= 0 and high < n else None
