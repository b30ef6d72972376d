"""The verdict that stands in a run directory, for those who show it. Making one is the business of `accept`."""

from pathlib import Path
from typing import Any, Literal

import msgspec

from ncclbench.errors import UsageError
from ncclbench.store.regular_files import content_of

SCHEMA = 1

Word = Literal["PASS", "FAIL", "INCONCLUSIVE", "NOT_RUN"]


class CheckResult(msgspec.Struct, frozen=True, kw_only=True):
    """One check on one subject, with its reason and its evidence."""

    check: str
    subject: str
    verdict: Word
    reason: str | None = None
    action: str | None = None
    evidence: list[dict[str, Any]] = []


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """RUN/verdict.json; fields that are not known here are ignored."""

    schema: int
    verdict: Word
    reasons: list[str] = []
    profile: dict[str, Any] | None = None
    stamps: list[str] = []
    starts: dict[str, Any] | None = None
    checks: list[CheckResult] = []


def read_judgement(run: Path) -> Judgement | None:
    """The verdict of the run in `run`; None if it was measured and not judged.

    Raises:
        UsageError: if there is one that is damaged or of a newer schema: an unreadable verdict is not "no verdict".
    """
    path = run / "verdict.json"
    content = content_of(path)
    if content is None:
        return None
    try:
        stated = msgspec.json.decode(content)
        schema = stated.get("schema") if isinstance(stated, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise UsageError(f"{path} has schema {schema}; this ncclbench reads up to {SCHEMA}: use a newer one")
        return msgspec.json.decode(content, type=Judgement)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: {error}") from None
