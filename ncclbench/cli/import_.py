"""``ncclbench import``: convert logs of other tools to a run directory."""

import json
import sys
from pathlib import Path

import click

from ncclbench import api
from ncclbench.cli.options import HELP, complete
from ncclbench.store.records import MOST_RANKS
from ncclbench.units import counted


@click.command("import", context_settings=HELP)
@click.argument("logs", nargs=-1, required=True, metavar="LOG...", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), metavar="RUN", help="The run directory to write."
)
@click.option(
    "--format",
    "fmt",
    metavar="NAME",
    shell_complete=complete("importers"),
    help="Format of the logs; see `ncclbench list importers`.  [default: detected]",
)
@click.option("--pattern", metavar="NAME", help="The pattern, if the log does not name it (old nccl-tests).")
@click.option(
    "--world-size",
    type=click.IntRange(1, MOST_RANKS),
    metavar="N",
    help="Number of ranks, if the log does not state it (OSU).",
)
@click.option("--skip-damaged", is_flag=True, help="Skip and report damaged lines instead of refusing the log.")
@click.option("--json", "as_json", is_flag=True, help="Print one compact JSON object as the last line of stdout.")
def command(
    logs: tuple[Path, ...],
    out: Path,
    fmt: str | None,
    pattern: str | None,
    world_size: int | None,
    skip_damaged: bool,
    as_json: bool,
) -> None:
    """Convert logs of nccl-tests (text and JSON), OSU micro-benchmarks or Intel MPI Benchmarks to a run directory.

    The result can be reported, compared and judged like a measured run. Fields that a log does not state are empty.

    \b
    Examples:
      ncclbench import all_reduce.txt -o runs/old
      ncclbench import slurm-1234.out all_reduce.json -o runs/old
      ncclbench import osu_alltoall.txt --world-size 16 -o runs/osu
    """
    imported = api.import_logs(
        logs,
        out,
        fmt=fmt,
        pattern=pattern,
        world_size=world_size,
        skip_damaged=skip_damaged,
        command=["import", *sys.argv[2:]],
    )
    for remark in imported.remarks:
        click.echo(f"! {remark}", err=True)
    records = imported.load().records
    click.echo(f"imported {counted(len(records), 'case')} into {out}; show them with: ncclbench report {out}")
    if as_json:
        statuses = [{"case": record.case, "status": record.status} for record in records]
        click.echo(json.dumps({"run": str(out), "exit_code": 0, "records": statuses}, separators=(",", ":")))
