"""Expected contents of the buffers of a MoE layer: computed ahead by threads, independent of the chunk size."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from ncclbench.moe import expected_buffers as contents
from ncclbench.schedule.dtypes import Array
from ncclbench.schedule.pattern import build_variants
from ncclbench.topology import Topology
from tests.helpers.moe_cases import case_of


def test_rows_are_in_order_and_few_are_computed_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "row_threads", lambda: (ThreadPoolExecutor(4), 4))
    begun = []

    def make(number: int) -> Array:
        begun.append((number, threading.get_ident()))
        time.sleep(0.02 if number % 4 == 0 else 0.0)  # the first calls end last
        return np.full(1, number)

    rows = contents.compute_ahead(partial(make, number) for number in range(19))
    assert int(next(rows)[0]) == 0
    time.sleep(0.1)
    assert len(begun) <= 5
    assert [int(array[0]) for array in rows] == list(range(1, 19))
    assert threading.get_ident() not in {thread for _, thread in begun}


def test_error_in_a_row_thread_is_raised() -> None:
    def fail() -> Array:
        raise ValueError("no such row")

    with pytest.raises(ValueError, match="no such row"):
        list(contents.compute_ahead([fail]))


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_buffer_contents_do_not_depend_on_chunk_size(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_variants(case_of(variant="flat", format="fp8"), Topology.single_node(4))[0]

    def contents_and_chunks() -> tuple[dict[str, bytes], int]:
        assert first.contents is not None
        found = {name: list(first.contents.after(1, name, 1)) for name in first.buffers}
        for stretches in found.values():
            assert [s.start for s in stretches[1:]] == [s.stop for s in stretches[:-1]]
        joined = {name: b"".join(s.bits.tobytes() for s in stretches) for name, stretches in found.items()}
        return joined, sum(map(len, found.values()))

    whole, fewest = contents_and_chunks()
    monkeypatch.setattr(contents, "CHUNK_BYTES", chunk)
    cut, number = contents_and_chunks()
    assert cut == whole
    assert any(whole.values())
    assert (number > fewest) is (chunk < 1 << 20)
