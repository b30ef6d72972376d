"""Read raw samples as a matrix of ranks by iterations, and find impossible durations in it."""

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
    index_N = rank.astype(np.int64) * iterations + iteration
    if not np.array_equal(index_N, np.arange(len(index_N))):  # another writer may not sort
        if len(np.unique(index_N)) != len(index_N):
            raise UsageError(f"{path}: some rank has an iteration twice")
        seconds = seconds[np.argsort(index_N)]
    return seconds.reshape(ranks, iterations)


def impossible(seconds_RN: Floats) -> str | None:
    """The first kind of impossible duration (NaN, infinite, negative, zero), in words; None if there is none."""
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
