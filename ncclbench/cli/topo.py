"""``ncclbench topo``: the ranks, GPUs and NICs of a host or a topology file, and the source of each fact."""

from pathlib import Path
from typing import NamedTuple

import click

from ncclbench.cli.options import HELP


@click.command("topo", context_settings=HELP)
@click.option(
    "--topology",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A topology file: TOML, Slurm's topology.conf or topology.yaml, or an NCCL topology XML.",
)
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    help="Number of ranks to place on the topology of the file.  [default: one per rail]",
)
@click.option(
    "--ep", type=click.IntRange(min=1), help="Size of expert-parallel groups; warn about groups across domains."
)
@click.option("--json", "as_json", is_flag=True, help="Print one compact JSON object.")
@click.option("--dot", "as_dot", is_flag=True, help="Print a graph for Graphviz.")
def command(file: Path | None, ranks: int | None, ep: int | None, as_json: bool, as_dot: bool) -> None:
    """Show this host's GPUs, NICs and NVLink domain, and how they were detected; or show a topology file.

    \b
    Examples:
      ncclbench topo
      ncclbench topo --topology cluster.toml --ep 16
      ncclbench topo --topology /etc/slurm/topology.conf --dot | dot -Tsvg > fabric.svg
    """
    from ncclbench.errors import UsageError

    if as_json and as_dot:
        raise UsageError("--json and --dot exclude each other")
    if file is None and (ranks or ep):
        raise UsageError("--ranks and --ep need --topology FILE")
    page = _of_file(file, ranks, ep) if file else _of_host()
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(page.record).decode())
    else:
        click.echo("\n".join(page.dot if as_dot else page.lines))


class _TopologyPage(NamedTuple):
    """The output as JSON, as text and as a graph."""

    record: object
    lines: list[str]
    dot: list[str]


def _of_host() -> _TopologyPage:
    import msgspec

    from ncclbench.topology.host_detection import detect_host
    from ncclbench.topology.render import host_dot, host_lines

    host = detect_host()
    return _TopologyPage(msgspec.to_builtins(host), host_lines(host), host_dot(host))


def _of_file(file: Path, ranks: int | None, ep: int | None) -> _TopologyPage:
    import msgspec

    from ncclbench.errors import UsageError
    from ncclbench.topology.placement import plan_placement, rank_capacity, straddling
    from ncclbench.topology.render import fabric_dot, fabric_lines
    from ncclbench.topology.topology_file import read_topology

    found = read_topology(file)
    topology = plan_placement(found, ranks or rank_capacity(found))
    if ep and topology.world_size % ep:
        raise UsageError(f"--ep {ep} does not divide {topology.world_size} ranks")
    warning = straddling(topology, ep) if ep else ""
    record = {"name": found.name, **msgspec.to_builtins(topology.as_record()), "warnings": [warning] if warning else []}
    lines = fabric_lines(found, topology) + ([f"! {warning}"] if warning else [])
    return _TopologyPage(record, lines, fabric_dot(found))
