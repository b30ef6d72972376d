"""JSON: runs with verdicts, records, phases, medians over starts; ``docs/report.schema.json`` describes it."""

from collections.abc import Sequence
from typing import Any

import msgspec

from ncclbench import __version__
from ncclbench.store.run_directory import Run
from ncclbench.store.verdict import RunVerdict
from ncclbench_reports.common.across_starts import across_starts
from ncclbench_reports.common.record_frame import COLUMNS, flat_frame, phases_frame, plain_rows
from ncclbench_reports.common.wording import judgements, stamps, warnings_of

SUFFIX = ".json"
SCHEMA = 1


def render(runs: Sequence[Run]) -> str:
    """One object, indented."""
    flat = flat_frame(runs)
    report = {
        "schema": SCHEMA,
        "ncclbench": __version__,
        "runs": [_run(run, judgement) for run, judgement in zip(runs, judgements(runs), strict=True)],
        "units": {column.name: column.unit for column in COLUMNS if column.unit},
        "results": [{**row, "params": msgspec.json.decode(row["params"])} for row in plain_rows(flat)],
        "phases": plain_rows(phases_frame(runs)),
        "across_starts": plain_rows(across_starts(flat)),
    }
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


_CHECK = ("check", "subject", "verdict", "reason", "action", "evidence")


def _run(run: Run, judgement: RunVerdict | None) -> dict[str, Any]:
    manifest = run.manifest
    return {
        "run": str(run.path),
        "plan": manifest.plan.name,
        "transport": manifest.transport,
        "device": manifest.device,
        "world_size": manifest.world_size,
        "started": manifest.started,
        "provenance": manifest.provenance,
        "stamps": stamps(run, judgement),
        "warnings": warnings_of(run),
        "verdict": _verdict(judgement) if judgement else None,
    }


def _verdict(judgement: RunVerdict) -> dict[str, Any]:
    """What a reader needs of it; the rest is in the run's ``verdict.json``."""
    return {
        **{name: getattr(judgement, name) for name in ("schema", "verdict", "reasons", "profile", "stamps", "starts")},
        "checks": [{name: getattr(check, name) for name in _CHECK} for check in judgement.checks],
    }
