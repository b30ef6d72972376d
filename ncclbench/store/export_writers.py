"""The writers of CSV, JUnit XML and Prometheus text, for verdicts and for reports.

The writers escape all text, since names come from logs, host names and topology files. `check_case` and `verdict_case`
hold the rule for CI systems: a JUnit document of a judged run is green only if its verdict is PASS
(docs/decisions/0005-junit-outcomes.md).
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never
from xml.etree import ElementTree

from ncclbench.store.verdict import CheckResult, RunVerdict, Verdict

# A spreadsheet evaluates a cell that begins with one of these; OWASP lists them under "CSV injection".
_STARTS_A_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
# Characters that XML 1.0 cannot hold, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Cell = str | float | None
Label = str | float | None
Outcome = Literal["failure", "error", "skipped"]


# ---- CSV -------------------------------------------------------------------------------------------------------------


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table in the format of RFC 4180, with line feeds; numbers keep all digits, and None is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([csv_cell(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return out.getvalue()


def csv_cell(text: str) -> str:
    """`text` with an apostrophe in front if a spreadsheet would evaluate it; carriage returns become line feeds.

    Only for text: a number must stay a number. To a CSV reader, a lone carriage return ends the row.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{lines}" if text.startswith(_STARTS_A_FORMULA) else lines


# ---- JUnit -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class JUnitCase:
    """One test case.

    Attributes:
        classname: group of the case in the display of a CI system.
        name: name of the case.
        outcome: the outcome; None if the case passed.
        message: reason of the outcome.
        properties: figures of the case, by name.
        output: text of ``system-out``.
    """

    classname: str
    name: str
    outcome: Outcome | None = None
    message: str = ""
    properties: Mapping[str, str] | None = None
    output: str = ""


@dataclass(frozen=True, kw_only=True)
class JUnitSuite:
    """Test cases with a common name and common properties; names of properties may repeat."""

    name: str
    cases: Sequence[JUnitCase]
    properties: Sequence[tuple[str, str]] | None = None


def junit_text(name: str, suites: Iterable[JUnitSuite]) -> str:
    """A JUnit document with the counts of cases per suite and in total."""
    root = ElementTree.Element("testsuites", name=xml_text(name))
    for suite in suites:
        element = ElementTree.SubElement(root, "testsuite", name=xml_text(suite.name))
        _add_properties(element, suite.properties)
        for case in suite.cases:
            _add_case(element, case)
        _count(element)
    _count(root)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode")


def _add_case(suite: ElementTree.Element, case: JUnitCase) -> None:
    names = {"classname": xml_text(case.classname), "name": xml_text(case.name)}
    element = ElementTree.SubElement(suite, "testcase", names)
    _add_properties(element, None if case.properties is None else list(case.properties.items()))
    if case.outcome:
        ElementTree.SubElement(element, case.outcome, message=xml_text(case.message))
    if case.output:
        ElementTree.SubElement(element, "system-out").text = xml_text(case.output)


def _add_properties(parent: ElementTree.Element, properties: Sequence[tuple[str, str]] | None) -> None:
    if properties is None:
        return
    element = ElementTree.SubElement(parent, "properties")
    for name, value in properties:
        ElementTree.SubElement(element, "property", name=name, value=xml_text(value))


def _count(element: ElementTree.Element) -> None:
    for name, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        element.set(name, str(len(list(element.iter(tag)))))


def xml_text(value: object) -> str:
    """`value` as text, with U+FFFD for each character that XML 1.0 cannot hold."""
    return _NOT_XML.sub("\ufffd", str(value))


def check_case(result: CheckResult, classname: str) -> JUnitCase:
    """The test case of a check's result, with action and evidence as output.

    Only FAIL is a failure. INCONCLUSIVE is an error, so that CI systems do not show it green. NOT_RUN is an error if
    the profile requires the result; otherwise it is skipped.
    """
    lines = [f"action: {result.action}"] if result.action else []
    lines += [" ".join(f"{name}={value}" for name, value in row.items()) for row in result.evidence]
    outcome = _outcome(result.verdict, required=result.required)
    message = f"{result.verdict}: {result.reason}" if outcome else ""
    return JUnitCase(
        classname=classname, name=result.subject, outcome=outcome, message=message, output="\n".join(lines)
    )


def verdict_case(verdict: RunVerdict) -> JUnitCase:
    """The test case of the run's verdict, which can be INCONCLUSIVE though no check is; NOT_RUN is an error."""
    outcome = _outcome(verdict.verdict, required=True)
    message = f"{verdict.verdict}: {'; '.join(verdict.reasons)}" if outcome else ""
    return JUnitCase(classname="verdict", name="run", outcome=outcome, message=message)


def _outcome(verdict: Verdict, *, required: bool) -> Outcome | None:
    match verdict:
        case Verdict.PASS:
            return None
        case Verdict.FAIL:
            return "failure"
        case Verdict.INCONCLUSIVE:
            return "error"
        case Verdict.NOT_RUN:
            return "error" if required else "skipped"
        case _:
            assert_never(verdict)


# ---- Prometheus ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gauge:
    """One metric: its name, its help text, and its samples with their labels; a label that is None is left out."""

    name: str
    what: str
    samples: Sequence[tuple[Mapping[str, Label], float]]


def prometheus_text(gauges: Iterable[Gauge]) -> str:
    """Exposition format 0.0.4, for the textfile collector of node_exporter; equal samples are written once."""
    lines: list[str] = []
    for gauge in gauges:
        what = gauge.what.replace("\\", r"\\").replace("\n", r"\n")
        lines += [f"# HELP {gauge.name} {what}", f"# TYPE {gauge.name} gauge"]
        # The repr of a float has all digits, so that it parses to the same number.
        lines += dict.fromkeys(f"{gauge.name}{{{_labels(labels)}}} {value!r}" for labels, value in gauge.samples)
    return "\n".join(lines)


def _labels(labels: Mapping[str, Label]) -> str:
    return ",".join(f'{name}="{prometheus_label(value)}"' for name, value in labels.items() if value is not None)


def prometheus_label(value: Label) -> str:
    """`value` as the text of a label between its quotation marks."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
