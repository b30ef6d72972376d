"""Where a document goes: to stdout, or to a file that is there whole or not at all."""

import os
import sys
from pathlib import Path

import click

from ncclbench.errors import UsageError


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
    """A document for another program is not poured into a terminal.

    Raises:
        UsageError: if it would be.
    """
    if out is None and sys.stdout.isatty():
        raise UsageError(f"{fmt} is not for a terminal; name a file: -o report{suffix}")
