"""What transports share: steps in order, branches in threads that end with their program."""

import gc
import threading
from functools import partial
from typing import Any

import numpy as np
import pytest

from ncclbench.schedule import Collective, Concurrent, Kernel, Local, Op
from ncclbench.schedule.phases import SimplePhase
from ncclbench.transports._branches import Branches
from ncclbench.transports.base import Call
from tests.helpers.compilers import steps_of

WORLD = np.arange(2)[None]


def branch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("branch")]


def test_each_phase_is_compiled_with_its_branch() -> None:
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


def test_branches_run_concurrently_and_all_finish() -> None:
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
