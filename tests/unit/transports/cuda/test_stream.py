"""Which stream CuPy launches on: ours, also after CuPy has entered and left another by itself.

CuPy is played: a block that is left makes current what was entered before it, whatever is merely in use.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.helpers.fake_cupy import RawKernel, Stream, fake_cupy


@pytest.fixture
def cuda_stream() -> Iterator[Any]:
    """`ncclbench.transports.cuda.stream`, over the fake CuPy."""
    with fake_cupy() as module:
        yield module


def fetch_a_column() -> None:
    """As CuPy does it: an array that is not contiguous is packed inside of a block of its own."""
    with Stream.current:
        pass


def test_gate_and_launches_use_the_measured_stream(cuda_stream: Any) -> None:
    stream = cuda_stream.CudaStream(Stream(7))
    fetch_a_column()
    stream.hold(1.0)
    stream.synchronize()
    assert RawKernel.launched_on == [7]


def test_another_current_stream_is_found_out(cuda_stream: Any) -> None:
    stream = cuda_stream.CudaStream(Stream(7))
    Stream(8).use()
    with pytest.raises(RuntimeError, match="no longer the one that is measured"):
        stream.synchronize()
    stream.make_current()  # as a process with two transports does
    fetch_a_column()
    stream.synchronize()


@pytest.mark.usefixtures("cuda_stream")
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
    call = _rows.CountsToHost(counts, 12)
    call()
    assert call.splits == [1, 4, 7, 10]
    assert OnDevice.fetched == [True]
