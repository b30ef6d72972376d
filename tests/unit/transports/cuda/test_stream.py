"""Which stream CuPy launches on: ours, also after CuPy has entered and left another by itself.

CuPy is played: a block that is left makes current what was entered before it, whatever is merely in use.
"""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest


class Stream:
    """A stream of the played CuPy."""

    entered: list["Stream"]
    current: "Stream"

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr

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


class RawKernel:
    """Notes the stream that each launch goes to."""

    launched_on: list[int]

    def __init__(self, _source: str, _name: str) -> None:
        pass

    def compile(self) -> None:
        pass

    def __call__(self, *_: object) -> None:
        RawKernel.launched_on.append(Stream.current.ptr)


class Pinned(bytearray):
    """Page-locked memory."""

    ptr = 4096


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`ncclbench.transports.cuda.stream`, over the played CuPy."""
    null = Stream(0)
    Stream.entered, Stream.current, RawKernel.launched_on = [null], null, []
    cupy: Any = ModuleType("cupy")
    cupy.RawKernel = RawKernel
    cupy.cuda = SimpleNamespace(alloc_pinned_memory=Pinned, get_current_stream=lambda: Stream.current)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.delitem(sys.modules, "ncclbench.transports.cuda.stream", raising=False)
    yield importlib.import_module("ncclbench.transports.cuda.stream")
    sys.modules.pop("ncclbench.transports.cuda.stream", None)


def fetch_a_column() -> None:
    """As CuPy does it: an array that is not contiguous is packed inside of a block of its own."""
    with Stream.current:
        pass


def test_the_gate_and_all_that_follows_go_to_the_measured_stream(room: Any) -> None:
    stream = room.CudaStream(Stream(7))
    fetch_a_column()
    stream.hold(1.0)
    stream.synchronize()
    assert RawKernel.launched_on == [7]


def test_another_current_stream_is_found_out(room: Any) -> None:
    stream = room.CudaStream(Stream(7))
    Stream(8).use()
    with pytest.raises(RuntimeError, match="no longer the one that is measured"):
        stream.synchronize()
    stream.make_current()  # as whoever has two transports in a process says
    fetch_a_column()
    stream.synchronize()


@pytest.mark.usefixtures("room")
def test_a_stream_only_in_use_would_be_lost() -> None:
    """What went wrong once; or the tests above would say nothing."""
    Stream(7).use()
    fetch_a_column()
    assert Stream.current.ptr == 0


def test_counts_are_fetched_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A column of device memory is not contiguous; CuPy would pack it first."""
    from ncclbench.transports import _row_work as _rows

    class OnDevice(np.ndarray):
        """Memory that is fetched, and knows how."""

        fetched: list[bool] = []  # noqa: RUF012  one for all

        def get(self, out: Any) -> Any:
            OnDevice.fetched.append(bool(self.flags.c_contiguous))
            out[:] = self
            return out

    counts = np.arange(12, dtype=np.int32).view(np.uint8).view(OnDevice)
    monkeypatch.setattr(_rows, "is_on_host", lambda _array: False)
    monkeypatch.setattr(_rows, "pinned_bytes", lambda nbytes: np.empty(nbytes, np.uint8))
    call = _rows._CountsToHost(counts, 12)
    call()
    assert call.splits == [1, 4, 7, 10]
    assert OnDevice.fetched == [True]
