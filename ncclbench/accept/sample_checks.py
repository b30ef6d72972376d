"""Raw samples read back: durations of ranks and iterations, and what cannot be right about them."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import UsageError
from ncclbench.store.samples import UnreadableSamples, phase_columns

Floats = NDArray[np.float64]


def read_total(path: Path) -> Floats:
    """The durations of whole iterations in seconds, shape (R, N).

    Raises:
        UsageError: if the file cannot be read, or does not hold every rank in every iteration once.
    """
    try:
        columns = phase_columns(path, "total")
    except UnreadableSamples as error:
        raise UsageError(f"{path} holds no readable samples: {error}") from None
    if columns is None:
        raise UsageError(f"{path} holds no readable samples: it has no phase 'total'")
    return _as_matrix(*columns, path)


def _as_matrix(rank: NDArray[np.int32], iteration: NDArray[np.int32], seconds: Floats, path: Path) -> Floats:
    if len(rank) == 0 or rank.min() < 0 or iteration.min() < 0:
        raise UsageError(f"{path} holds no samples of whole iterations")
    ranks, iterations = int(rank.max()) + 1, int(iteration.max()) + 1
    if ranks * iterations != len(rank):
        raise UsageError(f"{path}: {len(rank)} samples cannot be those of {ranks} ranks and {iterations} iterations")
    place = rank.astype(np.int64) * iterations + iteration
    if not np.array_equal(place, np.arange(len(place))):  # written in order by ours; another's may not be
        if len(np.unique(place)) != len(place):
            raise UsageError(f"{path}: some rank has an iteration twice")
        seconds = seconds[np.argsort(place)]
    return seconds.reshape(ranks, iterations)


def impossible(seconds_RN: Floats) -> str | None:
    """What about the durations cannot be right; None if nothing."""
    for what, wrong_RN in (
        ("NaN", np.isnan(seconds_RN)),
        ("infinite", np.isinf(seconds_RN)),
        ("negative", seconds_RN < 0),
        ("zero", seconds_RN == 0),
    ):
        if wrong_RN.any():
            rank, iteration = (int(index) for index in np.argwhere(wrong_RN)[0])
            return f"{int(wrong_RN.sum())} {what} samples, the first of rank {rank} in iteration {iteration}"
    return None


def quantile_interval(n: int, q: float, confidence: float = 0.95) -> tuple[int, int] | None:
    """Which order statistics, from 0, bound the quantile `q` of `n` samples; None where n is too small.

    The number of samples below it is binomial(n, q), whatever the distribution. Source: Conover, Practical
    Nonparametric Statistics, section 3.2.
    """
    # In logarithms, for large n.
    k = np.arange(n + 1, dtype=np.float64)
    logs = np.cumsum(np.log(np.arange(1, n + 1, dtype=np.float64)))
    factorial = np.concatenate([[0.0], logs])
    chance = factorial[n] - factorial - factorial[::-1] + k * np.log(q) + (n - k) * np.log1p(-q)
    below = np.cumsum(np.exp(chance))
    tail = (1.0 - confidence) / 2
    low = int(np.searchsorted(below, tail, side="right")) - 1
    high = int(np.searchsorted(below, 1.0 - tail, side="left"))
    return (low, high) if low >= 0 and high < n else None
