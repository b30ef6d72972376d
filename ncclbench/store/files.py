"""Files of a run directory: read without trusting them, decoded once, and written so that a kill leaves them whole."""

import hashlib
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from ncclbench.config.refusals import refuse_newer
from ncclbench.errors import EnvironmentFault, UsageError

S = TypeVar("S", bound=msgspec.Struct)


def content_of(path: Path) -> bytes | None:
    """What is in a file; None if there is none of that name.

    Raises:
        UsageError: if it is no regular file: a pipe would never end, a device would fill the memory.
        EnvironmentFault: if it cannot be read.
    """
    try:
        return path.read_bytes() if is_regular(path) else None
    except OSError as error:
        raise unreadable(error, path) from None


def is_regular(path: Path) -> bool:
    """Whether there is such a file at all; see `content_of` for what it raises."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no regular file, as everything in a run directory must be")
        return path.exists()
    except OSError as error:
        raise unreadable(error, path) from None


def unreadable(error: OSError, path: Path) -> EnvironmentFault:
    """The one line for a file that is there and cannot be read."""
    return EnvironmentFault(f"cannot read {error.filename or path}: {error.strerror}")


def decoded(content: bytes, kind: type[S], where: Path | str, newest: int) -> S:
    """JSON of a schema, as its type.

    Args:
        content: one object.
        kind: what it is.
        where: the file, and the line if it has several; for messages.
        newest: the highest schema that this ncclbench reads.

    Raises:
        UsageError: naming `where`, if it has no schema number, is of a newer schema, or is damaged.
    """
    try:
        data = msgspec.json.decode(content)
        if not isinstance(data, dict):
            data = msgspec.convert(data, dict[str, object])  # raises, in the words of the others
        schema = data.get("schema")
        if type(schema) is not int or schema < 1:  # a bool is an int to isinstance
            raise UsageError(f"{where} has no schema number")
        refuse_newer(schema, newest, where)
        return msgspec.convert(data, kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"{where} is damaged: {error}") from None


def line_hash(line: bytes) -> str:
    """SHA-256 of a line without its newline."""
    return hashlib.sha256(line.rstrip(b"\n")).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a JSON-lines file that were written to their end."""
    lines = (content_of(path) or b"").split(b"\n")
    return [line for line in lines[:-1] if line]  # what follows the last newline is torn, or nothing


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def append_line(path: Path, line: bytes) -> None:
    """Append a line and fsync it; of a line that the disk does not take, nothing stays."""
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        if path.exists():  # a full disk may have taken half the line
            os.truncate(path, before)
        raise


def cut_torn_line(path: Path) -> None:
    """Take away what a crash has left of a last line."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def sync_folder(path: Path) -> None:
    """Make the names in a folder outlast a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
