"""Output of commands: documents to a file or to stdout, and streams that tolerate a closed pipe.

If the reader of a pipe ends (``| head``, a killed `tee`), the next write raises, in the middle of a measurement or
before the exit code. The results are in the run directory, so output to a closed pipe is discarded. stderr carries
progress, so its output is discarded on a full disk too. A full disk under stdout remains an error, because a file with
redirected results must be complete.
"""

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ncclbench.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _TolerantStream(io.FileIO):
    """stdout or stderr; after a tolerated error its descriptor is replaced by /dev/null.

    Args:
        descriptor: 1 or 2; it is never closed.
        any_error: tolerate every error, not only a closed pipe.
    """

    def __init__(self, descriptor: int, *, any_error: bool) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._tolerated = OSError if any_error else BrokenPipeError

    def write(self, data: "ReadableBuffer") -> int:
        """Write `data`; after a tolerated error, discard it and all later data."""
        try:
            return super().write(data) or 0
        except self._tolerated:
            discard(self.fileno())
            return memoryview(data).nbytes


def discard(descriptor: int) -> None:
    """Redirect `descriptor` to /dev/null for the whole process."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def tolerate_closed_pipes() -> None:
    """Let stdout and stderr tolerate closed pipes; a replaced `sys.stdout` or `sys.stderr` is left unchanged."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or not isinstance(stream.buffer, io.BufferedWriter | io.FileIO):
            continue
        if stream.fileno() != descriptor:
            continue
        stream.flush()
        raw = _TolerantStream(descriptor, any_error=descriptor == 2)
        unbuffered = isinstance(stream.buffer, io.FileIO)  # python -u
        tolerant = io.TextIOWrapper(
            raw if unbuffered else io.BufferedWriter(raw),  # as in Python's own streams
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, tolerant)


def emit(content: str | bytes, out: Path | None) -> None:
    """Write `content` to `out`, or to stdout; text ends in a newline.

    Raises:
        UsageError: if `out` cannot be written; an existing file is then unchanged.
    """
    data = content if isinstance(content, bytes) else (content.rstrip("\n") + "\n").encode("utf-8", "backslashreplace")
    if out is None:
        if isinstance(content, bytes):
            sys.stdout.buffer.write(data)
        else:
            click.echo(content.rstrip("\n"))
        return
    try:
        target = out.resolve()  # so that a symbolic link remains
        if target.exists() and not target.is_file():
            raise UsageError(f"-o {out} is not a regular file")
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write -o {out}: {error}") from None


def refuse_terminal(fmt: str, suffix: str, out: Path | None) -> None:
    """Refuse to print a document for another program on a terminal.

    Raises:
        UsageError: if `out` is None and stdout is a terminal.
    """
    if out is None and sys.stdout.isatty():
        raise UsageError(f"{fmt} is not for a terminal; name a file: -o report{suffix}")
