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
    """What was found. Unable is not failed, and not measured is not passed."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    NOT_RUN = "NOT_RUN"


class Action(StrEnum):
    """What should be done about a result."""

    ISOLATE = "ISOLATE"
    RESEAT_OR_REBOOT = "RESEAT_OR_REBOOT"
    CHECK_CABLE = "CHECK_CABLE"
    CHECK_SWITCH = "CHECK_SWITCH"
    MONITOR = "MONITOR"


class CheckResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one check says of one subject.

    Attributes:
        check: name of the check.
        subject: what was judged: a case, a rank, a version, or ``run``.
        verdict: what was found.
        reason: one line.
        action: what to do, if something should be done.
        evidence: the rows behind it: records, figures, bounds, sources.
        required: if it was NOT_RUN, the run as a whole is inconclusive.
        conclusive: a figure was held against one that was measured or published. A PASS of the whole needs at least
            one.
        cause: ``wrong_data`` or ``environment`` where that decides the exit code.
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
    """Which profile was used.

    Attributes:
        name: its name.
        sha256: hash of its text, which is in the bundle.
    """

    name: str = ""
    sha256: str = ""


class StartCounts(msgspec.Struct, frozen=True, kw_only=True):
    """How many process starts there are.

    Attributes:
        declared: those that the plan declares.
        present: those that have finished all their cases.
    """

    declared: int = 0
    present: int = 0


class RunVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on a run.

    Attributes:
        schema: 1.
        verdict: what was found.
        reasons: why, in lines.
        profile: what the run was judged by.
        stamps: what every document about the run must say.
        starts: its process starts.
        exit_code: of ``ncclbench accept``.
        judged_by: the version that judged.
        baseline: name of the run that it was compared with; null without one.
        checks: every result, in the order of the checks' names.
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
    """The verdict of the run in `run`; None if it was measured and not judged.

    Raises:
        UsageError: if there is one that is damaged or of a newer schema: an unreadable verdict is not "no verdict".
    """
    path = run / FILE
    content = content_of(path)
    return None if content is None else decoded(content, RunVerdict, path, SCHEMA)
