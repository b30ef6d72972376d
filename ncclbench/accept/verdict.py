"""What a check says, what all of them add up to, and the exit code that follows.

Schema history of ``verdict.json``:
    1  first version.
"""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any

import msgspec

from ncclbench.errors import Exit, worst
from ncclbench.units import counted

SCHEMA = 1


class Verdict(StrEnum):
    """What was found. Unable is not failed, and not measured is not passed."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    NOT_RUN = "NOT_RUN"


class Action(StrEnum):
    """What somebody should do about it."""

    ISOLATE = "ISOLATE"
    RESEAT_OR_REBOOT = "RESEAT_OR_REBOOT"
    CHECK_CABLE = "CHECK_CABLE"
    CHECK_SWITCH = "CHECK_SWITCH"
    MONITOR = "MONITOR"


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What one check says of one subject.

    Attributes:
        check: name of the check.
        subject: what was judged: a case, a rank, a version, or ``run``.
        verdict: what was found.
        reason: one line.
        action: what to do, if something is to be done.
        evidence: the rows behind it: records, figures, bounds, sources.
        required: if it was NOT_RUN, the run as a whole is inconclusive.
        conclusive: a figure was held against one that somebody has measured or published. A PASS of the whole needs
            at least one.
        cause: ``wrong_data`` or ``environment`` where that decides the exit code.
    """

    check: str
    subject: str
    verdict: Verdict
    reason: str
    action: Action | None = None
    evidence: list[dict[str, Any]] = []
    required: bool = False
    conclusive: bool = False
    cause: str | None = None


class ProfileName(msgspec.Struct, frozen=True, kw_only=True):
    """Which profile was used; the hash is of its text, which is in the bundle."""

    name: str
    sha256: str


class Starts(msgspec.Struct, frozen=True, kw_only=True):
    """Process starts: how many the plan declares, and how many have finished all its cases."""

    declared: int
    present: int


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """``verdict.json``."""

    schema: int
    verdict: Verdict
    reasons: list[str]
    profile: ProfileName
    stamps: list[str]
    starts: Starts
    exit_code: int
    judged_by: str
    baseline: str | None
    checks: list[Result]


def overall(results: Sequence[Result], *, measured: bool) -> tuple[Verdict, list[str]]:
    """The verdict on the whole run, and why.

    FAIL if any check fails. INCONCLUSIVE if any is, if something required was not measured, or if no figure was held
    against more than an assumption: a gate that measured nothing cannot pass.

    Args:
        results: of all checks.
        measured: whether any case was timed at all.
    """
    failed = _counted(results, Verdict.FAIL)
    open_ = _counted(results, Verdict.INCONCLUSIVE)
    missing = [r for r in results if r.verdict is Verdict.NOT_RUN and r.required]
    reasons = [f"{name}: {many} failed" for name, many in failed.items()]
    reasons += [f"{name}: {many} inconclusive" for name, many in open_.items()]
    if missing:
        reasons.append(f"{counted(len(missing), 'required entry')} of the profile not measured")
    if not measured:
        reasons.append("no case was measured")
    elif not any(r.conclusive for r in results):
        reasons.append("no figure was held against a published or measured one")
    if failed:
        return Verdict.FAIL, reasons
    if not measured:
        return Verdict.NOT_RUN, reasons
    if reasons:
        return Verdict.INCONCLUSIVE, reasons
    passed = sum(r.verdict is Verdict.PASS for r in results)
    return Verdict.PASS, [f"{passed} checks passed, none failed"]


def _counted(results: Iterable[Result], verdict: Verdict) -> dict[str, int]:
    counts: dict[str, int] = {}
    for result in results:
        if result.verdict is verdict:
            counts[result.check] = counts.get(result.check, 0) + 1
    return counts


_EXIT_OF_VERDICT = {Verdict.PASS: Exit.GOOD, Verdict.FAIL: Exit.FAIL}
_EXIT_OF_CAUSE = {"wrong_data": Exit.WRONG_DATA, "environment": Exit.ENVIRONMENT}


def exit_code(verdict: Verdict, results: Iterable[Result]) -> Exit:
    """The exit code: of the verdict, or of a worse cause that a check names."""
    causes = [_EXIT_OF_CAUSE[r.cause] for r in results if r.cause and r.verdict is not Verdict.PASS]
    return worst([_EXIT_OF_VERDICT.get(verdict, Exit.INCONCLUSIVE), *causes])
