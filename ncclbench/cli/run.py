"""``ncclbench run``: measure patterns or a plan."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from ncclbench import api
from ncclbench.buffers.kinds import KINDS, Kind
from ncclbench.cli.options import HELP, complete
from ncclbench.errors import Exit, UsageError

if TYPE_CHECKING:
    from ncclbench.launch.request import RunRequest
    from ncclbench.measure.dry_run import Forecast


@click.command("run", context_settings=HELP)
@click.argument("patterns", nargs=-1, shell_complete=complete("patterns"))
@click.option("--plan", metavar="FILE|NAME", shell_complete=complete("plans"), help="A plan to run.")
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
    help="The transport that moves the data; see `ncclbench list transports`.",
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
    type=click.Choice(KINDS),
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
@click.option("--request", hidden=True, help="All of the request as JSON, for ranks that ncclbench starts itself.")
@click.option("--resume", is_flag=True, help="Go on with the run in -o: finished cases are kept.")
@click.option(
    "--process-start",
    type=int,
    metavar="N",
    help="Make this one of the plan's process starts, from 1.  [default: all, or under a launcher the next]",
)
@click.option("--dry-run", is_flag=True, help="Show the cases, their memory and a guess of the time; start nothing.")
@click.option("--json", "as_json", is_flag=True, help="The last line of stdout is one compact JSON object.")
def command(
    *,
    patterns: tuple[str, ...],
    plan: str | None,
    min_bytes: str | None,
    max_bytes: str | None,
    factor: float | None,
    dtypes: tuple[str, ...],
    timings: tuple[str, ...],
    params: tuple[str, ...],
    transport: str,
    nproc: int | None,
    iterations: int | None,
    warmup: int | None,
    precision: float | None,
    max_seconds: float | None,
    timeout: float | None,
    check: bool | None,
    cache: Literal["cold", "warm"] | None,
    buffers: Kind | None,
    device: Literal["auto", "cpu", "cuda"],
    bind: Literal["none", "auto"],
    seed: int | None,
    topology: Path | None,
    out: Path | None,
    launcher: str | None,
    request: str | None,
    resume: bool,
    process_start: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
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
    from ncclbench.config.request_json import request_from_json
    from ncclbench.launch.request import RunRequest

    if request is not None:
        code = _run(request_from_json(request, RunRequest))
        click.get_current_context().exit(int(code))
    asked = RunRequest(
        patterns=patterns,
        plan=plan,
        min_bytes=min_bytes,
        max_bytes=max_bytes,
        factor=factor,
        dtypes=dtypes,
        timings=timings,
        params=dict(_named_values(params)),
        transport=transport,
        nproc=nproc,
        iterations=iterations,
        warmup=warmup,
        precision=precision,
        max_seconds=max_seconds,
        timeout=timeout,
        check=check,
        cache=cache,
        buffers=buffers,
        device=device,
        bind=bind == "auto",
        seed=seed,
        topology=topology,
        out=out,
        launcher=launcher,
        resume=resume,
        process_start=process_start,
        results="json" if as_json else "table",
        progress=not as_json,
        command=tuple(sys.argv[1:]),
    )
    code = print_forecast(api.forecast(asked), as_json=as_json) if dry_run else _run(asked)
    click.get_current_context().exit(int(code))


def _run(request: "RunRequest") -> Exit:
    from ncclbench.cli.progress import listener_for

    return api.run(request, listener_for(request)).exit_code


def print_forecast(found: "Forecast", *, as_json: bool) -> Exit:
    """Say what would be run: rank 0 does."""
    from ncclbench.launch.launcher_detection import is_rank_0

    text = found.as_json() if as_json else found.as_table()
    if is_rank_0():
        click.echo(text)
    return Exit.GOOD


def _named_values(pairs: tuple[str, ...]) -> dict[str, str]:
    params: dict[str, str] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise UsageError(f"--param must be NAME=VALUE, got {pair!r}")
        if name in params:
            raise UsageError(f"--param {name} is given twice")
        params[name] = value
    return params
