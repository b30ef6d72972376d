"""The part of CuPy that handles streams, without a GPU.

When a `with` block of a stream ends, the stream of the enclosing block becomes current. A stream that was only put in
use by `use` is lost then, as in CuPy.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

# Modules that keep CuPy's objects: they are imported again for each test.
KEEPERS = ("ncclbench.transports.cuda.stream", "ncclbench.transports._cupy_nccl")


class Event:
    """An event with the stream on which it was recorded."""

    def record(self, stream: "Stream") -> None:
        self.stream = stream.cuda_stream


class Stream:
    """A stream of CuPy or torch, with a log of the events that streams waited for."""

    entered: ClassVar[list["Stream"]]
    current: ClassVar["Stream"]
    waits: ClassVar[list[tuple[Any, Event]]]

    def __init__(self, cuda_stream: Any = None, **_kind: bool) -> None:
        self.cuda_stream = object() if cuda_stream is None else cuda_stream  # CuPy wraps torch's stream
        self.ptr = self.cuda_stream

    def use(self) -> None:
        Stream.current = self

    def __enter__(self) -> "Stream":
        Stream.entered.append(self)
        Stream.current = self
        return self

    def __exit__(self, *_: object) -> None:
        Stream.entered.pop()
        Stream.current = Stream.entered[-1]

    def synchronize(self) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        Stream.waits.append((self.cuda_stream, event))


class RawKernel:
    """Records the stream of each launch."""

    launched_on: ClassVar[list[Any]]

    def __init__(self, _source: str, _name: str) -> None:
        pass

    def compile(self) -> None:
        pass

    def __call__(self, *_: object) -> None:
        RawKernel.launched_on.append(Stream.current.ptr)


class Pinned(bytearray):
    """Page-locked memory."""

    ptr = 4096


@contextmanager
def fake_cupy() -> Iterator[Any]:
    """Put this CuPy in place of the real one, and return `ncclbench.transports.cuda.stream` over it."""
    null = Stream(0)
    Stream.entered, Stream.current, Stream.waits, RawKernel.launched_on = [null], null, [], []
    cupy: Any = ModuleType("cupy")
    cupy.__version__ = "14.0"
    cupy.RawKernel = RawKernel
    cupy.cuda = ModuleType("cupy.cuda")
    cupy.cuda.Stream = cupy.cuda.ExternalStream = Stream
    cupy.cuda.Event, cupy.cuda.nccl = Event, SimpleNamespace()
    cupy.cuda.alloc_pinned_memory = Pinned
    cupy.cuda.get_current_stream = lambda: Stream.current
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", cupy)
        patch.setitem(sys.modules, "cupy.cuda", cupy.cuda)
        for name in KEEPERS:
            patch.delitem(sys.modules, name, raising=False)
        try:
            yield importlib.import_module("ncclbench.transports.cuda.stream")
        finally:
            for name in KEEPERS:
                sys.modules.pop(name, None)
