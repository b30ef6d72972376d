"""Read, decode and write the files of a run directory. Input is validated, and writes survive a kill."""

import hashlib
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from ncclbench.config.refusals import refuse_newer
from ncclbench.errors import EnvironmentFault, UsageError

S = TypeVar("S", bound=msgspec.Struct)


def content_of(path: Path) -> bytes | None:
    """The content of a file; None if there is no such file.

    Raises:
        UsageError: if it is no regular file: a pipe may never end, and a device may fill the memory.
        EnvironmentFault: if it cannot be read.
    """
    try:
        return path.read_bytes() if is_regular(path) else None
    except OSError as error:
        raise unreadable(error, path) from None


def is_regular(path: Path) -> bool:
    """Whether the file exists; raises as `content_of` does."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no regular file, as everything in a run directory must be")
        return path.exists()
    except OSError as error:
        raise unreadable(error, path) from None


def unreadable(error: OSError, path: Path) -> EnvironmentFault:
    """The error for a file that exists and cannot be read."""
    return EnvironmentFault(f"cannot read {error.filename or path}: {error.strerror}")


def decoded(content: bytes, kind: type[S], where: Path | str, newest: int) -> S:
    """Decode a JSON object that has a schema number.

    Args:
        content: one JSON object.
        kind: type of the object.
        where: the file, and the line if it has several; for messages.
        newest: the highest schema that this ncclbench reads.

    Raises:
        UsageError: if it has no schema number, is of a newer schema, or is damaged; the message names `where`.
    """
    try:
        data = msgspec.json.decode(content)
        if not isinstance(data, dict):
            data = msgspec.convert(data, dict[str, object])  # raises, with the same message as for other types
        schema = data.get("schema")
        if type(schema) is not int or schema < 1:  # isinstance(True, int) is true
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
    """The complete lines of a JSON-lines file."""
    lines = (content_of(path) or b"").split(b"\n")
    return [line for line in lines[:-1] if line]  # after the last newline comes a cut-off line, or nothing


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def append_line(path: Path, line: bytes) -> None:
    """Append a line and fsync it; a line that does not fit on the disk is removed completely."""
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        if path.exists():  # a full disk may hold half of the line
            os.truncate(path, before)
        raise


def cut_torn_line(path: Path) -> None:
    """Remove the part of a last line that a crash left."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def sync_folder(path: Path) -> None:
    """Fsync a folder, so that its names survive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
