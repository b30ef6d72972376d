"""JSON: runs with verdicts, records, phases, medians over starts; ``docs/report.schema.json`` describes it."""

from collections.abc import Sequence
from typing import Any

import msgspec

from ncclbench import __version__
from ncclbench.store.run_directory import Run
from ncclbench.store.verdict import Judgement
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


def _run(run: Run, judgement: Judgement | None) -> dict[str, Any]:
    manifest = run.manifest
    return {
        "run": str(run.path),
        "plan": manifest["plan"].get("name") if isinstance(manifest.get("plan"), dict) else None,
        **{key: manifest.get(key) for key in ("transport", "device", "world_size", "started", "provenance")},
        "stamps": stamps(run, judgement),
        "warnings": warnings_of(run),
        "verdict": judgement,
    }
