"""The event log: one JSON object a line, each with the hash of the line before.

The chain shows that nothing was changed or taken out afterwards; it cannot show that what was written was true.
"""

import datetime
import hashlib
from pathlib import Path
from typing import Any

import msgspec

from ncclbench.errors import UsageError
from ncclbench.store.regular_files import content_of
from ncclbench.store.stored_types import EventShape

GENESIS = "0" * 64


def utc_now() -> datetime.datetime:
    """The time, in UTC."""
    return datetime.datetime.now(datetime.UTC)


def now() -> str:
    """The time, as records have it."""
    return utc_now().isoformat(timespec="milliseconds").replace("+00:00", "Z")


def line_hash(line: bytes) -> str:
    """SHA-256 of a line without its newline."""
    return hashlib.sha256(line.rstrip(b"\n")).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encode(kind: str, previous: str, fields: dict[str, Any]) -> bytes:
    """One line of the log, with its newline."""
    return msgspec.json.encode({"time": now(), "kind": kind, **fields, "previous": previous}) + b"\n"


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole lines of the log; one torn by a crash is not there.

    Raises:
        UsageError: naming the line that is damaged.
    """
    found = []
    for number, line in enumerate(whole_lines(path), 1):
        try:
            kind = msgspec.json.decode(line, type=EventShape).kind
            found.append({**msgspec.json.decode(line), "kind": str(kind)})
        except (msgspec.DecodeError, RecursionError) as error:
            raise UsageError(f"{path}, line {number} is damaged: {error}") from None
    return found


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a JSON-lines file that were written to their end."""
    lines = (content_of(path) or b"").split(b"\n")
    return [line for line in lines[:-1] if line]  # what follows the last newline is torn, or nothing


def broken_link(path: Path) -> int | None:
    """The number of the first line, from 1, whose `previous` is not the hash of the line before it; None if sound."""
    previous = GENESIS
    for number, line in enumerate(whole_lines(path), 1):
        try:
            stated = msgspec.json.decode(line)["previous"]
        except (msgspec.DecodeError, KeyError, TypeError):
            return number
        if stated != previous:
            return number
        previous = line_hash(line)
    return None
