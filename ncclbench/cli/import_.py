"""``ncclbench import``: other tools' logs into a run directory."""

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
    "-o", "--out", required=True, type=click.Path(path_type=Path), metavar="RUN", help="The run directory to make."
)
@click.option(
    "--format",
    "fmt",
    metavar="NAME",
    shell_complete=complete("importers"),
    help="See `ncclbench list importers`.  [default: whatever is in the log]",
)
@click.option("--pattern", metavar="NAME", help="What was measured, where the log does not say (old nccl-tests).")
@click.option(
    "--world-size", type=click.IntRange(1, MOST_RANKS), metavar="N", help="Ranks, where the log does not say (OSU)."
)
@click.option("--skip-damaged", is_flag=True, help="Leave damaged lines out, and name them, instead of refusing.")
@click.option("--json", "as_json", is_flag=True, help="The last line of stdout is one compact JSON object.")
def command(
    logs: tuple[Path, ...],
    out: Path,
    fmt: str | None,
    pattern: str | None,
    world_size: int | None,
    skip_damaged: bool,
    as_json: bool,
) -> None:
    """Make a run directory of the logs of nccl-tests (text and JSON), OSU micro-benchmarks or Intel MPI Benchmarks.

    The result can be reported, compared and judged like a run of our own. What a log does not say stays empty.

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
    click.echo(f"imported {counted(len(records), 'case')} into {out}; look at them with: ncclbench report {out}")
    if as_json:
        statuses = [{"case": record.case, "status": record.status} for record in records]
        click.echo(json.dumps({"run": str(out), "exit_code": 0, "records": statuses}, separators=(",", ":")))
