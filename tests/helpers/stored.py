"""One factory for each kind of thing in a run directory. Keyword arguments replace the defaults."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ncclbench.store.manifest import Manifest
from ncclbench.store.records import GpuState, Json, Record, Summary
from ncclbench.store.run_writer import RunWriter

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)

MANIFEST: dict[str, Any] = {"schema": 1, "plan": {"name": "p"}, "topology": {}, "transport": "gloo", "world_size": 2}


def manifest(**fields: Any) -> Manifest:
    """The manifest of a run of two ranks. Fields are plain data, as in the file."""
    return msgspec.convert(MANIFEST | fields, Manifest)


def record(pattern: str = "all_reduce", nbytes: int = 1024, **fields: Any) -> Record:
    """The record of an isolated case on two ranks, without figures."""
    chosen: dict[str, Any] = {
        "case": f"{pattern}/float32/{nbytes}/isolated",
        "pattern": pattern,
        "transport": "gloo",
        "timing": "isolated",
        "dtype": "float32",
        "bytes": nbytes,
        "world_size": 2,
        "status": "ok",
        "started": "2026-01-01T00:00:00Z",
    }
    return Record(**chosen | fields)


def measured_record(pattern: str = "all_reduce", nbytes: int = 1024, **fields: Any) -> Record:
    """A record with the time and the rates of a correct case."""
    chosen: dict[str, Any] = {
        "wrong": 0,
        "count": nbytes // 4,
        "size_bytes": nbytes,
        "time_us": summary(),
        "alg_gb_per_s": 0.0829,
        "bus_gb_per_s": 0.1244,
    }
    return record(pattern, nbytes, **chosen | fields)


def summary(**fields: Any) -> Summary:
    """Statistics of 120 durations in us."""
    chosen: dict[str, Any] = {
        "n": 120,
        "min": 10.0,
        "p50": 12.345678,
        "p50_lo": 12.0,
        "p50_hi": 12.75,
        "p95": 20.0,
        "p99": 99.5,
        "max": 120.0,
        "mean": 13.0,
        "cv": 0.5,
    }
    return Summary(**chosen | fields)


def gpu_state(errors: Mapping[str, Json] | None = None, at: float | None = None, **fields: Any) -> GpuState:
    """The state of a GPU with these error counters, read at `at` seconds."""
    return GpuState(errors=dict(errors or {}), clock_seconds=at, **fields)


def write_run(path: Path, *records: Record, **fields: Any) -> Path:
    """A run directory with these records. The fields are the manifest's."""
    writer = RunWriter.create(path, manifest(**fields))
    for one in records:
        writer.append(one)
    return path


def plain(data: object) -> Any:
    """`data` as JSON holds it."""
    return msgspec.to_builtins(data)


def known(value: T | None) -> T:
    """`value`, which must not be None."""
    assert value is not None
    return value


def like(base: S, **fields: Any) -> S:
    """A copy of `base` with other fields."""
    return msgspec.structs.replace(base, **fields)
