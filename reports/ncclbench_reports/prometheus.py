"""Prometheus text (exposition format 0.0.4), for node_exporter's textfile collector: one gauge per column.

A metric is ``ncclbench_`` and the column's name, unit included, so that its figures are those of every other format.
"""

from collections.abc import Sequence

from ncclbench.store.export_writers import Gauge, Label, prometheus_text
from ncclbench.store.run_directory import Run
from ncclbench.store.verdict import Verdict
from ncclbench_reports.common.record_rows import COLUMNS, Column, RecordRow, record_rows
from ncclbench_reports.common.run_summary import verdicts_of

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
    if column.is_number and column.name not in (*_LABELS, "root", "nodes", "launches_per_sample")
)
_STATUSES = ("ok", "wrong", "skipped", "failed", "timeout")


def render(runs: Sequence[Run]) -> str:
    """All records of the runs, and their verdicts."""
    rows = record_rows(runs)
    gauges = [_gauge(column, rows) for column in _FIGURES]
    status = [({**_labels(row), "status": status}, int(row.status == status)) for row in rows for status in _STATUSES]
    return prometheus_text(
        [
            *(gauge for gauge in gauges if gauge.samples),
            Gauge("ncclbench_status", "1 for the status that the case has", status),
            *_verdicts(runs),
        ]
    )


def _gauge(column: Column, rows: Sequence[RecordRow]) -> Gauge:
    what = f"{column.what} ({column.unit})" if column.unit else column.what
    figures = [(_labels(row), row.figure(column.name)) for row in rows]
    return Gauge(f"ncclbench_{column.name}", what, [(labels, value) for labels, value in figures if value is not None])


def _verdicts(runs: Sequence[Run]) -> list[Gauge]:
    samples = [
        ({"run": str(run.path), "verdict": word.value}, int(verdict.verdict is word))
        for run, verdict in zip(runs, verdicts_of(runs), strict=True)
        if verdict
        for word in Verdict
    ]
    return [Gauge("ncclbench_verdict", "1 for the verdict that the run has", samples)] if samples else []


def _labels(row: RecordRow) -> dict[str, Label]:
    # The label that nearly every figure would have is left out: a series keeps its name.
    return {name: row.value(name) for name in _LABELS if (name, row.value(name)) != ("time_is", "median")}
