"""Carry out a `RunRequest` in this process: as a rank that a launcher has started, or by starting the ranks.

A request becomes one or more process starts. Each start is the ranks of one job, which receive the request as JSON.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from ncclbench.errors import Exit, NcclbenchError, UsageError
from ncclbench.launch.external_launcher import ExternalLauncher, launcher_words, refuse_part_of_an_allocation
from ncclbench.launch.launcher_detection import detect
from ncclbench.launch.listener import Listener
from ncclbench.launch.local_ranks import start_ranks
from ncclbench.launch.mpiexec import start_under_mpiexec
from ncclbench.launch.next_command import next_command
from ncclbench.launch.preparation import (
    PreparedRun,
    choose_transport,
    named_after,
    nproc_of,
    plan_of,
    planned_topology,
    topology_of,
)
from ncclbench.launch.process_starts import (
    first_start,
    in_own_process,
    make_starts,
    refuse_start,
    refuse_without_first,
    start_in_words,
    start_of_rank,
)
from ncclbench.launch.request import RunRequest, rank_arguments
from ncclbench.launch.signals import in_words, passed_on
from ncclbench.measure.dry_run import Forecast, forecast, refuse_on_this_node
from ncclbench.plan.start_modes import entered
from ncclbench.store.run_directory import read_run
from ncclbench.store.run_writer import check_target
from ncclbench.transports.base import RankIdentity
from ncclbench.transports.capabilities import Hosting, capabilities_of

_DEFAULT_TIMEOUT = 60.0


@dataclass(frozen=True)
class Ended:
    """What a request came to: its exit code, and the run directory, which need not be there after an error."""

    exit_code: Exit
    path: Path


def execute(request: RunRequest, listener: Listener) -> Ended:
    """Measure what `request` asks for; as a rank, together with the other ranks.

    Args:
        request: what to do.
        listener: told what happens, on rank 0 and in the process that makes the starts.

    Raises:
        NcclbenchError: if nothing could be started. What fails later is in the exit code and the run directory.
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
        out=request.out or named_after(plan.name),
        listener=listener,
    )
    if request.resume and request.out is None:
        raise UsageError("--resume needs -o RUN, the run to go on with")
    if identity is None:
        return Ended(_start_alone(prepared), prepared.out)
    return _join(prepared, identity)


def forecast_of(request: RunRequest) -> Forecast:
    """What the request would take, with nothing started.

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
    """What contradicts --launcher, which is used outside of the ranks."""
    if identity is not None:
        raise UsageError(f"--launcher starts ranks, and this is one that {identity.launcher} has started: leave it out")
    if request.nproc is not None and starting:
        raise UsageError("--nproc does not go with --launcher, whose own options say how many ranks there are")


def _join(prepared: PreparedRun, identity: RankIdentity) -> Ended:
    """Be the rank that a launcher has started."""
    from ncclbench.launch.rank_session import join_and_run

    request, plan = prepared.request, prepared.plan
    if request.nproc is not None:
        raise UsageError(f"--nproc is for a start without a launcher; {identity.launcher} has started this job")
    if _in_one_process(prepared.transport):
        raise UsageError(
            f"--transport {prepared.transport} has all ranks in one process, which starts them itself, and this is one "
            f"of those that {identity.launcher} has started: leave the launcher out, or name another transport"
        )
    prepared = _as_start(prepared)
    start = prepared.start or 0
    mode = plan.mode_of(start)
    if mode is not None and identity.rank == 0 and not request.one_of_several:
        prepared.listener.noted(start_in_words(start, plan.process_starts, mode))
    with entered(mode):
        code, out = join_and_run(prepared, identity, request.timeout or _DEFAULT_TIMEOUT)
    if plan.process_starts > 1 and identity.rank == 0 and not request.one_of_several:
        _ask_for_next_start(prepared, identity.launcher)
    return Ended(code, out)


def _in_one_process(transport: str) -> bool:
    """Whether the process that carries out the request has all ranks, or needs none."""
    return capabilities_of(transport).hosting is not Hosting.PROCESSES


def _as_start(prepared: PreparedRun) -> PreparedRun:
    """The run as the process start that this process is of."""
    request = prepared.request
    start = start_of_rank(prepared.plan, prepared.out, resume=request.resume, asked=request.process_start)
    return replace(prepared, start=start, topology=topology_of(request))


def _start_alone(prepared: PreparedRun) -> Exit:
    """Start the ranks: no launcher has."""
    request, plan, transport, out = prepared.request, prepared.plan, prepared.transport, prepared.out
    later = (request.process_start or 1) - 1
    if request.one_of_several and not (out / "manifest.json").exists():
        later = 0  # those before it came to nothing
    if not request.resume:
        refuse_without_first(out, later)
    check_target(out, resume=request.resume or later > 0)
    if request.launcher is not None:
        return _make_starts(prepared, nproc=0)
    if request.nproc is None and not _in_one_process(transport):
        refuse_part_of_an_allocation(os.environ)
    nproc = nproc_of(request, transport)
    refuse_on_this_node(plan, transport, planned_topology(nproc, request))
    if (plan.process_starts > 1 or request.results == "none") and not request.one_of_several:
        return _make_starts(prepared, nproc)
    if _in_one_process(transport):
        from ncclbench.launch.local_session import run_here

        prepared = _as_start(prepared)
        with entered(plan.mode_of(prepared.start or 0)):
            return run_here(prepared, nproc)
    return _start_ranks(_for_ranks(prepared), nproc)


def _for_ranks(prepared: PreparedRun, start: int | None = None, nproc: int | None = None) -> RunRequest:
    """The request as the ranks receive it: with what was decided here, and with nothing for them to start.

    A directory named after the time, for one, must be the same for all.

    Args:
        prepared: what was decided.
        start: the process start that they are of, from 0, if this process makes several.
        nproc: ranks that share the process which receives the request.
    """
    request = msgspec.structs.replace(
        prepared.request, transport=prepared.transport, out=prepared.out, launcher=None, nproc=nproc
    )
    if start is None:
        return request
    return msgspec.structs.replace(request, one_of_several=True, process_start=start + 1)


def _start_ranks(request: RunRequest, nproc: int) -> Exit:
    """Start the ranks as processes, and wait for them."""
    assert request.out is not None
    start = start_under_mpiexec if capabilities_of(request.transport).started_by_mpiexec else start_ranks
    return start(nproc, rank_arguments(request), request.out)


def _make_starts(prepared: PreparedRun, nproc: int) -> Exit:
    """All process starts that the plan declares, one after the other; then what they measured."""
    request, plan, out = prepared.request, prepared.plan, prepared.out
    end = plan.process_starts
    first = min(first_start(out, resume=request.resume), end - 1)  # the run there may be another's, with more
    if request.process_start is not None:
        first, end = request.process_start - 1, request.process_start
    one = _way_to_start(prepared, nproc)
    code = make_starts(out, first, end, one, prepared.listener.noted, plan)
    # A usage error was printed by rank 0, and the run that is there may be another's.
    if code is not Exit.USAGE and request.results != "none":
        _sum_up(prepared, code)
    return code


def _way_to_start(prepared: PreparedRun, nproc: int) -> Callable[[int], Exit]:
    """How one process start is made, given its number from 0."""
    if prepared.request.launcher is not None:
        launcher = ExternalLauncher(launcher_words(prepared.request.launcher))
        shared = replace(prepared, out=prepared.out.absolute())
        return lambda start: launcher.start(rank_arguments(_for_ranks(shared, start)), prepared.out)
    if _in_one_process(prepared.transport):  # which must be another one for each start
        return lambda start: in_own_process(rank_arguments(_for_ranks(prepared, start, nproc)))
    return lambda start: _start_ranks(_for_ranks(prepared, start), nproc)


def _sum_up(prepared: PreparedRun, code: Exit) -> None:
    """Report what all process starts together have measured."""
    try:
        records = list(read_run(prepared.out).records)
    except NcclbenchError:  # no start came so far as to write anything, and each has said why
        return
    prepared.listener.summed_up(prepared.out, records, code, _what_went_wrong(code, prepared.out))


def _what_went_wrong(code: Exit, out: Path) -> str | None:
    """In a word, for readers of JSON, what the process starts have said one by one."""
    if passed_on:
        return in_words(passed_on[0])
    return f"a process start failed; why stands above, and in {out}/events.jsonl" if code is Exit.ENVIRONMENT else None


def _ask_for_next_start(prepared: PreparedRun, launcher: str) -> None:
    """Under a launcher, which starts processes once: the command that makes the next of the declared starts."""
    run, plan, command = read_run(prepared.out), prepared.plan, prepared.request.command
    if run.open_start is None or launcher == "local":
        return
    named = run.open_start if plan.modes and command[:1] == ("run",) else None
    line = next_command(launcher, command, prepared.out, os.environ, named)
    which = start_in_words(run.open_start, run.declared_starts, plan.mode_of(run.open_start))
    prepared.listener.noted(f"{which} is still to be made: {line}")
