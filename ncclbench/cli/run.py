"""``ncclbench run``: measure patterns or a plan."""

import datetime
import os
import sys
from pathlib import Path
from typing import Any

import click

from ncclbench.cli.completion import complete
from ncclbench.cli.request import choose_transport, nproc_of, plan_of, planned_topology, topology_file
from ncclbench.errors import Exit, UsageError

_DEFAULT_TIMEOUT = 60.0


@click.command("run", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("patterns", nargs=-1, shell_complete=complete("patterns"))
@click.option("--plan", "plan_name", metavar="FILE|NAME", shell_complete=complete("plans"), help="A plan to run.")
@click.option("-b", "--min-bytes", metavar="SIZE", help="Smallest size.  [default: 8]")
@click.option("-e", "--max-bytes", metavar="SIZE", help="Largest size.  [default: 64M]")
@click.option("-f", "--factor", type=float, help="Each size is this times the one before.  [default: 2]")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    metavar="NAME",
    shell_complete=complete("dtypes"),
    help="Element type, may be repeated.  [default: float32]",
)
@click.option(
    "--timing",
    "timings",
    multiple=True,
    metavar="REGIME",
    shell_complete=complete("timings"),
    help="isolated, pipelined, graph or all; may be repeated.  [default: isolated]",
)
@click.option(
    "--param", "params", multiple=True, metavar="NAME=VALUE", help="A pattern's own parameter, may be repeated."
)
@click.option(
    "--transport",
    default="auto",
    show_default=True,
    metavar="NAME",
    shell_complete=complete("transports"),
    help="Who moves the data; see `ncclbench list transports`.",
)
@click.option(
    "--nproc",
    type=int,
    help="Ranks to start here, when no launcher has.  [default: one a visible GPU; on CPUs one a core, 2 to 8]",
)
@click.option(
    "-n",
    "--iterations",
    type=int,
    help="Exactly this many iterations, instead of until --precision; of variants as many whole turns.",
)
@click.option("-w", "--warmup", type=int, help="Iterations before timing, for every size.  [default: 5]")
@click.option(
    "--precision",
    type=float,
    help="Stop when half the median's 95% interval is narrower than this share of it.  [default: 0.02]",
)
@click.option("--max-seconds", type=float, help="Stop a case after this long.  [default: 2]")
@click.option(
    "--timeout",
    type=float,
    help="Seconds without progress after which a rank counts as hung; grows with the size.  [default: 60]",
)
@click.option("--check/--no-check", default=None, help="Validate the data before and after timing.  [default: check]")
@click.option(
    "--cache",
    type=click.Choice(["cold", "warm"]),
    help="On GPUs: rotate over enough buffers that L2 does not hold them, or not.  [default: cold]",
)
@click.option(
    "--buffers",
    type=click.Choice(["pool", "nccl", "torch"]),
    help="On GPUs: CuPy's pool, ncclMemAlloc or torch's allocator.  [default: pool]",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the mpi transport's buffers are; auto: on GPUs where there are any, and CuPy.",
)
@click.option(
    "--bind",
    type=click.Choice(["none", "auto"]),
    default="none",
    show_default=True,
    help="auto: each rank keeps to its share of the cores, near its GPU. What it is, is recorded always.",
)
@click.option("--seed", type=int, help="Of the values that are sent.  [default: 0]")
@click.option(
    "--topology",
    "topology_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where ranks sit, and over which NICs and leaves; see docs/formats.md.",
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), metavar="RUN", help="The run directory.  [default: runs/PLAN-TIME]"
)
@click.option(
    "--launcher",
    metavar="COMMAND",
    help="Start the ranks by this, such as 'srun --ntasks-per-node 8', once for each process start of the plan.",
)
@click.option("--one-of-several", is_flag=True, hidden=True, help="A command of ours makes all process starts.")
@click.option("--resume", is_flag=True, help="Go on with the run in -o: finished cases are kept.")
@click.option(
    "--process-start",
    type=int,
    metavar="N",
    help="Make this one of the plan's process starts, from 1.  [default: all, or under a launcher the next]",
)
@click.option("--dry-run", is_flag=True, help="Show the cases, their memory and a guess of the time; start nothing.")
@click.option("--json", "as_json", is_flag=True, help="The last line of stdout is one compact JSON object.")
def command(**options: Any) -> None:
    """Measure PATTERNS, or a plan, and store every sample.

    Under torchrun this joins the job; started alone it starts --nproc ranks here. Sizes are bytes, with K, M and G as
    powers of two. Results go to stdout, progress to stderr.

    \b
    Examples:
      ncclbench run all_reduce -b 1K -e 16M --nproc 4
      ncclbench run all_reduce all_to_all -b 1M -e 1M --dtype bfloat16 --timing pipelined
      ncclbench run all_reduce --param redop=max --param group=2 --nproc 4
      ncclbench run --plan quick --nproc 4 -o runs/first
      ncclbench run --plan quick --nproc 4 -o runs/first --resume
      torchrun --nproc-per-node 8 -m ncclbench run all_reduce -b 8 -e 4G -f 4
    """
    click.get_current_context().exit(int(execute(options)))


def _arguments(options: dict[str, Any]) -> list[str]:
    """What the ranks are started with: our own arguments, unless another command has made them up."""
    return [*(options.get("arguments") or sys.argv[1:])]


def execute(options: dict[str, Any]) -> Exit:
    """Do what the options say; returns what it ends in.

    Args:
        options: by the names of the parameters of `command`; `arguments`, where another command makes the starts and
            shows the results itself, are those of the ranks.
    """
    from ncclbench.launch.launcher_detection import detect
    from ncclbench.launch.process_starts import refuse_start
    from ncclbench.plan.plan import Plan

    plan: Plan = plan_of(options)
    refuse_start(plan, options["process_start"])
    seat = detect(os.environ)
    if options["launcher"] is not None:
        _refuse_with_launcher(options, seat)
    transport = choose_transport(options["transport"], seat.launcher if seat else None, options["launcher"])
    if options["dry_run"]:
        return _dry_run(plan, transport, options, seat)
    out = options["out"] or Path("runs") / f"{plan.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    if options["resume"] and options["out"] is None:
        raise UsageError("--resume needs -o RUN, the run to go on with")
    if seat is None:
        return _start_alone(plan, transport, out, options)
    return _join(plan, transport, out, options, seat)


def _join(plan: Any, transport: str, out: Path, options: dict[str, Any], seat: Any) -> Exit:
    """Be the rank that a launcher has started."""
    from ncclbench.launch.launcher_detection import OWN_START
    from ncclbench.launch.process_starts import start_in_words, start_of_rank
    from ncclbench.launch.rank_session import join_and_run
    from ncclbench.plan.start_modes import entered

    if options["nproc"] is not None and seat.launcher != "local" and OWN_START not in os.environ:
        raise UsageError(f"--nproc is for a start without a launcher; {seat.launcher} has started this job")
    if transport == "threads":
        raise UsageError(
            "--transport threads has all ranks in one process, which starts them itself, and this is one of those that "
            f"{seat.launcher} has started: leave the launcher out, or name another transport"
        )
    start = start_of_rank(plan, out, resume=options["resume"], asked=options["process_start"])
    mode = plan.mode_of(start or 0)
    if mode is not None and seat.rank == 0 and not options["one_of_several"]:
        click.echo(start_in_words(start or 0, plan.process_starts, mode), err=True)
    with entered(mode):
        code = join_and_run(_job(plan, transport, out, options, start), seat, options["timeout"] or _DEFAULT_TIMEOUT)
    if plan.process_starts > 1 and seat.rank == 0 and not options["one_of_several"]:
        _ask_for_next_start(plan, out, seat.launcher)
    return code


def _dry_run(plan: Any, transport: str, options: dict[str, Any], seat: Any) -> Exit:
    """Say what would be run; all of it is found out first, since an error must not come after half an answer."""
    from ncclbench.measure.dry_run import forecast

    found = forecast(
        plan, transport, planned_topology(seat.world_size if seat else nproc_of(options, transport), options)
    )
    text = found.as_json() if options["as_json"] else found.as_table()
    if seat is None or seat.rank == 0:
        click.echo(text)
    return Exit.GOOD


def _refuse_with_launcher(options: dict[str, Any], seat: Any) -> None:
    """What contradicts --launcher, which stands outside of the ranks."""
    if seat is not None:
        raise UsageError(f"--launcher starts ranks, and this is one that {seat.launcher} has started: leave it out")
    if options["nproc"] is not None and not options["dry_run"]:
        raise UsageError("--nproc does not go with --launcher, whose own options say how many ranks there are")


def _job(plan: Any, transport: str, out: Path, options: dict[str, Any], start: int | None) -> Any:
    from ncclbench.cli.progress import listener_for
    from ncclbench.launch.recorder import Job

    of_several = options["one_of_several"] or bool(options.get("arguments"))
    listener = listener_for(as_json=options["as_json"], of_several=of_several)
    return Job(
        plan=plan,
        transport=transport,
        out=out,
        resume=options["resume"],
        command=_arguments(options),
        listener=listener,
        bind=options["bind"] == "auto",
        device=options["device"],
        topology=topology_file(options),
        start=start,
        one_of_several=options["one_of_several"],
    )


def _start_alone(plan: Any, transport: str, out: Path, options: dict[str, Any]) -> Exit:
    from ncclbench.launch.external_launcher import refuse_part_of_an_allocation
    from ncclbench.launch.process_starts import refuse_without_first, start_of_rank
    from ncclbench.measure.dry_run import refuse_on_this_node
    from ncclbench.plan.start_modes import entered
    from ncclbench.store.run_directory import check_target

    later = (options["process_start"] or 1) - 1
    if options["one_of_several"] and not (out / "manifest.json").exists():
        later = 0  # those before it came to nothing
    if not options["resume"]:
        refuse_without_first(out, later)
    check_target(out, resume=options["resume"] or later > 0)
    if options["launcher"] is not None:
        return _make_starts(plan, transport, out, options, nproc=0)
    if options["nproc"] is None and transport != "threads":
        refuse_part_of_an_allocation(os.environ)
    nproc = nproc_of(options, transport)
    refuse_on_this_node(plan, transport, planned_topology(nproc, options))
    if (plan.process_starts > 1 or options.get("arguments")) and not options["one_of_several"]:
        return _make_starts(plan, transport, out, options, nproc)
    if transport == "threads":
        from ncclbench.launch.rank_session import play_ranks

        start = start_of_rank(plan, out, resume=options["resume"], asked=options["process_start"])
        with entered(plan.mode_of(start or 0)):
            return play_ranks(_job(plan, transport, out, options, start), nproc)
    return _start_ranks(transport, out, nproc, _arguments(options))


def _start_ranks(transport: str, out: Path, nproc: int, arguments: list[str]) -> Exit:
    """Start the ranks as processes, and wait for them."""
    from ncclbench.launch.arguments import with_options

    # The ranks are told what was decided here: a directory named after the time must be the same for all.
    arguments = with_options(arguments, ["--transport", transport, "--out", str(out)])
    if transport == "mpi":
        from ncclbench.launch.mpiexec import start_under_mpiexec

        return start_under_mpiexec(nproc, arguments, out)
    from ncclbench.launch.local_ranks import start_ranks

    return start_ranks(nproc, arguments, out)


def _make_starts(plan: Any, transport: str, out: Path, options: dict[str, Any], nproc: int) -> Exit:
    """All process starts that the plan declares, one after the other; then what they measured."""
    from ncclbench.launch.arguments import with_options, without_option
    from ncclbench.launch.external_launcher import Relaunch, launcher_words
    from ncclbench.launch.process_starts import first_start, in_own_process, make_starts

    relaunch = Relaunch(launcher_words(options["launcher"])) if options["launcher"] is not None else None
    told = ["--transport", transport, "--out", str(out.absolute() if relaunch else out)]

    def one(start: int) -> Exit:
        which = ["--one-of-several", "--process-start", str(start + 1)]
        # What is started starts nobody else.
        ours = without_option(without_option(_arguments(options), "--launcher"), "--process-start")
        if relaunch is not None:
            return relaunch.start(with_options(ours, [*told, *which]), out)
        if transport == "threads":  # its ranks share a process, which must be another one for each start
            return in_own_process(with_options(ours, [*told, *which]))
        return _start_ranks(transport, out, nproc, with_options(ours, which))

    end = plan.process_starts
    first = min(first_start(out, resume=options["resume"]), end - 1)  # the run there may be another's, with more
    if options["process_start"] is not None:
        first, end = options["process_start"] - 1, options["process_start"]
    code = make_starts(out, first, end, one, lambda text: click.echo(text, err=True), plan)
    if code is Exit.USAGE:  # rank 0 has said it; the run that is there may be another's
        return code
    if not options.get("arguments"):
        _show(out, code, as_json=options["as_json"])
    return code


def _show(out: Path, code: Exit, *, as_json: bool) -> None:
    """What all process starts together have measured."""
    from ncclbench.cli.progress import JsonListener, listener_for
    from ncclbench.errors import NcclbenchError
    from ncclbench.store.run_directory import read_run

    try:
        records = list(read_run(out).records)
    except NcclbenchError:  # no start came so far as to write anything, and each has said why
        return
    listener = listener_for(as_json=as_json)
    error = None
    if isinstance(listener, JsonListener):
        listener.says_errors = False  # whoever met it has said it
        error = _what_went_wrong(code, out)
    listener.ended(out, records, code, error)


def _what_went_wrong(code: Exit, out: Path) -> str | None:
    """In a word, for readers of JSON, what the process starts have said one by one."""
    from ncclbench.launch.signals import in_words, passed_on

    if passed_on:
        return in_words(passed_on[0])
    return f"a process start failed; why stands above, and in {out}/events.jsonl" if code is Exit.ENVIRONMENT else None


def _ask_for_next_start(plan: Any, out: Path, launcher: str) -> None:
    """Under a launcher, which starts processes once: the command that makes the next of the declared starts."""
    from ncclbench.launch.process_starts import next_command, start_in_words
    from ncclbench.store.run_directory import read_run

    run = read_run(out)
    if run.open_start is not None and launcher != "local":
        said = run.open_start if plan.modes and sys.argv[1:2] == ["run"] else None
        command = next_command(launcher, sys.argv[1:], out, os.environ, said)
        which = start_in_words(run.open_start, run.declared_starts, plan.mode_of(run.open_start))
        click.echo(f"{which} is still to be made: {command}", err=True)
