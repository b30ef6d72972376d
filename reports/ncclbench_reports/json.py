"""JSON: runs with verdicts, records, phases, medians over starts; ``docs/report.schema.json`` describes it."""

from collections.abc import Sequence

import msgspec

from ncclbench import __version__
from ncclbench.store.run_directory import Run
from ncclbench.store.verdict import RunVerdict
from ncclbench_reports.common.process_starts import across_starts
from ncclbench_reports.common.record_rows import COLUMNS, RecordRow, phase_rows, record_rows
from ncclbench_reports.common.run_summary import stamps, verdicts_of, warnings_of

SUFFIX = ".json"
SCHEMA = 1


def render(runs: Sequence[Run]) -> str:
    """One object, indented."""
    rows = record_rows(runs)
    report = {
        "schema": SCHEMA,
        "ncclbench": __version__,
        "runs": [_run(run, verdict) for run, verdict in zip(runs, verdicts_of(runs), strict=True)],
        "units": {column.name: column.unit for column in COLUMNS if column.unit},
        "results": [_result(row) for row in rows],
        "phases": phase_rows(runs),
        "across_starts": across_starts(rows),
    }
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


_CHECK = ("check", "subject", "verdict", "reason", "action", "evidence")


def _result(row: RecordRow) -> dict[str, object]:
    return {**{column.name: row.value(column.name) for column in COLUMNS}, "params": msgspec.Raw(row.params.encode())}


def _run(run: Run, verdict: RunVerdict | None) -> dict[str, object]:
    manifest = run.manifest
    return {
        "run": str(run.path),
        "plan": manifest.plan.name,
        "transport": manifest.transport,
        "device": manifest.device,
        "world_size": manifest.world_size,
        "started": manifest.started,
        "provenance": manifest.provenance,
        "stamps": stamps(run, verdict),
        "warnings": warnings_of(run),
        "verdict": _verdict(verdict) if verdict else None,
    }


def _verdict(verdict: RunVerdict) -> dict[str, object]:
    """What a reader needs of it; the rest is in the run's ``verdict.json``."""
    return {
        **{name: getattr(verdict, name) for name in ("schema", "verdict", "reasons", "profile", "stamps", "starts")},
        "checks": [{name: getattr(check, name) for name in _CHECK} for check in verdict.checks],
    }
