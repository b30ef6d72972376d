"""Several process starts of one plan, made one after the other; `ncclbench.launch.next_command` asks for them instead.

Iterations inside one process are not independent: memory is placed once, connections and rings are chosen once. A
verdict on performance therefore rests on several process starts. The plan declares how many, and all are kept in the
same run directory. One that fails counts: the next is made all the same, and none is left out.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from ncclbench.errors import EnvironmentFault, Exit, NcclbenchError, UsageError, worst
from ncclbench.launch.mpiexec import told_when_parent_dies
from ncclbench.launch.signals import blocked, passed_on, passing_on
from ncclbench.plan.plan import Plan
from ncclbench.plan.start_modes import Mode
from ncclbench.store.run_directory import Run, read_run

_POLL_SECONDS = 0.05


class Refused(EnvironmentFault):
    """A start has left no run directory, and the process that would have written it has ended by itself."""


def make_starts(
    out: Path,
    first: int,
    starts: int,
    one: Callable[[int], Exit],
    say: Callable[[str], None],
    plan: Plan | None = None,
) -> Exit:
    """Make the process starts `first` to `starts` - 1 of the run in `out`; the most severe of what they end in.

    A start that `one` says was refused is missing, and the next is made all the same. After a usage error, which the
    next would meet as well, none is.

    Args:
        out: the run directory.
        first: the start to begin with, above 0 when a run is resumed.
        starts: where to end: as many as the plan declares, to make all.
        one: makes one start, whose number it is given; its ranks receive it in their request.
        say: tells the user where it stands.
        plan: tells how many starts there are in all, and of which mode each is; its processes see to that themselves.

    Raises:
        Refused: if none of them came to anything.
    """
    codes = []
    refused: list[Refused] = []
    before = len(passed_on)
    for start in range(first, starts):
        if start > first and _is_finished(out, start):
            continue  # a resumed run need not have stopped at its last start
        total, mode = (plan.process_starts, plan.mode_of(start)) if plan else (starts, None)
        if total > 1:
            say(start_in_words(start, total, mode))
        try:
            codes.append(one(start))
        except Refused as error:
            refused.append(error)
            codes.append(Exit.ENVIRONMENT)
            if total > 1:
                say(f"ncclbench: warning: {start_in_words(start, total, mode)} is missing: {error}")
            continue
        if codes[-1] is Exit.USAGE or len(passed_on) > before or _was_stopped(out):
            break
    if refused and len(refused) == len(codes):
        raise Refused(f"{refused[-1]}{f', in all {len(codes)} process starts' if len(codes) > 1 else ''}")
    return worst(codes)


def start_in_words(start: int, starts: int, mode: Mode | None) -> str:
    """Which process start of how many, and how its processes are started; `start` counts from 0."""
    return f"process start {start + 1} of {starts}{f' ({mode.in_words})' if mode else ''}"


def _is_finished(out: Path, start: int) -> bool:
    try:
        return not read_run(out).missing_from(start)
    except NcclbenchError:
        return False


def start_of_rank(plan: Plan, out: Path, *, resume: bool, asked: int | None) -> int | None:
    """The start that this process, a rank, is of; None where rank 0 may find out when all have met.

    A rank of a plan with modes must know before it loads a library. On a node that does not see the run directory
    ``--process-start`` states it.

    Args:
        plan: what is measured.
        out: the run directory.
        resume: whether it is gone on with.
        asked: what ``--process-start`` says, from 1.

    Raises:
        UsageError: if the plan has no such start, or it cannot be found out.
    """
    if asked is not None:
        return asked - 1
    if not plan.modes:
        return None
    try:
        return first_start(out, resume=resume)
    except UsageError as error:
        hint = "where only rank 0 sees it, say --process-start N, which process start this is"
        raise UsageError(f"{error}; {hint}") from None


def refuse_start(plan: Plan, asked: int | None) -> None:
    """Refuse a ``--process-start`` that the plan does not have.

    Raises:
        UsageError: naming those there are.
    """
    if asked is not None and not 1 <= asked <= plan.process_starts:
        raise UsageError(f"--process-start must be 1 to {plan.process_starts}, as many as the plan has, got {asked}")


def refuse_without_first(out: Path, start: int) -> None:
    """Refuse a later process start of a run that is not there.

    Raises:
        UsageError: naming what asks for that start.
    """
    if start > 0 and not (out / "manifest.json").exists():
        raise UsageError(f"--process-start {start + 1}: there is no run in {out}: make process start 1 first")


def _was_stopped(out: Path) -> bool:
    """Whether the next start would be pointless: nothing was begun, or the user has interrupted this one."""
    try:
        run = read_run(out)
    except NcclbenchError:
        return True
    last = [event for event in run.events if event.kind in ("lost", "end")][-2:]
    return any(event.kind == "lost" and (event.reason or "").startswith("interrupted") for event in last)


def in_own_process(arguments: Sequence[str]) -> Exit:
    """Run ``ncclbench ARGUMENTS`` in a process of its own; signals are passed on to it, and it does not outlive us."""
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    with passing_on(pass_on):
        try:
            with blocked():  # the child inherits the block, and ends it when it heeds signals
                child = subprocess.Popen(
                    [sys.executable, "-m", "ncclbench", *arguments],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # a Ctrl-C on the terminal reaches it once, through us
                    preexec_fn=told_when_parent_dies,
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
    """The start to begin with: 0, or where a run that is resumed stands."""
    if not resume:
        return 0
    run: Run = read_run(out)
    return run.open_start if run.open_start is not None else run.declared_starts - 1
