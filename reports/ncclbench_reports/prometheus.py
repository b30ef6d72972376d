"""Prometheus text (exposition format 0.0.4), for node_exporter's textfile collector: a gauge a column.

A metric is ``ncclbench_`` and the column's name, unit included, so that the figures are those of every other format.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ncclbench.store.escapes import prometheus_label
from ncclbench.store.run_directory import Run
from ncclbench.store.verdict import Verdict
from ncclbench_reports.common.record_frame import COLUMNS, flat_frame, plain_rows
from ncclbench_reports.common.wording import judgements

SUFFIX = ".prom"

_LABELS = (
    "run",
    "start",
    "case",
    "pattern",
    "transport",
    "timing",
    "time_is",
    "dtype",
    "bytes",
    "world_size",
    "simulated",
)
_FIGURES = tuple(
    column
    for column in COLUMNS
    if column.dtype in ("Int64", "Float64") and column.name not in (*_LABELS, "root", "nodes", "launches_per_sample")
)
_STATUSES = ("ok", "wrong", "skipped", "failed", "timeout")


def render(runs: Sequence[Run]) -> str:
    """All records of the runs, and their verdicts."""
    rows = plain_rows(flat_frame(runs))
    lines: list[str] = []
    for column in _FIGURES:
        lines += _metric(column.name, f"{column.what} ({column.unit})" if column.unit else column.what, rows)
    lines += _head("status", "1 for the status that the case has")
    lines += [
        f'ncclbench_status{{{_labels(row)},status="{status}"}} {int(row["status"] == status)}'
        for row in rows
        for status in _STATUSES
    ]
    lines += _verdicts(runs)
    return "\n".join(lines)


def _metric(name: str, what: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    known = [row for row in rows if row[name] is not None]
    if known:
        yield from _head(name, what)
        # repr of a float has all its digits, and reads back as the same number.
        yield from (f"ncclbench_{name}{{{_labels(row)}}} {row[name]!r}" for row in known)


def _verdicts(runs: Sequence[Run]) -> Iterator[str]:
    judged = [(run, found) for run, found in zip(runs, judgements(runs), strict=True) if found]
    if judged:
        yield from _head("verdict", "1 for the verdict that the run has")
    for run, judgement in judged:
        for word in Verdict:
            label = f'run="{prometheus_label(run.path)}",verdict="{word}"'
            yield f"ncclbench_verdict{{{label}}} {int(judgement.verdict == word)}"


def _head(name: str, what: str) -> list[str]:
    escaped = what.replace("\\", r"\\").replace("\n", r"\n")
    return [f"# HELP ncclbench_{name} {escaped}", f"# TYPE ncclbench_{name} gauge"]


def _labels(row: dict[str, Any]) -> str:
    # The label that nearly every figure would have is left out: a series keeps its name.
    known = (name for name in _LABELS if row[name] is not None and (name, row[name]) != ("time_is", "median"))
    return ",".join(f'{name}="{prometheus_label(row[name])}"' for name in known)
