"""What buffers of a MoE layer are expected to hold: made ahead by threads, and the same however it is cut."""

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


def test_rows_come_in_their_order_and_few_are_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_threads", lambda: (ThreadPoolExecutor(4), 4))
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


def test_an_error_in_a_thread_that_makes_rows_is_told() -> None:
    def fail() -> Array:
        raise ValueError("no such row")

    with pytest.raises(ValueError, match="no such row"):
        list(contents.compute_ahead([fail]))


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_a_buffer_holds_the_same_however_it_is_cut(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_variants(case_of(variant="flat", format="fp8"), Topology.single_node(4))[0]

    def held() -> tuple[dict[str, bytes], int]:
        assert first.contents is not None
        found = {name: list(first.contents.after(1, name, 1)) for name in first.buffers}
        for stretches in found.values():
            assert [s.start for s in stretches[1:]] == [s.stop for s in stretches[:-1]]
        joined = {name: b"".join(s.bits.tobytes() for s in stretches) for name, stretches in found.items()}
        return joined, sum(map(len, found.values()))

    whole, fewest = held()
    monkeypatch.setattr(contents, "_CHUNK_BYTES", chunk)
    cut, number = held()
    assert cut == whole
    assert any(whole.values())
    assert (number > fewest) is (chunk < 1 << 20)
