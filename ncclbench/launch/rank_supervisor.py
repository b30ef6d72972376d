"""Under mpiexec, run each rank as the child of a small supervisor process.

mpiexec kills the whole job as soon as one of its processes dies, before a rank can store which one it was. Therefore
mpiexec starts supervisors, and each supervisor forks its rank. If a rank is killed, its supervisor stays alive for as
long as the watchdog needs. If supervisors are killed, the ranks notice it, store it, and end. A supervisor is forked
before anything is loaded and sleeps in a system call, so it does not disturb the measurement.
"""

import ctypes
import os
import signal
import time
from contextlib import suppress
from types import FrameType

from ncclbench.errors import Exit
from ncclbench.launch.launcher_detection import under_mpiexec
from ncclbench.launch.signals import SIGNALS

# After a connection closes, rank 0 collects reports for 0.7 s, then stores the fault and notifies the other ranks.
_OUTLIVE_SECONDS = 3.0
# mpiexec forwards the output of ranks, but stops as soon as one of its processes ends in another code than 0.
_DRAIN_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


def supervise() -> None:
    """Fork and return in the child, which is the rank. The parent forwards signals and ends with the child's code."""
    if not hasattr(os, "fork"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # so that no signal is lost between the fork and the handlers
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # mpiexec kills whole groups
        # A rank inside MPI_Init could not react to another signal: MPICH's ranks poll there without a pause.
        _set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(Exit.ENVIRONMENT)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return

    def forward(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for number in SIGNALS:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os._exit(_wait(child))


def outlive_parent() -> None:
    """In the rank, once its watchdog runs: stay alive without the parent, so that the watchdog can report the loss."""
    if under_mpiexec(os.environ):
        _set_parent_death_signal(0)


def _set_parent_death_signal(number: int) -> None:
    """Let Linux send `number` to this process when its parent dies; 0 for no signal."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _wait(child: int) -> int:
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        if os.WEXITSTATUS(status):
            time.sleep(_DRAIN_SECONDS)
        return os.WEXITSTATUS(status)
    time.sleep(_OUTLIVE_SECONDS)  # it was killed: the other ranks still store and report it
    return Exit.ENVIRONMENT
