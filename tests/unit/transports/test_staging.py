"""GPU buffers over MPI, without a GPU: staging on a device that does nothing before it is waited for.

What is not tried here is CuPy itself, and an MPI that really takes device pointers.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncclbench.buffers.arrays import allocate
from ncclbench.config.plugins import load, names
from ncclbench.errors import Unable
from ncclbench.schedule import DTYPES, Case, Collective, Op, Schedule
from ncclbench.schedule.dtypes import Array
from ncclbench.schedule.oracle import Oracle
from ncclbench.schedule.pattern import build_schedule
from ncclbench.schedule.phases import Concurrent, Local
from ncclbench.schedule.row_work import RowWork
from ncclbench.topology import Topology
from ncclbench.transports._staging import (
    Staging,
    after_synchronising,
    library_says_cuda,
    merged,
    sent_by,
    transfer_arrives,
)
from ncclbench.transports.base import Split
from ncclbench.transports.threads import ThreadTransport, play
from tests.helpers.fake_device import FakeDevice

RANKS = 4
Prepare = Callable[[FakeDevice], object]


def wrong_when_staged(schedule: Schedule, spoil: Prepare = lambda _: None) -> list[int]:
    """Wrong elements of each rank's device buffers, after two passes with other values."""

    def main(transport: ThreadTransport) -> int:
        device = FakeDevice()
        spoil(device)
        buffers = allocate(schedule, "cpu")  # the device's
        staging = Staging(device, schedule, buffers, transport.rank)
        steps = transport.compile(schedule, staging.twins).steps
        calls = []
        for phase, step in zip(schedule.phases, steps, strict=True):
            assert not isinstance(phase, Concurrent | Local | RowWork)
            calls.append(staging.around(phase, step.launch))
        wrong = 0
        for salt in range(2):
            oracle = Oracle(schedule, transport.rank, salt)
            oracle.prepare(buffers)
            transport.barrier()
            for call in calls:
                call()
            transport.barrier()
            wrong += oracle.count_wrong(buffers)
        return wrong

    return play(RANKS, main, timeout=20)


def schedules() -> list[tuple[str, Schedule]]:
    found = []
    for pattern in [name for name in names("patterns") if not hasattr(load("patterns", name), "size_and_dtype")]:
        for dtype in ("float32", "bfloat16"):
            try:
                schedule = build_schedule(
                    Case(pattern=pattern, nbytes=4096, dtype=dtype), Topology.from_hosts(["x", "x", "y", "y"])
                )
            except Unable:
                continue
            if not any(isinstance(phase, Concurrent | Local | RowWork) for phase in schedule.phases):
                found.append((f"{pattern} {dtype}", schedule))
    return found


SCHEDULES = schedules()
each_schedule = pytest.mark.parametrize("schedule", [s for _, s in SCHEDULES], ids=[name for name, _ in SCHEDULES])


@each_schedule
def test_every_pattern_is_right_through_the_host(schedule: Schedule) -> None:
    assert wrong_when_staged(schedule) == [0] * RANKS


@each_schedule
@pytest.mark.parametrize("forgotten", ["to_host", "to_device"])
def test_a_copy_that_is_forgotten_is_found_out(forgotten: str, schedule: Schedule) -> None:
    def spoil(device: FakeDevice) -> None:
        setattr(device, forgotten, lambda *_: None)

    assert sum(wrong_when_staged(schedule, spoil)) > 0


def test_another_current_stream_is_detected() -> None:
    def spoil(device: FakeDevice) -> None:
        device.synchronize = lambda: None  # type: ignore[method-assign]

    assert sum(wrong_when_staged(SCHEDULES[0][1], spoil)) > 0


def test_no_more_is_copied_than_is_sent_and_received() -> None:
    schedule = build_schedule(Case(pattern="gather", nbytes=4096), Topology.single_node(RANKS))

    def main(transport: ThreadTransport) -> tuple[int, int]:
        device = FakeDevice()
        staging = Staging(device, schedule, allocate(schedule, "cpu"), transport.rank)
        (step,) = transport.compile(schedule, staging.twins).steps
        staging.around(schedule.phases[0], step.launch)()  # type: ignore[arg-type]
        return device.to_host_bytes, device.to_device_bytes

    assert play(RANKS, main, timeout=20) == [(1024, 4096), *[(1024, 0)] * 3]


def test_both_halves_of_a_split_call_are_wrapped() -> None:
    order: list[str] = []
    device = FakeDevice()
    schedule = build_schedule(Case(pattern="all_reduce", nbytes=64), Topology.single_node(1))
    staging = Staging(device, schedule, allocate(schedule, "cpu"), 0)
    split = Split(lambda: order.append(f"start {device.to_host_bytes}"), lambda: order.append("wait"))
    (phase,) = schedule.phases
    assert isinstance(phase, Collective)
    call = staging.around(phase, split)
    assert isinstance(call, Split)
    call.start()
    assert (order, device.to_device_bytes) == (["start 64"], 0)
    call.wait()
    assert (order, device.to_device_bytes, device.enqueued) == (["start 64", "wait"], 64, [])


def test_device_pointers_are_passed_after_synchronising() -> None:
    device, seen = FakeDevice(), []
    call = after_synchronising(device, lambda: seen.append(len(device.enqueued)))
    device.to_device(np.zeros(1), np.ones(1))
    call()
    split = after_synchronising(device, Split(lambda: seen.append(len(device.enqueued)), lambda: None))
    assert isinstance(split, Split)
    device.to_device(np.zeros(1), np.ones(1))
    split.start()
    assert seen == [0, 0]


@pytest.mark.parametrize(
    ("exchange", "arrives"),
    [
        (lambda out, into: np.copyto(into, out), True),
        (lambda _out, _into: None, False),
        (lambda out, into: np.copyto(into[:-1], out[:-1]), False),
    ],
)
def test_a_transfer_that_does_not_arrive_whole_is_no_support(
    exchange: Callable[[Array, Array], object], arrives: bool
) -> None:
    send, recv = (np.zeros(1 << 12, np.uint8) for _ in range(2))
    assert transfer_arrives(FakeDevice(), send, recv, exchange) is arrives


def test_a_process_without_an_mpi_library_has_no_support(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text("7f00-7f01 r-xp 00000000 00:00 0 /usr/lib/libc.so.6\n7f02-7f03 r--p 0 00:00 0 /none/libmpi.so.40\n")
    assert not library_says_cuda(maps)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8))
def test_merged_stretches_are_the_same_bytes_without_overlap(pairs: list[tuple[int, int]]) -> None:
    stretches = [(min(pair), max(pair)) for pair in pairs]
    joined = merged(iter(stretches))
    assert {b for start, stop in joined for b in range(start, stop)} == {b for a, z in stretches for b in range(a, z)}
    assert all(a < b for a, b in joined)
    assert all(left[1] < right[0] for left, right in pairwise(joined))


def test_a_rank_outside_a_phase_sends_nothing() -> None:
    phase = Collective("a", Op.ALL_REDUCE, np.array([[0, 2]]), 4)
    itemsize = DTYPES["float32"].itemsize
    assert [list(sent_by(phase, rank, itemsize)) for rank in range(3)] == [[(0, 16)], [], [(0, 16)]]
