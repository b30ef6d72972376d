"""The event log: one JSON object per line, each with the hash of the line before.

The chain shows a later change or removal of a line. It cannot show that a line was true when it was written.
"""

import datetime
from pathlib import Path

import msgspec

from ncclbench.errors import UsageError
from ncclbench.store.files import line_hash, whole_lines
from ncclbench.store.manifest import SoftwareRecord
from ncclbench.store.records import Json
from ncclbench.units import Int64

GENESIS = "0" * 64


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the event log.

    Attributes:
        time: when it was written, in UTC.
        kind: ``start``, ``resume``, ``import``, ``case``, ``result``, ``warning``, ``lost``, ``end`` or ``verdict``.
        start: the process start of the run, from 0.
        mode: the plan's mode of the process start.
        case: the case that began, or whose record was stored.
        finished: of `start` and `resume`: number of cases that were finished before.
        command: the command line.
        pids: process ids of the start's ranks.
        process: a mark of rank 0's process, since process ids repeat in containers.
        software: each different set of versions and settings once, with the ranks that have it.
        status: of `result`: the status of the record.
        record_sha256: hash of the record's line without its newline.
        samples_sha256: hash of the record's samples file.
        ranks: of `lost`: the ranks at fault.
        reason: of `lost`: what happened.
        text: of `warning`: the warning.
        message: older name of `text`.
        cases: of `warning`: the affected cases.
        exit_code: of `end`: the exit code.
        files: of `import`: the logs, with their hashes.
        verdict: of `verdict`: ``PASS``, ``FAIL``, ``INCONCLUSIVE`` or ``NOT_RUN``.
        verdict_sha256: hash of ``verdict.json``.
        profile_sha256: hash of the profile's text.
        previous: hash of the line before.
    """

    time: str | None = None
    kind: str
    start: Int64 = msgspec.field(default_factory=int)
    mode: str | None = None
    case: str | None = None
    finished: Int64 | None = None
    command: list[str] | None = None
    pids: list[Int64 | str | None] | None = None
    process: str | None = None
    software: list[SoftwareRecord] | None = None
    status: str | None = None
    record_sha256: str | None = None
    samples_sha256: str | None = None
    ranks: list[Int64] = []
    reason: str | None = None
    text: str | None = None
    message: str | None = None
    cases: list[str] | None = None
    exit_code: Int64 | None = None
    files: list[dict[str, Json]] | None = None
    verdict: str | None = None
    verdict_sha256: str | None = None
    profile_sha256: str | None = None
    previous: str | None = None

    @property
    def says(self) -> str:
        """The text of the event; "" if it has none."""
        return self.message or self.text or self.reason or ""


def utc_now() -> datetime.datetime:
    """The current time in UTC."""
    return datetime.datetime.now(datetime.UTC)


def now() -> str:
    """The current time in the format of records."""
    return utc_now().isoformat(timespec="milliseconds").replace("+00:00", "Z")


def encode(kind: str, previous: str, fields: dict[str, object]) -> bytes:
    """One line of the log, with its newline."""
    return msgspec.json.encode({"time": now(), "kind": kind, **fields, "previous": previous}) + b"\n"


def read_events(path: Path) -> list[Event]:
    """The events of all complete lines; a last line that a crash cut off is skipped.

    Raises:
        UsageError: if a line is damaged; the message names it.
    """
    found = []
    for number, line in enumerate(whole_lines(path), 1):
        try:
            found.append(msgspec.json.decode(line, type=Event))
        except (msgspec.DecodeError, RecursionError) as error:
            raise UsageError(f"{path}, line {number} is damaged: {error}") from None
    return found


def broken_link(path: Path) -> int | None:
    """The number, from 1, of the first line whose `previous` is not the hash of the line before; None without one."""
    previous = GENESIS
    for number, line in enumerate(whole_lines(path), 1):
        try:
            stated = msgspec.json.decode(line, type=_ChainedLine).previous
        except (msgspec.DecodeError, RecursionError):
            return number
        if stated != previous:
            return number
        previous = line_hash(line)
    return None


class _ChainedLine(msgspec.Struct):
    previous: str
