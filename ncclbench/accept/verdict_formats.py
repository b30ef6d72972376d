"""A verdict as JUnit XML, CSV and Prometheus text. The reports package has the formats of cases."""

from collections import Counter
from itertools import groupby

from ncclbench.store.export_writers import (
    Gauge,
    JUnitSuite,
    check_case,
    csv_text,
    junit_text,
    prometheus_text,
    verdict_case,
)
from ncclbench.store.verdict import RunVerdict, Verdict


def junit(verdict: RunVerdict) -> str:
    """JUnit XML: the verdict, then one suite per check and one case per subject."""
    suites = [JUnitSuite(name="verdict", cases=[verdict_case(verdict)])]
    for check, results in groupby(verdict.checks, key=lambda result: result.check):
        suites.append(JUnitSuite(name=check, cases=[check_case(result, check) for result in results]))
    return junit_text(f"ncclbench accept {verdict.profile.name}", suites) + "\n"


def checks_csv(verdict: RunVerdict) -> str:
    """CSV with one row per result."""
    rows = [(r.check, r.subject, r.verdict.value, r.action.value if r.action else "", r.reason) for r in verdict.checks]
    return csv_text(("check", "subject", "verdict", "action", "reason"), rows)


def prometheus(verdict: RunVerdict) -> str:
    """Prometheus text: the verdict, the starts, the number of results per check and verdict, and failed subjects."""
    profile = {"profile": verdict.profile.name}
    counts = Counter((result.check, result.verdict.value) for result in verdict.checks)
    not_passed = [
        {
            "check": r.check,
            "subject": r.subject,
            "verdict": r.verdict.value,
            "action": r.action.value if r.action else "",
        }
        for r in verdict.checks
        if r.verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE)
    ]
    starts = {"declared": verdict.starts.declared, "present": verdict.starts.present}
    gauges = [
        Gauge(
            "ncclbench_accept_verdict",
            "1 for the verdict of the run",
            [({**profile, "verdict": word.value}, int(word is verdict.verdict)) for word in Verdict],
        ),
        Gauge("ncclbench_accept_exit_code", "exit code of ncclbench accept", [({**profile}, verdict.exit_code or 0)]),
        Gauge(
            "ncclbench_accept_starts",
            "process starts",
            [({**profile, "kind": kind}, count) for kind, count in starts.items()],
        ),
        Gauge(
            "ncclbench_accept_checks",
            "number of results",
            [({**profile, "check": check, "verdict": word}, count) for (check, word), count in sorted(counts.items())],
        ),
        Gauge(
            "ncclbench_accept_not_passed",
            "1 for each subject that failed or is inconclusive",
            [({**profile, **labels}, 1) for labels in not_passed],
        ),
    ]
    return prometheus_text(gauges) + "\n"
