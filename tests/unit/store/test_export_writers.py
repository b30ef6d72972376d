"""The shared writers of JUnit, Prometheus text and CSV, and the rule for CI systems."""

import xml.etree.ElementTree as ET
from itertools import product

import pytest

from ncclbench.accept.verdict_formats import junit
from ncclbench.store.export_writers import (
    Gauge,
    JUnitCase,
    JUnitSuite,
    check_case,
    csv_text,
    junit_text,
    prometheus_text,
    verdict_case,
)
from ncclbench.store.verdict import Action, CheckResult, RunVerdict, Verdict


def result(verdict: Verdict, *, required: bool = False) -> CheckResult:
    return CheckResult(check="floor", subject="x", verdict=verdict, reason="why", required=required)


# ---- JUnit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "required", "outcome"),
    [
        (Verdict.PASS, True, None),
        (Verdict.FAIL, False, "failure"),
        (Verdict.INCONCLUSIVE, False, "error"),
        (Verdict.NOT_RUN, True, "error"),
        (Verdict.NOT_RUN, False, "skipped"),
    ],
)
def test_outcome_of_a_check(verdict: Verdict, required: bool, outcome: str | None) -> None:
    case = check_case(result(verdict, required=required), "floor")
    assert case.outcome == outcome
    assert case.message == (f"{verdict}: why" if outcome else "")


@pytest.mark.parametrize("verdict", Verdict)
def test_document_is_green_only_if_the_verdict_is_pass(verdict: Verdict) -> None:
    """Also if every check passed or does not apply, but the verdict is INCONCLUSIVE."""
    checks = [result(Verdict.PASS), result(Verdict.NOT_RUN)]
    root = ET.fromstring(junit(RunVerdict(schema=1, verdict=verdict, reasons=["nothing measured"], checks=checks)))
    green = root.get("failures") == root.get("errors") == "0"
    assert green is (verdict is Verdict.PASS)


@pytest.mark.parametrize(("verdict", "required"), list(product(Verdict, (False, True))))
def test_both_documents_have_the_same_outcomes(verdict: Verdict, required: bool) -> None:
    one = check_case(result(verdict, required=required), "floor")
    other = check_case(result(verdict, required=required), "check.floor")
    assert (one.outcome, one.message, one.output) == (other.outcome, other.message, other.output)


def test_action_and_evidence_are_the_output() -> None:
    check = CheckResult(
        check="fleet", subject="n1", verdict=Verdict.FAIL, action=Action.CHECK_CABLE, evidence=[{"send": 0.5}, {"n": 4}]
    )
    assert check_case(check, "fleet").output == "action: CHECK_CABLE\nsend=0.5\nn=4"


def test_suites_and_the_whole_count_their_cases() -> None:
    cases = [
        JUnitCase(classname="c", name="ok"),
        JUnitCase(classname="c", name="bad", outcome="failure", message="a\x00b"),
        verdict_case(RunVerdict(schema=1, verdict=Verdict.NOT_RUN)),
    ]
    root = ET.fromstring(junit_text("all", [JUnitSuite(name="s", cases=cases), JUnitSuite(name="t", cases=[])]))
    counts = [tuple(element.get(name) for name in ("tests", "failures", "errors")) for element in (root, *root)]
    assert counts == [("3", "1", "1"), ("3", "1", "1"), ("0", "0", "0")]
    failure = root.find(".//failure")
    assert failure is not None
    assert failure.get("message") == "a\ufffdb"


# ---- Prometheus and CSV ----------------------------------------------------------------------------------------------


def test_prometheus_text_escapes_labels_and_help() -> None:
    labels = {"name": 'a"b\\c\nd', "known": None, "simulated": True}
    text = prometheus_text([Gauge("g", "first\nsecond\\", [(labels, 0.1), (labels, 0.1)])])
    assert text.splitlines() == [
        r"# HELP g first\nsecond\\",
        "# TYPE g gauge",
        r'g{name="a\"b\\c\nd",simulated="true"} 0.1',
    ]


def test_csv_has_all_digits_and_no_formula() -> None:
    text = csv_text(("name", "value", "flag"), [("=1+1", 1 / 3, None), ("a,b", 5, True)])
    assert text == 'name,value,flag\n\'=1+1,0.3333333333333333,\n"a,b",5,True\n'
