"""JUnit XML for CI systems: one test suite per run and one test case per record; with a verdict, per check too.

``wrong`` and FAIL are failures. ``failed``, ``timeout`` and a planned case without a record are errors, since nothing
was measured. `ncclbench.store.export_writers.check_case` defines the outcomes of checks. The figures are properties,
under the names of the columns.
"""

from collections.abc import Sequence

from ncclbench.store.export_writers import JUnitCase, JUnitSuite, Outcome, check_case, junit_text, verdict_case
from ncclbench.store.run_directory import Run
from ncclbench.store.verdict import RunVerdict
from ncclbench_reports.common.record_rows import COLUMNS, RecordRow, record_rows
from ncclbench_reports.common.run_summary import stamps, unmeasured, verdict_line, verdicts_of

SUFFIX = ".xml"

_FIGURES = tuple(column.name for column in COLUMNS if column.is_number)
_OUTCOMES: dict[str, Outcome] = {"wrong": "failure", "failed": "error", "timeout": "error", "skipped": "skipped"}


def render(runs: Sequence[Run]) -> str:
    """One document."""
    return junit_text("ncclbench", (_suite(run, verdict) for run, verdict in zip(runs, verdicts_of(runs), strict=True)))


def _suite(run: Run, verdict: RunVerdict | None) -> JUnitSuite:
    cases = [_record_case(row) for row in record_rows([run])]
    cases += [_unmeasured_case(start, case) for start, case in unmeasured(run)]
    if verdict:
        cases.append(verdict_case(verdict))
        cases += [check_case(check, f"check.{check.check}") for check in verdict.checks]
    properties = [("verdict", verdict_line(verdict)), *(("stamp", stamp) for stamp in stamps(run, verdict))]
    return JUnitSuite(name=str(run.path), cases=cases, properties=properties)


def _record_case(row: RecordRow) -> JUnitCase:
    figures = {name: value for name in _FIGURES if (value := row.value(name)) is not None}
    mean = {"time_is": "mean"} if row.time_is == "mean" else {}  # else medians, as everywhere
    outcome = _OUTCOMES.get(row.status)
    return JUnitCase(
        classname=row.pattern,
        name=_name(row.case, row.start),
        outcome=outcome,
        message=(row.reason or row.status) if outcome else "",
        properties={**mean, **{name: str(value) for name, value in figures.items()}},
        output=row.notes or "",
    )


def _unmeasured_case(start: int, case: str) -> JUnitCase:
    """A planned case that the run did not reach: a run that was lost must not be green."""
    return JUnitCase(
        classname=case.partition("/")[0],
        name=_name(case, start),
        outcome="error",
        message="not measured: the run ended before",
    )


def _name(case: str, start: int) -> str:
    """The case; a later process start of it has its number behind it."""
    return f"{case} (start {start})" if start else case
