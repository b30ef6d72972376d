"""The statistics of a comparison, for all cases at once.

Letters: C cases, M starts of BASE, N starts of NEW, B bootstrap draws. Times are logarithms: a ratio is a difference.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DRAWS = 2000
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Statistics:
    """The statistics of C cases; all arrays have shape (C,).

    Attributes:
        ratio: median over NEW's starts over the median over BASE's starts.
        low: lower end of the 95% interval of `ratio`, by bootstrap over the starts of both sides.
        high: upper end of the 95% interval of `ratio`.
        p_slower: one-sided p-value that NEW is slower: Student's t-test of the logarithms of the starts' medians.
        p_faster: one-sided p-value that NEW is faster, by the same test.
        p_kruskal: p-value of the Kruskal-Wallis test of the starts' medians.
        delta: Cliff's delta, -1 to 1: P(a start of NEW is slower than one of BASE) - P(it is faster).
    """

    ratio: Floats
    low: Floats
    high: Floats
    p_slower: Floats
    p_faster: Floats
    p_kruskal: Floats
    delta: Floats


def compute(base_CM: Floats, new_CN: Floats, seed: int = 0) -> Statistics:
    """Compare the starts of both sides, which must have at least three starts together.

    Args:
        base_CM: logarithm of the median time of each case in each start of BASE.
        new_CN: logarithm of the median time of each case in each start of NEW.
        seed: seed of the bootstrap.
    """
    shift_C = np.median(new_CN, axis=1) - np.median(base_CM, axis=1)
    low_C, high_C = bootstrap(base_CM, new_CN, seed)
    p_slower_C, p_faster_C = student(base_CM, new_CN)
    return Statistics(
        ratio=np.exp(shift_C),
        low=np.exp(low_C),
        high=np.exp(high_C),
        p_slower=p_slower_C,
        p_faster=p_faster_C,
        p_kruskal=kruskal(base_CM, new_CN),
        delta=cliff(base_CM, new_CN),
    )


def bootstrap(base_CM: Floats, new_CN: Floats, seed: int) -> tuple[Floats, Floats]:
    """The 95% percentile interval of the difference of medians, starts drawn with replacement on both sides."""
    rng = np.random.default_rng(seed)
    picks = [rng.integers(0, side.shape[1], (DRAWS, side.shape[1])) for side in (base_CM, new_CN)]
    shift_CB = np.empty((len(base_CM), DRAWS))
    for k in range(len(base_CM)):  # one case at a time: all together need C x B x N numbers
        shift_CB[k] = np.median(new_CN[k][picks[1]], axis=1) - np.median(base_CM[k][picks[0]], axis=1)
    low_C, high_C = np.quantile(shift_CB, [0.025, 0.975], axis=1)
    return low_C, high_C


def student(base_CM: Floats, new_CN: Floats) -> tuple[Floats, Floats]:
    """One-sided p-values of the two-sample t-test with a common variance: NEW is slower, NEW is faster.

    If the times of a case do not vary at all (a model computed them), any difference is certain.
    """
    from scipy import stats

    shift_C = new_CN.mean(axis=1) - base_CM.mean(axis=1)
    # Rounding of the logarithms is not variation.
    constant_C = (np.ptp(base_CM, axis=1) < _ROUNDING) & (np.ptp(new_CN, axis=1) < _ROUNDING)
    sure_C = np.where(np.abs(shift_C) < _ROUNDING, 0.5, np.where(shift_C > 0, 1.0, 0.0))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # SciPy warns if a side does not vary
        p_faster_C = stats.ttest_ind(new_CN, base_CM, axis=1, alternative="less").pvalue
    p_faster_C = np.where(constant_C, sure_C, p_faster_C)
    return 1.0 - p_faster_C, p_faster_C


def kruskal(base_CM: Floats, new_CN: Floats) -> Floats:
    """P-values of the Kruskal-Wallis test of two groups, by its chi-squared approximation; 1 for equal values."""
    from scipy import stats

    p_C = np.ones(len(base_CM))
    # For equal values, SciPy raises an error or returns NaN, depending on its version.
    differs_C = np.ptp(np.concatenate([base_CM, new_CN], axis=1), axis=1) != 0
    if differs_C.any():
        p_C[differs_C] = stats.kruskal(base_CM[differs_C], new_CN[differs_C], axis=1).pvalue
    return p_C


def cliff(base_CM: Floats, new_CN: Floats) -> Floats:
    """Cliff's delta of each case; see `Statistics`."""
    return np.asarray(np.sign(new_CN[:, None, :] - base_CM[:, :, None]).mean(axis=(1, 2)))


def normal_p(shift_C: Floats, error_C: Floats) -> tuple[Floats, Floats]:
    """One-sided p-values of differences with known standard errors: slower, faster."""
    from scipy import special

    still_C = error_C <= 0
    sure_C = np.where(shift_C == 0, 0.0, np.copysign(np.inf, shift_C))
    z_C = np.where(still_C, sure_C, shift_C / np.where(still_C, 1.0, error_C))
    return special.ndtr(-z_C), special.ndtr(z_C)


def holm(p_C: Floats) -> Floats:
    """P-values adjusted for multiple comparisons (Holm 1979); compare them with alpha directly."""
    count = len(p_C)
    order = np.argsort(p_C, kind="stable")
    stepped = np.maximum.accumulate(p_C[order] * np.arange(count, 0, -1))
    adjusted = np.empty(count)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted
