"""A compiler that makes the call of each phase with a function of the test."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from ncclbench.schedule import DTYPES
from ncclbench.schedule.phases import AllToAllV, Collective, Concurrent, Exchange, Local, Phase, SimplePhase
from ncclbench.schedule.row_work import RowWork
from ncclbench.transports._branches import branches_step
from ncclbench.transports._compiler import Branch, PhaseCompiler
from ncclbench.transports.base import Call, Step

Calling = Callable[[SimplePhase, Branch], Call]
Branching = Callable[[Concurrent, Sequence[Sequence[Call]]], Step]


class _ToldCompiler(PhaseCompiler):
    def __init__(self, phases: Sequence[Phase], call: Calling, branching: Branching) -> None:
        schedule: Any = SimpleNamespace(phases=phases, dtype=DTYPES["float32"])
        super().__init__(0, schedule, {})
        self._call, self._branching = call, branching

    def collective(self, phase: Collective, branch: Branch) -> Call:
        return self._call(phase, branch)

    def all_to_all_v(self, phase: AllToAllV, branch: Branch) -> Call:
        return self._call(phase, branch)

    def exchange(self, phase: Exchange, branch: Branch) -> Call:
        return self._call(phase, branch)

    def local(self, phase: Local | RowWork, branch: Branch) -> Call:
        return self._call(phase, branch)

    def concurrent(self, phase: Concurrent, branches: Sequence[Sequence[Call]]) -> Step:
        return self._branching(phase, branches)


def steps_of(phases: Sequence[Phase], call: Calling, branching: Branching = branches_step) -> tuple[Step, ...]:
    """The steps of `phases`, with calls made by `call`."""
    return _ToldCompiler(phases, call, branching).steps()
