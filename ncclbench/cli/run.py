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
@click.option("--plan", metavar="FILE|NAME", shell_complete=complete("plans"), help="The plan to run.")
@click.option("-b", "--min-bytes", metavar="SIZE", help="Smallest size.  [default: 8]")
@click.option("-e", "--max-bytes", metavar="SIZE", help="Largest size.  [default: 64M]")
@click.option("-f", "--factor", type=float, help="Multiplication factor between sizes.  [default: 2]")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    metavar="NAME",
    shell_complete=complete("dtypes"),
    help="Element type; may be repeated.  [default: float32]",
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
    "--param", "params", multiple=True, metavar="NAME=VALUE", help="Parameter of the patterns; may be repeated."
)
@click.option(
    "--transport",
    default="auto",
    show_default=True,
    metavar="NAME",
    shell_complete=complete("transports"),
    help="The transport; see `ncclbench list transports`.",
)
@click.option(
    "--nproc",
    type=int,
    help="Number of ranks to start on this host without a launcher.  "
    "[default: one per visible GPU; on CPUs one per core, 2 to 8]",
)
@click.option(
    "-n",
    "--iterations",
    type=int,
    help="Fixed number of iterations instead of --precision; for a case with variants, of rounds over all variants.",
)
@click.option("-w", "--warmup", type=int, help="Untimed warmup iterations for every size.  [default: 5]")
@click.option(
    "--precision",
    type=float,
    help="Stop when half of the median's 95% interval is below this fraction of the median.  [default: 0.02]",
)
@click.option("--max-seconds", type=float, help="Maximum time per case.  [default: 2]")
@click.option(
    "--timeout",
    type=float,
    help="Seconds without progress after which a rank counts as hung; increases with the size.  [default: 60]",
)
@click.option("--check/--no-check", default=None, help="Validate the data before and after timing.  [default: check]")
@click.option(
    "--cache",
    type=click.Choice(["cold", "warm"]),
    help="On GPUs: cold rotates over so many buffers that they do not fit into the L2 cache.  [default: cold]",
)
@click.option(
    "--buffers",
    type=click.Choice(KINDS),
    help="On GPUs, the allocator: CuPy's pool, ncclMemAlloc or torch's.  [default: pool]",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Location of the buffers of the mpi transport; auto: on GPUs if there are GPUs and CuPy.",
)
@click.option(
    "--bind",
    type=click.Choice(["none", "auto"]),
    default="none",
    show_default=True,
    help="auto: bind each rank to its share of the cores, near its GPU. The cores are always recorded.",
)
@click.option("--seed", type=int, help="Seed of the values that are sent.  [default: 0]")
@click.option(
    "--topology",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Topology file: nodes, NICs and leaves of the ranks; see docs/formats.md.",
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), metavar="RUN", help="The run directory.  [default: runs/PLAN-TIME]"
)
@click.option(
    "--launcher",
    metavar="COMMAND",
    help="Command that starts the ranks, such as 'srun --ntasks-per-node 8', called once for each process start.",
)
@click.option("--request", hidden=True, help="The whole request as JSON, for ranks that ncclbench starts.")
@click.option("--resume", is_flag=True, help="Continue the run in -o; finished cases are kept.")
@click.option(
    "--process-start",
    type=int,
    metavar="N",
    help="Make only process start N of the plan, counted from 1.  [default: all; under a launcher, the next]",
)
@click.option("--dry-run", is_flag=True, help="Show the cases with estimates of memory and time; start nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one compact JSON object as the last line of stdout.")
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
    """Measure PATTERNS or a plan, and store every sample.

    Under a launcher such as torchrun, this process is one rank of the job. Without a launcher it starts --nproc ranks
    on this host. Sizes are in bytes; K, M and G are powers of two. Results go to stdout, progress to stderr.

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
    """Print the forecast on rank 0."""
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
