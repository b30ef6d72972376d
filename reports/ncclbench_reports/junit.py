"""JUnit XML: a test suite a run and a test case a record, for CI systems; with a verdict, a test case a check too.

``wrong`` and FAIL are failures; ``failed``, ``timeout`` and a planned case without a record are errors, since nothing
was measured; ``skipped``, INCONCLUSIVE and NOT_RUN are skipped, with the reason. The figures are properties, under the
names of the columns.
"""

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree as ET

from ncclbench.store.escapes import xml_text
from ncclbench.store.run_directory import Run
from ncclbench.store.verdict import CheckResult
from ncclbench_reports.common.record_frame import COLUMNS, flat_frame, plain_rows
from ncclbench_reports.common.wording import judgements, stamps, unmeasured, verdict_line

SUFFIX = ".xml"

_FIGURES = tuple(column.name for column in COLUMNS if column.dtype in ("Int64", "Float64"))
_OUTCOMES = {"wrong": "failure", "failed": "error", "timeout": "error", "skipped": "skipped"}
_VERDICTS = {"FAIL": "failure", "INCONCLUSIVE": "skipped", "NOT_RUN": "skipped"}


def render(runs: Sequence[Run]) -> str:
    """One document."""
    rows = plain_rows(flat_frame(runs))
    suites = ET.Element("testsuites", name="ncclbench")
    for run, judgement in zip(runs, judgements(runs), strict=True):
        suite = ET.SubElement(suites, "testsuite", name=xml_text(run.path))
        properties = ET.SubElement(suite, "properties")
        _property(properties, "verdict", verdict_line(judgement))
        for stamp in stamps(run, judgement):
            _property(properties, "stamp", stamp)
        for row in rows:
            if row["run"] == str(run.path):
                _record(suite, row)
        for start, name in unmeasured(run):
            _unmeasured(suite, start, name)
        for check in judgement.checks if judgement else []:
            _check(suite, check)
        _count(suite)
    _count(suites)
    ET.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(suites, encoding="unicode")


def _record(suite: ET.Element, row: dict[str, Any]) -> None:
    case = ET.SubElement(
        suite, "testcase", classname=xml_text(row["pattern"]), name=xml_text(_name(row["case"], row["start"]))
    )
    properties = ET.SubElement(case, "properties")
    if row["time_is"] == "mean":  # else medians, as everywhere
        _property(properties, "time_is", "mean")
    for name in _FIGURES:
        if row[name] is not None:
            _property(properties, name, str(row[name]))
    if row["status"] in _OUTCOMES:
        ET.SubElement(case, _OUTCOMES[row["status"]], message=xml_text(row["reason"] or row["status"]))
    if row["notes"]:
        ET.SubElement(case, "system-out").text = xml_text(row["notes"])


def _unmeasured(suite: ET.Element, start: int, name: str) -> None:
    """A planned case that a run never came to; a run that was lost must not be green."""
    case = ET.SubElement(
        suite, "testcase", classname=xml_text(name.partition("/")[0]), name=xml_text(_name(name, start))
    )
    ET.SubElement(case, "error", message="not measured: the run ended before")


def _name(case: str, start: int) -> str:
    """The case; a later process start of it has its number behind it."""
    return f"{case} (start {start})" if start else case


def _check(suite: ET.Element, check: CheckResult) -> None:
    case = ET.SubElement(suite, "testcase", classname=xml_text(f"check.{check.check}"), name=xml_text(check.subject))
    if check.verdict in _VERDICTS:
        ET.SubElement(case, _VERDICTS[check.verdict], message=xml_text(f"{check.verdict}: {check.reason or ''}"))
    lines = [f"action: {check.action}"] if check.action else []
    lines += [" ".join(f"{name}={value}" for name, value in row.items()) for row in check.evidence]
    if lines:
        ET.SubElement(case, "system-out").text = xml_text("\n".join(lines))


def _property(parent: ET.Element, name: str, value: str) -> None:
    ET.SubElement(parent, "property", name=name, value=xml_text(value))


def _count(suite: ET.Element) -> None:
    for name, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(name, str(len(list(suite.iter(tag)))))
