"""Records as one pandas frame: every report format shows the same numbers because all of them start here.

`records_frame` has a row a record and keeps what is nested; `flat_frame` has the documented columns of ``COLUMNS``
alone, each with one type and one unit, and is what csv, parquet, json and the others write. Samples are not in it:
`ncclbench.store.samples` reads those, a case at a time, and only the columns that are asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pandas as pd

from ncclbench.store.records import LedgerRecord, Record
from ncclbench.store.run_directory import Run

_TIMES = ("n", "min", "p50", "p50_lo", "p50_hi", "p95", "p99", "max", "mean", "cv")
_LINKS = ("self", "node", "domain", "same_rail", "cross_rail", "cross_site")


@dataclass(frozen=True)
class Column:
    """A column of `flat_frame`.

    Attributes:
        name: ends in its unit where it has one.
        dtype: the pandas type, always one that can hold "unknown".
        unit: for readers; empty for text and counts.
        what: one sentence.
    """

    name: str
    dtype: str
    unit: str
    what: str


_TEXT, _WHOLE, _REAL, _YES_NO = "string", "Int64", "Float64", "boolean"

COLUMNS = (
    Column("run", _TEXT, "", "the run directory, as it was named"),
    Column("plan", _TEXT, "", "name of the plan"),
    Column("transport", _TEXT, "", "who moved the data"),
    Column("device", _TEXT, "", "cpu or cuda; none where nothing ran"),
    Column("simulated", _YES_NO, "", "whether times were computed by a model instead of measured"),
    Column("world_size", _WHOLE, "", "ranks"),
    Column("nodes", _WHOLE, "", "nodes of the topology"),
    Column("start", _WHOLE, "", "process start of the run, from 0"),
    Column("mode", _TEXT, "", "the plan's mode that its process was started in; null of a plan without modes"),
    Column("case", _TEXT, "", "unique in a plan, and in a process start"),
    Column("pattern", _TEXT, "", ""),
    Column("params", _TEXT, "", "the pattern's own parameters, as JSON with sorted keys"),
    Column("timing", _TEXT, "", "timing regime"),
    Column("dtype", _TEXT, "", "element type"),
    Column("bytes", _WHOLE, "B", "S as asked for"),
    Column("size_bytes", _WHOLE, "B", "S as moved"),
    Column("count", _WHOLE, "elements", "a rank's share"),
    Column("redop", _TEXT, "", "reduction"),
    Column("root", _WHOLE, "", "place of the root in its group"),
    Column("group_size", _WHOLE, "", "ranks of a group"),
    Column("status", _TEXT, "", "ok, wrong, skipped, failed or timeout"),
    Column("reason", _TEXT, "", "why it is not ok"),
    Column("wrong", _WHOLE, "elements", "elements that differed; null where nothing was checked"),
    Column("stopped", _TEXT, "", "what ended sampling: precision, time or iterations"),
    Column("warmup", _WHOLE, "iterations", "iterations before timing"),
    Column("launches_per_sample", _WHOLE, "", "launches of a block; 1 if each was timed"),
    Column("n", _WHOLE, "", "samples behind the figures"),
    Column(
        "time_is",
        _TEXT,
        "",
        "what p50_us is: median over iterations, or the mean over launches that another tool's log has",
    ),
    Column("min_us", _REAL, "us", "shortest iteration, of its slowest rank as all times are"),
    Column("p50_us", _REAL, "us", "the headline: a median, or what time_is says"),
    Column("p50_lo_us", _REAL, "us", "lower end of the median's 95% interval; null below 6 samples"),
    Column("p50_hi_us", _REAL, "us", "upper end"),
    Column("p95_us", _REAL, "us", "null below 20 samples"),
    Column("p99_us", _REAL, "us", "null below 100 samples"),
    Column("max_us", _REAL, "us", "longest iteration"),
    Column("mean_us", _REAL, "us", "arithmetic mean"),
    Column("cv", _REAL, "", "standard deviation over mean"),
    Column("skew_p50_us", _REAL, "us", "median over iterations of longest minus shortest rank"),
    Column("skew_max_us", _REAL, "us", "largest of them"),
    Column("alg_gb_per_s", _REAL, "1e9 B/s", "S over the median time"),
    Column("bus_gb_per_s", _REAL, "1e9 B/s", "times the factor of nccl-tests"),
    *(Column(f"sent_{link}_bytes", _WHOLE, "B", f"ledger: sent over links of class {link}") for link in _LINKS),
    Column("bottleneck_bytes", _WHOLE, "B", "ledger: the most that one rank sends or receives"),
    Column("bottleneck_gb_per_s", _REAL, "1e9 B/s", "that over the median time"),
    Column(
        "overlap_percent", _REAL, "%", "share of the collective that was hidden behind computing, as OSU defines it"
    ),
    *(
        Column(
            f"deepep_{verb}_gb_per_s",
            _REAL,
            "1e9 B/s",
            f"{verb} as DeepEP counts, rows that a rank sends itself included: beside DeepEP's own figures only, "
            "no bus bandwidth",
        )
        for verb in ("dispatch", "combine")
    ),
    Column("path_proof", _TEXT, "", "whether the path was proven; null where nothing was asked"),
    Column("notes", _TEXT, "", "what a reader must know, joined by ' | '"),
    Column("samples", _TEXT, "", "Parquet file of the raw samples, in the run directory"),
    Column("started", _TEXT, "", "UTC"),
)
NAMES = tuple(column.name for column in COLUMNS)


def records_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a record: the columns of ``COLUMNS`` untyped, and what is nested (``groups``, ...) as it is."""
    return pd.DataFrame([_row(run, record) for run in runs for record in run.records])


def flat_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a record, with exactly the columns of ``COLUMNS``, in that order, each of its documented type."""
    rows = [_flatten(_row(run, record)) for run in runs for record in run.records]
    return pd.DataFrame({c.name: pd.Series([row.get(c.name) for row in rows], dtype=c.dtype) for c in COLUMNS})


def phases_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a phase of a record: its median time where it was timed by itself, and its bytes."""
    rows = [
        {
            "run": str(run.path),
            "start": record.start,
            "case": record.case,
            "phase": phase.label,
            "p50_us": phase.time_us.p50 if phase.time_us else None,
            "p50_lo_us": phase.time_us.p50_lo if phase.time_us else None,
            "p50_hi_us": phase.time_us.p50_hi if phase.time_us else None,
            **_sent(phase.ledger),
            "bottleneck_bytes": phase.ledger.bottleneck_bytes,
            "bottleneck_gb_per_s": phase.ledger.bottleneck_gb_per_s,
        }
        for run in runs
        for record in run.records
        for phase in record.phases
    ]
    whole = {f"sent_{link}_bytes" for link in _LINKS} | {"bottleneck_bytes", "start"}
    text = {"run", "case", "phase"}
    return pd.DataFrame(
        {
            name: pd.Series(
                [row[name] for row in rows], dtype=_TEXT if name in text else _WHOLE if name in whole else _REAL
            )
            for name in PHASE_NAMES
        }
    )


PHASE_NAMES = (
    "run",
    "start",
    "case",
    "phase",
    "p50_us",
    "p50_lo_us",
    "p50_hi_us",
    *(f"sent_{link}_bytes" for link in _LINKS),
    "bottleneck_bytes",
    "bottleneck_gb_per_s",
)


def plain_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as plain data: Python's own numbers and text, and None for what is not known."""
    columns = {str(name): frame[name].astype(object).where(frame[name].notna(), None).tolist() for name in frame}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def params_text(params: Mapping[str, Any]) -> str:
    """Parameters as text that is equal where they are equal."""
    return msgspec.json.encode(params, order="sorted").decode()


def _row(run: Run, record: Record) -> dict[str, Any]:
    row: dict[str, Any] = msgspec.to_builtins(record)
    time_us, skew_us = row.pop("time_us") or {}, row.pop("skew_us") or {}
    for name in _TIMES:
        row[name if name in ("n", "cv") else f"{name}_us"] = time_us.get(name)
    row["time_is"] = record.time_is
    row["skew_p50_us"], row["skew_max_us"] = skew_us.get("p50"), skew_us.get("max")
    row["overlap_percent"] = record.overlap.share_percent if record.overlap else None
    for name in ("deepep_dispatch", "deepep_combine"):
        figure = record.comparable.get(name)
        row[f"{name}_gb_per_s"] = figure.gb_per_s if figure else None
    ledger = record.ledger or LedgerRecord()
    row["bottleneck_bytes"], row["bottleneck_gb_per_s"] = ledger.bottleneck_bytes, ledger.bottleneck_gb_per_s
    topology = run.manifest.topology
    return {
        "run": str(run.path),
        "plan": run.manifest.plan.name,
        "device": run.manifest.device,
        "simulated": run.is_simulated,
        "nodes": (len(topology.node_names) or None) if topology else None,
        **_sent(ledger),
        "path_proof": record.path.proof if record.path else None,
        **row,
    }


def _flatten(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "params": params_text(row["params"]), "notes": " | ".join(row["notes"]) or None}


def _sent(ledger: LedgerRecord) -> dict[str, int | None]:
    sent = ledger.sent_bytes
    return {f"sent_{link}_bytes": sent.get(link) for link in _LINKS}
