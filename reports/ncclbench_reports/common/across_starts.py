"""Many process starts as one: the same case over starts of a run, repetitions, racks or dates.

A start counts once, however many samples it has: what differs from start to start is not seen by iterating longer.
The median over starts has the same non-parametric interval as the median over iterations, and therefore none below 6;
least and largest are given always.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from ncclbench.analysis.intervals import median_interval

# What must be equal for two records to be of the same case.
IDENTITY = ("case", "transport", "device", "simulated", "world_size")


def across_starts(flat: pd.DataFrame) -> pd.DataFrame:
    """One row a case that was timed in two process starts or more, in one run or in several, from `flat_frame`.

    Columns: those of ``IDENTITY``, ``runs``, ``starts``, ``p50_us`` (median over starts of the start's median),
    ``p50_lo_us`` and ``p50_hi_us`` (its 95% interval; null below 6 starts), ``p50_min_us``, ``p50_max_us``,
    ``spread`` (largest over least, minus 1), ``bus_gb_per_s`` (of the median time; rates are not averaged).
    """
    timed = flat[flat["p50_us"].notna()]
    rows = []
    for key, group in timed.groupby(list(IDENTITY), sort=False, dropna=False):
        if len(group) < 2:
            continue
        times = np.sort(group["p50_us"].to_numpy(dtype=np.float64))
        interval = median_interval(len(times))
        median = float(np.median(times))
        rows.append(
            {
                **dict(zip(IDENTITY, key, strict=True)),
                "runs": int(group["run"].nunique()),
                "starts": len(times),
                "p50_us": median,
                "p50_lo_us": float(times[interval[0]]) if interval else None,
                "p50_hi_us": float(times[interval[1]]) if interval else None,
                "p50_min_us": float(times[0]),
                "p50_max_us": float(times[-1]),
                "spread": float(times[-1] / times[0] - 1) if times[0] > 0 else None,
                "bus_gb_per_s": _rate_at(group, median),
            }
        )
    return _typed(rows)


_TYPES = {
    "case": "string", "transport": "string", "device": "string", "simulated": "boolean", "world_size": "Int64",
    "runs": "Int64", "starts": "Int64", "p50_us": "Float64", "p50_lo_us": "Float64", "p50_hi_us": "Float64",
    "p50_min_us": "Float64", "p50_max_us": "Float64", "spread": "Float64", "bus_gb_per_s": "Float64",
}  # fmt: skip


def _typed(rows: Iterable[dict[str, object]]) -> pd.DataFrame:
    found = list(rows)
    return pd.DataFrame({name: pd.Series([row[name] for row in found], dtype=kind) for name, kind in _TYPES.items()})


def _rate_at(group: pd.DataFrame, median_us: float) -> float | None:
    """Bus bandwidth at the median time: the bytes are the same in all runs, so rate times time is."""
    known = group[group["bus_gb_per_s"].notna()]
    if known.empty or median_us <= 0:
        return None
    first = known.iloc[0]
    return float(first["bus_gb_per_s"]) * float(first["p50_us"]) / median_us


def by_date(flat: pd.DataFrame) -> pd.DataFrame:
    """The rows of cases that were timed in two process starts or more, oldest first within each case."""
    timed = flat[flat["p50_us"].notna()]
    several = timed.groupby(list(IDENTITY), sort=False, dropna=False)["run"].transform("size") > 1
    return timed[several].sort_values([*IDENTITY, "started", "run", "start"], kind="stable")
