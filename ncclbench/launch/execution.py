"""Carry out a `RunRequest`: run as a rank that a launcher started, or start the ranks.

A request becomes one or more process starts. Each process start is one job, whose ranks receive the request as JSON.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from ncclbench.errors import Exit, NcclbenchError, UsageError
from ncclbench.launch.external_launcher import ExternalLauncher, launcher_words, refuse_partial_allocation
from ncclbench.launch.launcher_detection import detect
from ncclbench.launch.listener import Listener
from ncclbench.launch.local_ranks import start_ranks
from ncclbench.launch.mpiexec import start_under_mpiexec
from ncclbench.launch.next_start_command import next_command
from ncclbench.launch.preparation import (
    PreparedRun,
    choose_transport,
    default_run_directory,
    nproc_of,
    plan_of,
    planned_topology,
    topology_of,
)
from ncclbench.launch.process_starts import (
    first_start,
    make_starts,
    refuse_start,
    refuse_without_first,
    start_in_child_process,
    start_in_words,
    start_of_rank,
)
from ncclbench.launch.request import RunRequest, rank_arguments
from ncclbench.launch.signals import forwarded, interruption
from ncclbench.measure.dry_run import Forecast, forecast, refuse_on_this_node
from ncclbench.plan.start_modes import mode_environment
from ncclbench.store.run_directory import read_run
from ncclbench.store.run_writer import check_target
from ncclbench.transports.base import RankIdentity
from ncclbench.transports.capabilities import Hosting, capabilities_of

_DEFAULT_TIMEOUT = 60.0


@dataclass(frozen=True)
class RunOutcome:
    """The exit code of a request and the path of its run directory, which may not exist after an error."""

    exit_code: Exit
    path: Path


def execute(request: RunRequest, listener: Listener) -> RunOutcome:
    """Carry out `request`; under a launcher, as one of its ranks.

    Args:
        request: what to measure.
        listener: receives the events on rank 0 and in the process that makes the process starts.

    Raises:
        NcclbenchError: if nothing could be started. Later failures are in the exit code and the run directory.
    """
    plan = plan_of(request)
    refuse_start(plan, request.process_start)
    identity = detect(os.environ)
    if request.launcher is not None:
        _refuse_with_launcher(request, identity, starting=True)
    prepared = PreparedRun(
        request=request,
        plan=plan,
        transport=choose_transport(request.transport, identity.launcher if identity else None, request.launcher),
        out=request.out or default_run_directory(plan.name),
        listener=listener,
    )
    if request.resume and request.out is None:
        raise UsageError("--resume needs -o RUN, the run to continue")
    if identity is None:
        return RunOutcome(_start_without_launcher(prepared), prepared.out)
    return _run_as_rank(prepared, identity)


def forecast_of(request: RunRequest) -> Forecast:
    """Estimate the memory and time of `request` without starting anything.

    Raises:
        NcclbenchError: if the request would be refused.
    """
    plan = plan_of(request)
    refuse_start(plan, request.process_start)
    identity = detect(os.environ)
    if request.launcher is not None:
        _refuse_with_launcher(request, identity, starting=False)
    launcher = identity.launcher if identity else None
    transport = choose_transport(request.transport, launcher, request.launcher, dry_run=True)
    ranks = identity.world_size if identity else nproc_of(request, transport)
    return forecast(plan, transport, planned_topology(ranks, request), request.command)


def _refuse_with_launcher(request: RunRequest, identity: RankIdentity | None, *, starting: bool) -> None:
    """Refuse --launcher inside a rank, or together with --nproc."""
    if identity is not None:
        raise UsageError(
            f"--launcher starts ranks, and this process is a rank that {identity.launcher} has started: leave it out"
        )
    if request.nproc is not None and starting:
        raise UsageError("--nproc does not go with --launcher: set the number of ranks in the launcher's options")


def _run_as_rank(prepared: PreparedRun, identity: RankIdentity) -> RunOutcome:
    from ncclbench.launch.rank_session import join_and_run

    request, plan = prepared.request, prepared.plan
    if request.nproc is not None:
        raise UsageError(f"--nproc is for a start without a launcher; {identity.launcher} has started this job")
    if _in_one_process(prepared.transport):
        raise UsageError(
            f"--transport {prepared.transport} has all ranks in one process, and this is one of the processes that "
            f"{identity.launcher} has started: leave the launcher out, or name another transport"
        )
    prepared = _with_start(prepared)
    start = prepared.start or 0
    mode = plan.mode_of(start)
    if mode is not None and identity.rank == 0 and not request.one_of_several:
        prepared.listener.noted(start_in_words(start, plan.process_starts, mode))
    with mode_environment(mode):
        code, out = join_and_run(prepared, identity, request.timeout or _DEFAULT_TIMEOUT)
    if plan.process_starts > 1 and identity.rank == 0 and not request.one_of_several:
        _note_next_start(prepared, identity.launcher)
    return RunOutcome(code, out)


def _in_one_process(transport: str) -> bool:
    """Whether this process holds all ranks, or needs none."""
    return capabilities_of(transport).hosting is not Hosting.PROCESSES


def _with_start(prepared: PreparedRun) -> PreparedRun:
    """The run with the number of this process start, and the topology file."""
    request = prepared.request
    start = start_of_rank(prepared.plan, prepared.out, resume=request.resume, asked=request.process_start)
    return replace(prepared, start=start, topology=topology_of(request))


def _start_without_launcher(prepared: PreparedRun) -> Exit:
    request, plan, transport, out = prepared.request, prepared.plan, prepared.transport, prepared.out
    later = (request.process_start or 1) - 1
    if request.one_of_several and not (out / "manifest.json").exists():
        later = 0  # the process starts before this one left no run directory
    if not request.resume:
        refuse_without_first(out, later)
    check_target(out, resume=request.resume or later > 0)
    if request.launcher is not None:
        return _make_starts(prepared, nproc=0)
    if request.nproc is None and not _in_one_process(transport):
        refuse_partial_allocation(os.environ)
    nproc = nproc_of(request, transport)
    refuse_on_this_node(plan, transport, planned_topology(nproc, request))
    if (plan.process_starts > 1 or request.results == "none") and not request.one_of_several:
        return _make_starts(prepared, nproc)
    if _in_one_process(transport):
        from ncclbench.launch.in_process_session import run_in_process

        prepared = _with_start(prepared)
        with mode_environment(plan.mode_of(prepared.start or 0)):
            return run_in_process(prepared, nproc)
    return _start_ranks(_rank_request(prepared), nproc)


def _rank_request(prepared: PreparedRun, start: int | None = None, nproc: int | None = None) -> RunRequest:
    """The request for the ranks, with the decisions of this process, such as a run directory named after the time.

    Args:
        prepared: the request and what was decided for it.
        start: number of the process start, from 0, if this process makes several.
        nproc: number of ranks in the process that receives the request.
    """
    request = msgspec.structs.replace(
        prepared.request, transport=prepared.transport, out=prepared.out, launcher=None, nproc=nproc
    )
    if start is None:
        return request
    return msgspec.structs.replace(request, one_of_several=True, process_start=start + 1)


def _start_ranks(request: RunRequest, nproc: int) -> Exit:
    assert request.out is not None
    start = start_under_mpiexec if capabilities_of(request.transport).started_by_mpiexec else start_ranks
    return start(nproc, rank_arguments(request), request.out)


def _make_starts(prepared: PreparedRun, nproc: int) -> Exit:
    """Make all process starts of the plan, one after the other; then report their results."""
    request, plan, out = prepared.request, prepared.plan, prepared.out
    end = plan.process_starts
    first = min(first_start(out, resume=request.resume), end - 1)  # another plan's run may have more process starts
    if request.process_start is not None:
        first, end = request.process_start - 1, request.process_start
    one = _start_function(prepared, nproc)
    code = make_starts(out, first, end, one, prepared.listener.noted, plan)
    # After a usage error, which rank 0 has printed, the run in `out` may be another plan's.
    if code is not Exit.USAGE and request.results != "none":
        _report_totals(prepared, code)
    return code


def _start_function(prepared: PreparedRun, nproc: int) -> Callable[[int], Exit]:
    """The function that makes one process start, given its number from 0."""
    if prepared.request.launcher is not None:
        launcher = ExternalLauncher(launcher_words(prepared.request.launcher))
        shared = replace(prepared, out=prepared.out.absolute())
        return lambda start: launcher.start(rank_arguments(_rank_request(shared, start)), prepared.out)
    if _in_one_process(prepared.transport):  # a new process for each process start
        return lambda start: start_in_child_process(rank_arguments(_rank_request(prepared, start, nproc)))
    return lambda start: _start_ranks(_rank_request(prepared, start), nproc)


def _report_totals(prepared: PreparedRun, code: Exit) -> None:
    """Report the results of all process starts together."""
    try:
        records = list(read_run(prepared.out).records)
    except NcclbenchError:  # no process start has written anything, and each has printed its error
        return
    prepared.listener.summed_up(prepared.out, records, code, _failure_summary(code, prepared.out))


def _failure_summary(code: Exit, out: Path) -> str | None:
    """One error for the JSON summary; the process starts have printed theirs."""
    if forwarded:
        return interruption(forwarded[0])
    return (
        f"a process start failed; see its error above and in {out}/events.jsonl" if code is Exit.ENVIRONMENT else None
    )


def _note_next_start(prepared: PreparedRun, launcher: str) -> None:
    """Under a launcher, which starts processes once: the command that makes the next of the declared starts."""
    run, plan, command = read_run(prepared.out), prepared.plan, prepared.request.command
    if run.open_start is None or launcher == "local":
        return
    named = run.open_start if plan.modes and command[:1] == ("run",) else None
    line = next_command(launcher, command, prepared.out, os.environ, named)
    which = start_in_words(run.open_start, run.declared_starts, plan.mode_of(run.open_start))
    prepared.listener.noted(f"{which} is still missing; make it with: {line}")
