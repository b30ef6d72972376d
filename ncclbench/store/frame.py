"""Records as one pandas frame: every report format shows the same numbers because all of them start here."""

from collections.abc import Sequence

import msgspec
import pandas as pd

from ncclbench.store.directory import Run
from ncclbench.store.records import Record

_TIMES = ("n", "min", "p50", "p50_lo", "p50_hi", "p95", "p99", "max", "mean", "cv")


def records_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a record, with flat columns; ``time_us`` and ``skew_us`` become ``p50_us``, ``skew_max_us``, ..."""
    return pd.DataFrame([{"run": str(run.path), **_row(record)} for run in runs for record in run.records])


def _row(record: Record) -> dict[str, object]:
    row: dict[str, object] = msgspec.to_builtins(record)
    time_us, skew_us = row.pop("time_us") or {}, row.pop("skew_us") or {}
    for nested in ("phases", "ledger", "overlap"):
        row.pop(nested)
    assert isinstance(time_us, dict)
    assert isinstance(skew_us, dict)
    for name in _TIMES:
        row[name if name in ("n", "cv") else f"{name}_us"] = time_us.get(name)
    row["skew_p50_us"], row["skew_max_us"] = skew_us.get("p50"), skew_us.get("max")
    row["overlap_percent"] = record.overlap.share_percent if record.overlap else None
    row["bottleneck_gb_per_s"] = (record.ledger or {}).get("bottleneck_gb_per_s")
    return row
