"""Where a command's output goes: documents to a file or stdout, and everything past readers that are gone.

A reader that has ended (``| head``, a `tee` that died) raises in the process that writes, in the middle of a
measurement or between a verdict and its exit code. The results are in the run directory, so what is written to a closed
pipe is discarded. On stderr, which carries progress, so is what meets a full disk. A full disk under stdout is still an
error: the file into which a user redirects results must hold them.
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


class _LastingStream(io.FileIO):
    """A descriptor that is not ours to close; it becomes /dev/null once its reader is gone.

    Args:
        descriptor: 1 or 2.
        any_error: also after an error other than a reader that is gone.
    """

    def __init__(self, descriptor: int, *, any_error: bool) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._tolerated = OSError if any_error else BrokenPipeError

    def write(self, data: "ReadableBuffer") -> int:
        """All of `data`; after a tolerated error nothing more, without a further one."""
        try:
            return super().write(data) or 0
        except self._tolerated:
            discard(self.fileno())
            return memoryview(data).nbytes


def discard(descriptor: int) -> None:
    """Send what any part of the process writes to `descriptor` from here on to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def outlive_readers() -> None:
    """Have stdout and stderr outlive their readers; a stream that is not the process's own is left as it is."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or not isinstance(stream.buffer, io.BufferedWriter | io.FileIO):
            continue
        if stream.fileno() != descriptor:
            continue
        stream.flush()
        raw = _LastingStream(descriptor, any_error=descriptor == 2)
        unbuffered = isinstance(stream.buffer, io.FileIO)  # python -u
        lasting = io.TextIOWrapper(
            raw if unbuffered else io.BufferedWriter(raw),  # as Python itself does it
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, lasting)


def emit(content: str | bytes, out: Path | None) -> None:
    """Write `content` to `out`, or to stdout; text ends in a newline.

    Raises:
        UsageError: if `out` cannot be written. What was there before is then untouched.
    """
    data = content if isinstance(content, bytes) else (content.rstrip("\n") + "\n").encode("utf-8", "backslashreplace")
    if out is None:
        if isinstance(content, bytes):
            sys.stdout.buffer.write(data)
        else:
            click.echo(content.rstrip("\n"))
        return
    try:
        target = out.resolve()  # a link stays a link
        if target.exists() and not target.is_file():
            raise UsageError(f"-o {out} is no regular file")
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write -o {out}: {error}") from None


def refuse_terminal(fmt: str, suffix: str, out: Path | None) -> None:
    """A document for another program is not written to a terminal.

    Raises:
        UsageError: if it would be.
    """
    if out is None and sys.stdout.isatty():
        raise UsageError(f"{fmt} is not for a terminal; name a file: -o report{suffix}")
