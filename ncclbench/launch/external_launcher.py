"""Process starts by an external launcher: each start is a launcher call of its own.

In a batch script, an interactive allocation or on the head node, ``--launcher "srun --ntasks-per-node 8"`` is the
command that starts ranks there. A launcher starts its processes once, and inside its ranks nothing can be started
again. The process that makes several starts therefore runs outside of the ranks. The run directory must be visible to
rank 0 and to this process.
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
from ncclbench.launch.mpiexec import end_with_parent
from ncclbench.launch.process_starts import Refused
from ncclbench.launch.signals import blocked, in_words, passing_on

# From a signal on: rank 0 collects reports, stores the record in progress, and the launcher ends the other ranks.
_END_SECONDS = 30.0
_POLL_SECONDS = 0.05
_FLAG = "--launcher"


def launcher_words(text: str) -> list[str]:
    """What `--launcher` says, as words.

    Raises:
        UsageError: if it says nothing, or its quotes do not close.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{_FLAG} {text!r}: {error}") from None
    if not words:
        raise UsageError(f"{_FLAG} is empty; say how ranks are started here, such as --launcher 'srun -N2'")
    return words


def launcher_line(words: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The command line of one start: the launcher, our program, its arguments.

    torchrun is given a module, other launchers this very Python; a launcher that ends in ``ncclbench`` names the
    program itself, as where ranks run in a container with a Python of their own.
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
    """Starts the ranks by a launcher, again and again."""

    def __init__(self, words: Sequence[str]) -> None:
        """Nothing is started yet."""
        self._words = list(words)
        self._told: int | None = None

    def start(self, arguments: Sequence[str], out: Path) -> Exit:
        """One start: run ``ncclbench ARGUMENTS`` under the launcher; what it ended in.

        Raises:
            Refused: if the launcher ended in an error, and there is no run directory after it.
            NcclbenchError: if the launcher could not be started, was interrupted, or its ranks refuse what is asked.
        """
        line = launcher_line(self._words, arguments)
        with blocked():  # one that comes now ends what is just being started, and not us alone
            try:
                job = subprocess.Popen(
                    line,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # a Ctrl-C on the terminal reaches the launcher once, through us
                    preexec_fn=end_with_parent,
                )
            except OSError as error:
                raise EnvironmentFault(f"could not start {_FLAG} {line[0]!r}: {error.strerror or error}") from None
        code = self._wait(job)
        if not (out / "manifest.json").exists():
            raise _why_nothing_came(line[0], job.returncode, self._told, out)
        return code

    def _wait(self, job: "subprocess.Popen[bytes]") -> Exit:
        deadline: list[float] = []

        def pass_on(number: int, _frame: FrameType | None) -> None:
            self._told = number
            deadline.append(time.monotonic() + _END_SECONDS)
            if job.poll() is None:
                # srun takes a first SIGINT for a question, so it is always asked by the signal that it passes on.
                job.send_signal(signal.SIGTERM)

        with passing_on(pass_on):
            try:
                while job.poll() is None and not (deadline and time.monotonic() > deadline[0]):
                    time.sleep(_POLL_SECONDS)
            finally:
                _kill(job)
        if self._told is not None:
            return Exit.ENVIRONMENT
        # A code of ours is passed on by srun and mpirun. `run` never ends in 1: that is the launcher's own failure, or
        # torchrun's word for any.
        return Exit.ENVIRONMENT if job.returncode == Exit.FAIL else worst([job.returncode])


def _why_nothing_came(launcher: str, code: int, told: int | None, out: Path) -> NcclbenchError:
    """The one line that names the launcher, whatever it or the ranks have said before."""
    if told is not None:
        return EnvironmentFault(f"{in_words(told)} before anything was measured")
    if code == 0:
        return EnvironmentFault(
            f"{launcher} ended well, but {out} is not here: name a directory that rank 0's host and this one share"
        )
    message = f"{launcher} ended in {code} before anything was measured; what it said stands above"
    return UsageError(message) if code == Exit.USAGE else Refused(message)


def _kill(job: "subprocess.Popen[bytes]") -> None:
    """A launcher that did not end is ended with all that it has started here."""
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def refuse_part_of_an_allocation(environ: Mapping[str, str]) -> None:
    """In a batch script of several nodes, ranks that are started here would measure one of them in silence.

    Raises:
        UsageError: naming the two ways out.
    """
    nodes = slurm_allocation_nodes(environ)
    if nodes > 1:
        raise UsageError(
            f"this is a Slurm allocation of {nodes} nodes, and no launcher has started this process: add "
            f"{_FLAG} 'srun --ntasks-per-node GPUS' to measure all of them, or --nproc N to start ranks on this host"
        )
