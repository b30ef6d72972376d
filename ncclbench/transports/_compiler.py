"""From a schedule to ready calls: the dispatch over phase types, once for all transports.

The result is a list of bare calls. No function of this module is on the stack when they are launched.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias, assert_never

from ncclbench.buffers.arrays import Buffers
from ncclbench.errors import Unable
from ncclbench.schedule.phases import AllToAllV, Collective, Concurrent, Exchange, Local, SimplePhase
from ncclbench.schedule.row_work import RowWork
from ncclbench.schedule.schedule import Schedule
from ncclbench.transports._branches import branches_step
from ncclbench.transports._local_work import local_call
from ncclbench.transports.base import Call, Step
from ncclbench.transports.cuda.nccl_limits import launches_of

# The branch of a concurrent phase that a phase belongs to: ``(b,)``, or ``()`` outside branches. Phases that run at the
# same time must not share a communicator, so each branch has its own.
Branch: TypeAlias = tuple[int, ...]


class PhaseCompiler(ABC):
    """Compiles one schedule for one rank; each transport has its own.

    Args:
        rank: the rank that makes the calls.
        schedule: the phases to compile.
        buffers: the buffers that the calls read and write.
    """

    def __init__(self, rank: int, schedule: Schedule, buffers: Buffers) -> None:
        """Compile nothing yet."""
        self.rank, self.schedule, self.dtype, self.buffers = rank, schedule, schedule.dtype, buffers

    def steps(self) -> tuple[Step, ...]:
        """One step per phase, in order."""
        steps = []
        for phase in self.schedule.phases:
            if isinstance(phase, Concurrent):
                branches = [[self.call(one, (b,)) for one in branch] for b, branch in enumerate(phase.branches)]
                steps.append(self.concurrent(phase, branches))
            else:
                steps.append(Step(phase.label, self.call(phase, ()), launches=launches_of(phase)))
        return tuple(steps)

    def call(self, phase: SimplePhase, branch: Branch) -> Call:
        """The ready call of a phase."""
        match phase:
            case Collective():
                return self.collective(phase, branch)
            case AllToAllV():
                return self.all_to_all_v(phase, branch)
            case Exchange():
                return self.exchange(phase, branch)
            case Local() | RowWork():
                return self.local(phase, branch)
            case _:
                assert_never(phase)

    @abstractmethod
    def collective(self, phase: Collective, branch: Branch) -> Call:
        """The ready call of a collective; `nothing` on a rank outside its groups."""

    @abstractmethod
    def all_to_all_v(self, phase: AllToAllV, branch: Branch) -> Call:
        """The ready call of an all-to-all with uneven splits; `nothing` on a rank outside its groups."""

    @abstractmethod
    def exchange(self, phase: Exchange, branch: Branch) -> Call:
        """The ready call of a round of flows; `nothing` on a rank without flows."""

    def local(self, phase: Local | RowWork, branch: Branch) -> Call:
        """The ready call of work on the rank's own buffers."""
        del branch
        return local_call(phase, self.rank, self.buffers)

    def concurrent(self, phase: Concurrent, branches: Sequence[Sequence[Call]]) -> Step:
        """The step of a concurrent phase from its branches' calls; on the host each branch is a thread."""
        return branches_step(phase, branches)


def refuse_mpi_only(phase: Collective, library_has: str) -> None:
    """Refuse collectives that only MPI has, on all ranks alike.

    Args:
        phase: the collective.
        library_has: subject and verb of the message, such as "NCCL has".

    Raises:
        Unable: if the collective must be persistent, or overlapped with computing.
    """
    if phase.persistent:
        raise Unable(f"{library_has} no persistent collectives; --transport mpi has")
    if phase.overlap:
        raise Unable(f"{library_has} no overlap of a collective with computing; --transport mpi has")
