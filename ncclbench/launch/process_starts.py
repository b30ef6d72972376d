"""Several process starts of one plan, made one after the other.

Iterations inside one process are not independent: memory is placed once, and connections and rings are chosen once.
A verdict on performance therefore needs several process starts. The plan declares how many, and all are kept in one run
directory. After a process start that fails the next one is made, and the failed one counts. Inside a launcher's ranks
no process start can be made; there `ncclbench.launch.next_start_command` tells the user the command.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from ncclbench.errors import EnvironmentFault, Exit, NcclbenchError, UsageError, worst
from ncclbench.launch.mpiexec import terminate_with_parent
from ncclbench.launch.signals import blocked, forwarded, forwarding_signals
from ncclbench.plan.plan import Plan
from ncclbench.plan.start_modes import Mode
from ncclbench.store.run_directory import Run, read_run

_POLL_SECONDS = 0.05


class StartMissing(EnvironmentFault):
    """A process start ended by itself and left no run directory."""


def make_starts(
    out: Path,
    first: int,
    starts: int,
    one: Callable[[int], Exit],
    say: Callable[[str], None],
    plan: Plan | None = None,
) -> Exit:
    """Make the process starts `first` to `starts` - 1 of the run in `out`; return their most severe exit code.

    After `StartMissing` the next process start is made. After a usage error none is, because each would fail alike.

    Args:
        out: the run directory.
        first: the first process start to make, above 0 if a run is resumed.
        starts: the end of the range; the number that the plan declares, to make all.
        one: makes one process start, given its number.
        say: prints a line of progress.
        plan: gives the total number and each mode for the messages; the started processes set their mode themselves.

    Raises:
        StartMissing: if every process start is missing.
    """
    codes = []
    refused: list[StartMissing] = []
    before = len(forwarded)
    for start in range(first, starts):
        if start > first and _is_finished(out, start):
            continue  # a resumed run may have finished later process starts
        total, mode = (plan.process_starts, plan.mode_of(start)) if plan else (starts, None)
        if total > 1:
            say(start_in_words(start, total, mode))
        try:
            codes.append(one(start))
        except StartMissing as error:
            refused.append(error)
            codes.append(Exit.ENVIRONMENT)
            if total > 1:
                say(f"ncclbench: warning: {start_in_words(start, total, mode)} is missing: {error}")
            continue
        if codes[-1] is Exit.USAGE or len(forwarded) > before or _was_stopped(out):
            break
    if refused and len(refused) == len(codes):
        raise StartMissing(f"{refused[-1]}{f', in all {len(codes)} process starts' if len(codes) > 1 else ''}")
    return worst(codes)


def start_in_words(start: int, starts: int, mode: Mode | None) -> str:
    """``process start 2 of 4 (mode ...)``; `start` counts from 0."""
    return f"process start {start + 1} of {starts}{f' ({mode.in_words})' if mode else ''}"


def _is_finished(out: Path, start: int) -> bool:
    try:
        return not read_run(out).missing_from(start)
    except NcclbenchError:
        return False


def start_of_rank(plan: Plan, out: Path, *, resume: bool, asked: int | None) -> int | None:
    """The process start of this rank; None if rank 0 can determine it after the rendezvous.

    If the plan has modes, a rank must know its mode before it loads a library. On a node that does not see the run
    directory, ``--process-start`` states the number.

    Args:
        plan: the plan of the run.
        out: the run directory.
        resume: whether the run is continued.
        asked: the value of ``--process-start``, from 1.

    Raises:
        UsageError: if the plan has modes and the run cannot be read here.
    """
    if asked is not None:
        return asked - 1
    if not plan.modes:
        return None
    try:
        return first_start(out, resume=resume)
    except UsageError as error:
        hint = "if only rank 0 sees it, name the process start with --process-start N"
        raise UsageError(f"{error}; {hint}") from None


def refuse_start(plan: Plan, asked: int | None) -> None:
    """Refuse a ``--process-start`` that the plan does not have.

    Raises:
        UsageError: naming the valid range.
    """
    if asked is not None and not 1 <= asked <= plan.process_starts:
        raise UsageError(f"--process-start must be 1 to {plan.process_starts}, the number in the plan; got {asked}")


def refuse_without_first(out: Path, start: int) -> None:
    """Refuse a later process start if there is no run directory.

    Raises:
        UsageError: naming the process start.
    """
    if start > 0 and not (out / "manifest.json").exists():
        raise UsageError(f"--process-start {start + 1}: there is no run in {out}: make process start 1 first")


def _was_stopped(out: Path) -> bool:
    """Whether no further process start is useful: there is no run, or the user has interrupted it."""
    try:
        run = read_run(out)
    except NcclbenchError:
        return True
    last = [event for event in run.events if event.kind in ("lost", "end")][-2:]
    return any(event.kind == "lost" and (event.reason or "").startswith("interrupted") for event in last)


def start_in_child_process(arguments: Sequence[str]) -> Exit:
    """Run ``ncclbench ARGUMENTS`` in a child process, which receives this process's signals and ends with it."""
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    with forwarding_signals(forward):
        try:
            with blocked():  # the child inherits the mask, and unblocks signals once it handles them
                child = subprocess.Popen(
                    [sys.executable, "-m", "ncclbench", *arguments],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # a Ctrl-C on the terminal reaches it once, through this process
                    preexec_fn=terminate_with_parent,
                )
                children.append(child)
            while child.poll() is None:
                time.sleep(_POLL_SECONDS)
            return worst([child.returncode])
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                    child.wait()


def first_start(out: Path, *, resume: bool) -> int:
    """The first process start to make: 0, or the first unfinished one of a resumed run."""
    if not resume:
        return 0
    run: Run = read_run(out)
    return run.open_start if run.open_start is not None else run.declared_starts - 1
