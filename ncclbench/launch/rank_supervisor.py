"""Under mpiexec each rank is the child of a small process of its own, as of a wrapper script.

mpiexec kills the whole job as soon as one of its processes dies, so that no rank could store which one it was. Its
processes are therefore the parents of the ranks. A parent outlives a killed rank by as long as the watchdog needs. If
the parents are killed, the ranks notice it, store it, and end. A parent is forked before anything is loaded, sleeps in
a system call, and costs nothing.
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

# Rank 0 collects signs for 0.7 s after it has seen a connection close, then writes and tells the others.
_OUTLIVE_SECONDS = 3.0
# mpiexec passes on what ranks print, but stops in the moment in which one of its processes ends in anything but 0.
_DRAIN_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


def supervise() -> None:
    """Fork; returns in the child, which is the rank. The parent passes signals on and ends as the child does."""
    if not hasattr(os, "fork"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # none is lost between the fork and the handlers
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # mpiexec kills whole groups
        _end_with_parent(signal.SIGKILL)  # inside MPI_Init, where MPICH's ranks wait without a pause, none would notice
        if os.getppid() != parent:
            os._exit(Exit.ENVIRONMENT)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os._exit(_wait(child))


def outlive_parent() -> None:
    """In the rank, once it is watched: it notices by itself that its parent is gone, and reports it before it ends."""
    if under_mpiexec(os.environ):
        _end_with_parent(0)


def _end_with_parent(number: int) -> None:
    """Have Linux send this thread's process a signal when its parent dies; 0 for none."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _wait(child: int) -> int:
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        if os.WEXITSTATUS(status):
            time.sleep(_DRAIN_SECONDS)
        return os.WEXITSTATUS(status)
    time.sleep(_OUTLIVE_SECONDS)  # killed: the others still have to say so
    return Exit.ENVIRONMENT
