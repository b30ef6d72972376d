"""What a command says may find nobody to read it; what it does goes on all the same.

A reader that is gone (``| head``, a `tee` that died) raises in whoever writes, in the middle of a measurement or
between a verdict and its exit code. Nothing that a command is worth is in these streams, so what is written to a closed
pipe goes nowhere, and on stderr, which carries progress, so does what finds a full disk. A full disk under stdout is
still an error: whoever sent results there believes that they are in that file.
"""

import io
import os
import sys
from typing import Any


class _Courteous(io.FileIO):
    """A descriptor that is not ours to close; once nobody takes what is written, it is /dev/null.

    Args:
        descriptor: 1 or 2.
        whatever: also where it is not a reader that is missing.
    """

    def __init__(self, descriptor: int, *, whatever: bool) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._tolerated = OSError if whatever else BrokenPipeError

    def write(self, data: Any) -> int:
        """All of `data`, or nothing more for ever."""
        try:
            return super().write(data) or 0
        except self._tolerated:
            discard(self.fileno())
            return memoryview(data).nbytes


def discard(descriptor: int) -> None:
    """What is written to `descriptor` from here on, by whomever, goes nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def make_courteous() -> None:
    """Have stdout and stderr outlive their readers; a stream that is not the process's own is left as it is."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or not isinstance(stream.buffer, io.BufferedWriter | io.FileIO):
            continue
        if stream.fileno() != descriptor:
            continue
        stream.flush()
        raw = _Courteous(descriptor, whatever=descriptor == 2)
        unbuffered = isinstance(stream.buffer, io.FileIO)  # python -u
        courteous = io.TextIOWrapper(
            raw if unbuffered else io.BufferedWriter(raw),  # as Python itself does it
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, courteous)
