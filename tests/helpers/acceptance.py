"""Acceptance of a generated healthy run of 8 nodes, and of the same run with a fault."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ncclbench.accept.check_context import CheckContext
from ncclbench.accept.example_runs import Example, ExampleCase, write_example
from ncclbench.accept.judge import judge
from ncclbench.accept.profile import Rules, load_profile
from ncclbench.store.run_directory import read_run
from ncclbench.store.verdict import CheckResult, RunVerdict, Verdict

G, M = 1 << 30, 1 << 20
NODE = ExampleCase(pattern="all_reduce", nbytes=8 * G, bus_gb_per_s=478, group="node")
RAIL = ExampleCase(pattern="send_recv", nbytes=G, bus_gb_per_s=48, group="rail")
WORLD = ExampleCase(pattern="all_reduce", nbytes=8 * G, bus_gb_per_s=386.6)
HEALTHY = Example(cases=(NODE, RAIL, WORLD))


def example(**changes: Any) -> Example:
    """The healthy run, but for `changes`."""
    return replace(HEALTHY, **changes)


def case(original: ExampleCase, **changes: Any) -> ExampleCase:
    return replace(original, **changes)


def verdict_on(path: Path, profile: str | Rules = "h100-hgx-ib", **more: Any) -> RunVerdict:
    rules = load_profile(profile) if isinstance(profile, str) else profile
    return judge(CheckContext(read_run(path), rules, **more))


def made(tmp_path: Path, profile: str | Rules = "h100-hgx-ib", **changes: Any) -> RunVerdict:
    return verdict_on(write_example(tmp_path / "made", example(**changes)), profile)


def of(document: RunVerdict, check: str, verdict: Verdict | None = None) -> list[CheckResult]:
    return [r for r in document.checks if r.check == check and (verdict is None or r.verdict is verdict)]


def only(document: RunVerdict, check: str, verdict: Verdict) -> CheckResult:
    """The one result of the check with this verdict; no other check may fail or be inconclusive."""
    (result,) = of(document, check, verdict)
    others = {r.check for r in document.checks if r.verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE)}
    assert others == {check}, [(r.check, r.reason) for r in document.checks if r.check in others]
    return result
