"""Concurrent branches on the host: one thread per branch."""

import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ncclbench.schedule.phases import Concurrent
from ncclbench.transports.base import Call, Step


class Branches:
    """A call that runs each branch in its own thread, and returns when all are done.

    The threads wait between iterations, and end when the program is garbage-collected.

    Attributes:
        seconds: from the start of the last call to the end of each branch.
    """

    def __init__(self, branches: Sequence[Sequence[Call]]) -> None:
        """Start one thread per branch, which all calls use."""
        self._branches = branches
        pool = ThreadPoolExecutor(max_workers=len(branches), thread_name_prefix="branch")
        self._submit = pool.submit
        self.seconds = [0.0] * len(branches)
        weakref.finalize(self, pool.shutdown, wait=False)

    def __call__(self) -> None:
        """Run all branches."""
        start = time.perf_counter()
        running = [
            self._submit(_run_branch, calls, self.seconds, number, start) for number, calls in enumerate(self._branches)
        ]
        for branch in running:
            branch.result()


def _run_branch(calls: Sequence[Call], seconds: list[float], number: int, start: float) -> None:
    for call in calls:
        call()
    seconds[number] = time.perf_counter() - start


def branches_step(phase: Concurrent, branches: Sequence[Sequence[Call]]) -> Step:
    """The step of a concurrent phase on the host; branches with names are timed separately."""
    run = Branches(branches)
    return Step(phase.label, run, phase.names, (lambda: run.seconds.copy) if phase.names else None)
