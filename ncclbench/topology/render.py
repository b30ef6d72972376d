"""A host and a fabric as text, and as graphs in Graphviz' language."""

import json

import numpy as np

from ncclbench.topology.file_model import TopologyFile
from ncclbench.topology.host_detection import Host, nearest_nics
from ncclbench.topology.model import Topology
from ncclbench.units import counted

_MOST_RANKS = 64


def host_lines(host: Host) -> list[str]:
    """The parts of a host, and where each was read."""
    lines = [f"host {host.name}"]
    for gpu, nic, domain in zip(host.gpus, nearest_nics(host), host.domains, strict=True):
        place = f"cluster {domain.cluster}, clique {domain.clique}" if domain else "this host"
        lines.append(f"  GPU {gpu}: NIC {nic or 'none'}, NVLink domain: {place}")
    for port in host.ports:
        rate = f"{port.gbit_per_s:g} Gbit/s" if port.gbit_per_s else "rate unknown"
        far = f", {'/'.join(map(str, port.hops))} steps from the GPUs" if port.hops else ""
        where = f", PCI {port.pci}" if port.pci else ""
        lines.append(f"  {port.kind} {port.device}: {rate}, {'up' if port.up else 'down'}, {port.guid}{where}{far}")
    lines.append("how this is known")
    lines += [f"  {what}: {how}" for what, how in host.how.items()]
    return [*lines, "  leaf, spine and site: not visible from a host; write a topology file (docs/formats.md)"]


def host_dot(host: Host) -> list[str]:
    """The host's GPUs, each with its NIC."""
    lines = ["graph host {", "  rankdir=LR;", f"  {_name(host.name)} [shape=box];"]
    for gpu, nic in zip(host.gpus, nearest_nics(host), strict=True):
        lines.append(f"  {_name(host.name)} -- {_name('GPU ' + gpu)};")
        lines += [f"  {_name('GPU ' + gpu)} -- {_name(nic)};"] if nic else []
    return [*lines, *(f"  {_name(p.device)} [label={_name(f'{p.device} {p.kind}')}];" for p in host.ports), "}"]


def fabric_lines(found: TopologyFile, topology: Topology) -> list[str]:
    """The content of a topology file, and the placement of the ranks."""
    sizes = {
        "node": len(found.node),
        "NVLink domain": len(np.unique(topology.domains)),
        "rail": len(np.unique(topology.rails)),
        "leaf": len(found.leaf),
        "spine": len(found.spine),
        "site": len(np.unique(topology.sites)),
    }
    lines = [f"{found.name or found.source}: " + ", ".join(counted(n, what) for what, n in sizes.items())]
    wiring = topology.wiring
    for rank in range(min(topology.world_size, _MOST_RANKS)):
        leaf = wiring.leaves[rank] if wiring else -1
        nic = wiring.devices[rank] if wiring else ""
        under = f", leaf {wiring.leaf_names[leaf]}" if wiring and leaf >= 0 else ""
        where = f"{topology.node_names[topology.nodes[rank]]}, rail {topology.rails[rank]}"
        lines.append(
            f"  rank {rank}: {where}, domain {topology.domains[rank]}" + (f", NIC {nic}" if nic else "") + under
        )
    if topology.world_size > _MOST_RANKS:
        lines.append(f"  and {counted(topology.world_size - _MOST_RANKS, 'more rank')}; --json has them all")
    lines.append("how this is known")
    return lines + [f"  {what}: {how}" for what, how in topology.sources.items()]


def fabric_dot(found: TopologyFile) -> list[str]:
    """Nodes below, leaves and spines above them; labels are rails and rates."""
    lines = ["graph fabric {", "  rankdir=BT;"]
    lines += [f"  {_name(node.name)} [shape=box];" for node in found.node]
    for node in found.node:
        lines += [f"  {_name(node.name)} -- {_name(node.leaf)};"] if node.leaf else []
        for nic in node.nic:
            if nic.leaf:
                rate = f" {nic.gbit_per_s:g}G" if nic.gbit_per_s else ""
                lines.append(f"  {_name(node.name)} -- {_name(nic.leaf)} [label={_name(f'r{nic.rail}{rate}')}];")
    for switch in (*found.leaf, *found.spine):
        rate = f" [label={_name(f'{switch.uplink_gbit_per_s:g}G')}]" if switch.uplink_gbit_per_s else ""
        lines += [f"  {_name(switch.name)} -- {_name(above)}{rate};" for above in switch.spines]
    return [*lines, "}"]


def _name(text: str) -> str:
    """Quoted as Graphviz wants it, which is as JSON has it."""
    return json.dumps(text, ensure_ascii=False)
