"""The verdict on a run, as it stands in ``verdict.json``. `accept` makes it, reports show it.

Schema history:
    1  first version.
"""

from enum import StrEnum
from pathlib import Path

import msgspec

from ncclbench.store.files import content_of, decoded
from ncclbench.store.records import Json

SCHEMA = 1
FILE = "verdict.json"


class Verdict(StrEnum):
    """The verdict of a check or a run: INCONCLUSIVE if a check cannot judge, NOT_RUN if there is nothing to judge."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    NOT_RUN = "NOT_RUN"


class Action(StrEnum):
    """The action for a result."""

    ISOLATE = "ISOLATE"
    RESEAT_OR_REBOOT = "RESEAT_OR_REBOOT"
    CHECK_CABLE = "CHECK_CABLE"
    CHECK_SWITCH = "CHECK_SWITCH"
    MONITOR = "MONITOR"


class CheckResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one check on one subject.

    Attributes:
        check: name of the check.
        subject: the judged part: a case, a rank, a version, or ``run``.
        verdict: the verdict on the subject.
        reason: the reason, in one line.
        action: the action, if one is needed.
        evidence: the rows of evidence: records, figures, bounds, sources.
        required: whether NOT_RUN makes the run as a whole inconclusive.
        conclusive: whether a figure was compared with a measured or published one. A PASS of the run needs at least
            one such result.
        cause: ``wrong_data`` or ``environment`` if that decides the exit code.
    """

    check: str
    subject: str
    verdict: Verdict
    reason: str = ""
    action: Action | None = None
    evidence: list[dict[str, Json]] = []
    required: bool = False
    conclusive: bool = False
    cause: str | None = None


class ProfileReference(msgspec.Struct, frozen=True, kw_only=True):
    """The profile of a verdict.

    Attributes:
        name: name of the profile.
        sha256: hash of its text, which is in the bundle.
    """

    name: str = ""
    sha256: str = ""


class StartCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The number of process starts.

    Attributes:
        declared: starts that the plan declares.
        present: starts that have finished all their cases.
    """

    declared: int = 0
    present: int = 0


class RunVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on a run.

    Attributes:
        schema: 1.
        verdict: the verdict on the run.
        reasons: the reasons, one per line.
        profile: the profile that the run was judged by.
        stamps: the stamps that every document about the run shows.
        starts: the process starts of the run.
        exit_code: exit code of ``ncclbench accept``.
        judged_by: the version of ncclbench that judged.
        baseline: name of the run that this one was compared with; null without one.
        checks: all results, in the order of the checks' names.
    """

    schema: int
    verdict: Verdict
    reasons: list[str] = []
    profile: ProfileReference = ProfileReference()
    stamps: list[str] = []
    starts: StartCounts = StartCounts()
    exit_code: int | None = None
    judged_by: str | None = None
    baseline: str | None = None
    checks: list[CheckResult] = []


def read_verdict(run: Path) -> RunVerdict | None:
    """Read the verdict of the run in `run`; None if the run was not judged.

    Raises:
        UsageError: if the verdict is damaged or has a newer schema.
    """
    path = run / FILE
    content = content_of(path)
    return None if content is None else decoded(content, RunVerdict, path, SCHEMA)
