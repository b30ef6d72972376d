"""What transports share: steps in order, branches in threads that end with their program."""

import gc
import threading
from functools import partial
from typing import Any

import numpy as np
import pytest

from ncclbench.errors import Unable
from ncclbench.schedule import DTYPES, Collective, Concurrent, Kernel, Local, Op
from ncclbench.schedule.phases import SimplePhase
from ncclbench.transports._local import Branches, adds_float8, refuse_float8, steps_of
from ncclbench.transports.base import Call

WORLD = np.arange(2)[None]


def branch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("branch")]


def test_every_phase_is_a_step_and_is_told_its_branch() -> None:
    copy = partial(Local, kernel=Kernel.COPY, count=1)
    phases = (
        copy("first"),
        Concurrent("both", ((copy("a"), copy("b")), (Collective("c", Op.ALL_REDUCE, WORLD, 1, read="x", write="y"),))),
        copy("last"),
    )
    told: list[tuple[str, tuple[int, ...]]] = []
    ran: list[str] = []

    def call(phase: SimplePhase, branch: tuple[int, ...]) -> Call:
        told.append((phase.label, branch))
        return partial(ran.append, phase.label)

    steps = steps_of(phases, call)
    assert told == [("first", ()), ("a", (0,)), ("b", (0,)), ("c", (1,)), ("last", ())]
    assert [step.label for step in steps] == ["first", "both", "last"]
    assert ran == []
    for step in steps:
        step.launch()
    assert (ran[0], ran[-1]) == ("first", "last")
    assert ran.index("a") < ran.index("b")
    assert sorted(ran) == ["a", "b", "c", "first", "last"]


def test_branches_run_at_the_same_time_and_all_are_waited_for() -> None:
    meeting = threading.Barrier(2, timeout=20)  # each branch waits for the other: one after the other they would never
    call = Branches([[meeting.wait], [meeting.wait]])
    for _ in range(3):
        call()


def test_an_error_in_a_branch_surfaces() -> None:
    def fail() -> None:
        raise ValueError("in a branch")

    with pytest.raises(ValueError, match="in a branch"):
        Branches([[lambda: None], [fail]])()


def test_threads_of_branches_end_with_their_program() -> None:
    gc.collect()
    before = len(branch_threads())
    calls: list[Any] = [Branches([[lambda: None]] * 3) for _ in range(2)]
    for call in calls:
        call()
    mine = branch_threads()
    assert len(mine) > before
    del calls, call
    gc.collect()
    for thread in mine:
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("op", "dtype", "adds"),
    [
        (Op.ALL_REDUCE, "float8_e4m3fn", True),
        (Op.REDUCE_SCATTER, "float8_e5m2", True),
        (Op.ALL_GATHER, "float8_e5m2", False),  # what is only moved travels as bytes
        (Op.ALL_REDUCE, "int8", False),
        (Op.ALL_REDUCE, "bfloat16", False),
    ],
)
def test_which_phases_add_floats_of_8_bits(op: Op, dtype: str, adds: bool) -> None:
    assert adds_float8(Collective("x", op, WORLD, 2), DTYPES[dtype]) is adds


@pytest.mark.parametrize(
    ("nccl", "capability", "reason"),
    [(22400, 90, None), (22809, 100, None), (22304, 90, "from 2.24 on"), (22809, 89, "compute capability 9.0")],
)
def test_floats_of_8_bits_are_added_where_nccl_and_the_gpu_can(nccl: int, capability: int, reason: str | None) -> None:
    if reason is None:
        refuse_float8(DTYPES["float8_e4m3fn"], nccl, capability)
        return
    with pytest.raises(Unable, match=f"float8_e4m3fn .*{reason}"):
        refuse_float8(DTYPES["float8_e4m3fn"], nccl, capability)
