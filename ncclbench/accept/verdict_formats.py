"""A verdict for other programs: JUnit XML, CSV, and Prometheus text. Cases have formats of their own in reports."""

import csv
import io
from collections.abc import Iterable
from itertools import groupby
from xml.etree import ElementTree

from ncclbench.store.escapes import csv_cell, prometheus_label, xml_text
from ncclbench.store.verdict import CheckResult, RunVerdict, Verdict

_JUNIT = {Verdict.FAIL: "failure", Verdict.INCONCLUSIVE: "error", Verdict.NOT_RUN: "skipped"}


def junit(document: RunVerdict) -> str:
    """JUnit XML: a suite a check, a case a subject; FAIL is a failure, INCONCLUSIVE an error, NOT_RUN skipped."""
    root = ElementTree.Element("testsuites", name=f"ncclbench accept {document.profile.name}")
    for check, group in groupby(document.checks, key=lambda result: result.check):
        results = list(group)
        suite = ElementTree.SubElement(root, "testsuite", name=xml_text(check, "?"), tests=str(len(results)))
        for verdict, tag in _JUNIT.items():
            name = {"failure": "failures", "error": "errors", "skipped": "skipped"}[tag]
            suite.set(name, str(sum(result.verdict is verdict for result in results)))
        for result in results:
            case = ElementTree.SubElement(
                suite, "testcase", classname=xml_text(check, "?"), name=xml_text(result.subject, "?")
            )
            if result.verdict in _JUNIT:
                said = ElementTree.SubElement(case, _JUNIT[result.verdict], message=xml_text(result.reason, "?"))
                said.text = xml_text(f"action: {result.action}", "?") if result.action else None
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def checks_csv(document: RunVerdict) -> str:
    """One row a result."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["check", "subject", "verdict", "action", "reason"])
    for result in document.checks:
        cells = (result.check, result.subject, result.verdict, result.action or "", result.reason)
        writer.writerow([csv_cell(str(cell)) for cell in cells])
    return out.getvalue()


def prometheus(document: RunVerdict) -> str:
    """Prometheus text: the verdict, the starts, the number of results of each check and verdict, and what failed."""
    profile = document.profile.name
    lines = [
        *_head("ncclbench_accept_verdict", "1 for the verdict of the run"),
        *(
            _sample("ncclbench_accept_verdict", int(v is document.verdict), profile=profile, verdict=v.value)
            for v in Verdict
        ),
        *_head("ncclbench_accept_exit_code", "exit code of ncclbench accept"),
        _sample("ncclbench_accept_exit_code", document.exit_code or 0, profile=profile),
        *_head("ncclbench_accept_starts", "process starts"),
        _sample("ncclbench_accept_starts", document.starts.declared, profile=profile, kind="declared"),
        _sample("ncclbench_accept_starts", document.starts.present, profile=profile, kind="present"),
        *_head("ncclbench_accept_checks", "number of results"),
    ]
    counts: dict[tuple[str, str], int] = {}
    for result in document.checks:
        key = (result.check, result.verdict.value)
        counts[key] = counts.get(key, 0) + 1
    for (check, verdict), count in sorted(counts.items()):
        lines.append(_sample("ncclbench_accept_checks", count, profile=profile, check=check, verdict=verdict))
    lines += _head("ncclbench_accept_not_passed", "1 for each subject that failed or is inconclusive")
    lines += list(dict.fromkeys(_not_passed(profile, document.checks)))
    return "\n".join(lines) + "\n"


def _not_passed(profile: str, results: Iterable[CheckResult]) -> Iterable[str]:
    for r in results:
        if r.verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE):
            labels = {"profile": profile, "check": r.check, "subject": r.subject, "verdict": r.verdict.value}
            yield _sample("ncclbench_accept_not_passed", 1, **labels, action=r.action.value if r.action else "")


def _head(name: str, text: str) -> tuple[str, str]:
    return f"# HELP {name} {text}", f"# TYPE {name} gauge"


def _sample(name: str, value: int, **labels: str) -> str:
    shown = ",".join(f'{name}="{prometheus_label(value)}"' for name, value in labels.items())
    return f"{name}{{{shown}}} {value}"
