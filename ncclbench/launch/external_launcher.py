"""Process starts by an external launcher: each process start is one call of the launcher.

In a batch script, an interactive allocation or on the head node, ``--launcher "srun --ntasks-per-node 8"`` names the
command that starts ranks. A launcher starts its processes once, and its ranks cannot start further ones. Therefore
the process that makes several process starts runs outside of the ranks. The run directory must be visible to rank 0
and to this process.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from ncclbench.errors import EnvironmentFault, Exit, NcclbenchError, UsageError, worst
from ncclbench.launch.launcher_detection import slurm_allocation_nodes
from ncclbench.launch.mpiexec import prepare_launcher_process
from ncclbench.launch.process_starts import StartMissing
from ncclbench.launch.signals import blocked, forwarding_signals, interruption

# After a signal: rank 0 collects reports and stores the record in progress, and the launcher ends the other ranks.
_END_SECONDS = 30.0
_POLL_SECONDS = 0.05
_FLAG = "--launcher"


def launcher_words(text: str) -> list[str]:
    """Split the value of `--launcher` as a shell does.

    Raises:
        UsageError: if it is empty, or a quote is not closed.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{_FLAG} {text!r}: {error}") from None
    if not words:
        raise UsageError(f"{_FLAG} is empty; name the command that starts ranks here, such as --launcher 'srun -N2'")
    return words


def launcher_line(words: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The command line of one process start: the launcher, ncclbench, and its arguments.

    torchrun needs a module; other launchers start this Python interpreter. A launcher that ends in ``ncclbench`` names
    the program itself, for example if ranks run in a container with another Python.
    """
    if Path(words[-1]).name == "ncclbench":
        program: list[str] = []
    elif _is_torchrun(words):
        program = ["-m", "ncclbench"]
    else:
        program = [sys.executable, "-m", "ncclbench"]
    return [*words, *program, *arguments]


def _is_torchrun(words: Sequence[str]) -> bool:
    named = any(Path(word).name == "torchrun" or word == "torch.distributed.run" for word in words)
    return named and "--no-python" not in words


class ExternalLauncher:
    """Starts the ranks by an external launcher, once for each process start."""

    def __init__(self, words: Sequence[str]) -> None:
        """Keep the launcher's command, as `launcher_words` returns it."""
        self._words = list(words)
        self._signal: int | None = None

    def start(self, arguments: Sequence[str], out: Path) -> Exit:
        """Run ``ncclbench ARGUMENTS`` under the launcher, and return the exit code.

        Raises:
            StartMissing: if the launcher failed and left no run directory.
            NcclbenchError: if the launcher could not be started or was interrupted, or if its ranks refuse the request.
        """
        line = launcher_line(self._words, arguments)
        with blocked():  # a signal that arrives now must end the launcher too
            try:
                job = subprocess.Popen(
                    line,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # a Ctrl-C on the terminal reaches the launcher once, through this process
                    preexec_fn=prepare_launcher_process,
                )
            except OSError as error:
                raise EnvironmentFault(f"could not start {_FLAG} {line[0]!r}: {error.strerror or error}") from None
        code = self._wait(job)
        if not (out / "manifest.json").exists():
            raise _missing_run_error(line[0], job.returncode, self._signal, out)
        return code

    def _wait(self, job: "subprocess.Popen[bytes]") -> Exit:
        deadline: list[float] = []

        def forward(number: int, _frame: FrameType | None) -> None:
            self._signal = number
            deadline.append(time.monotonic() + _END_SECONDS)
            if job.poll() is None:
                # srun only prints its state after a first SIGINT, but forwards SIGTERM.
                job.send_signal(signal.SIGTERM)

        with forwarding_signals(forward):
            try:
                while job.poll() is None and not (deadline and time.monotonic() > deadline[0]):
                    time.sleep(_POLL_SECONDS)
            finally:
                _kill(job)
        if self._signal is not None:
            return Exit.ENVIRONMENT
        # srun and mpirun forward the exit codes of ncclbench. `run` never ends in 1, so 1 is a failure of the launcher
        # itself, or of torchrun, which ends in 1 for every failure.
        return Exit.ENVIRONMENT if job.returncode == Exit.FAIL else worst([job.returncode])


def _missing_run_error(launcher: str, code: int, received: int | None, out: Path) -> NcclbenchError:
    """The error if a launcher left no run directory; the launcher and the ranks may have printed theirs before."""
    if received is not None:
        return EnvironmentFault(f"{interruption(received)} before anything was measured")
    if code == 0:
        return EnvironmentFault(
            f"{launcher} succeeded, but {out} is not on this host: name a directory that it shares with rank 0's host"
        )
    message = f"{launcher} ended in {code} before anything was measured; see its messages above"
    return UsageError(message) if code == Exit.USAGE else StartMissing(message)


def _kill(job: "subprocess.Popen[bytes]") -> None:
    """Kill a launcher that did not end, with every process that it started here."""
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def refuse_partial_allocation(environ: Mapping[str, str]) -> None:
    """Refuse to start ranks on one node of a Slurm allocation of several nodes.

    Raises:
        UsageError: if this process is outside a step of such an allocation; the message names both alternatives.
    """
    nodes = slurm_allocation_nodes(environ)
    if nodes > 1:
        raise UsageError(
            f"this Slurm allocation has {nodes} nodes, and no launcher has started this process: add "
            f"{_FLAG} 'srun --ntasks-per-node GPUS' to measure all of them, or --nproc N to start ranks on this host"
        )
