"""Placement of ranks on the nodes and rails of a topology file.

The node of a rank comes from the file's ``[[rank]]`` or else from the host name that the rank reports. The rail comes
from ``[[rank]]`` too; otherwise ranks take the rails of their node in order, an assumption that `sources` states.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import msgspec
import numpy as np

from ncclbench.errors import UsageError
from ncclbench.topology.file_model import MOST_RANKS, Nic, Node, Switch, TopologyFile
from ncclbench.topology.host_detection import natural_key
from ncclbench.topology.model import Topology
from ncclbench.topology.wiring import UNKNOWN, Wiring
from ncclbench.units import counted


def place_ranks(found: TopologyFile, hosts: Sequence[str]) -> Topology:
    """The topology of a job whose ranks report `hosts`, in rank order.

    Raises:
        UsageError: if the file names a rank that is not in the job, has no node of a rank's name, or has fewer rails
            on a node than there are ranks.
    """
    nodes = _nodes_of(found, hosts)
    rails = _rails_of(found, nodes)
    domains = [node.domain or node.name for node in nodes]
    sites = [node.site for node in nodes]
    names = list(dict.fromkeys(node.name for node in nodes))
    return Topology(
        nodes=_indices([node.name for node in nodes]),
        domains=_indices(domains),
        rails=np.array(rails),
        sites=_indices(sites),
        node_names=tuple(names),
        sources=_sources(found, nodes, hosts),
        wiring=_wiring(found, nodes, rails),
    )


def plan_placement(found: TopologyFile, world_size: int) -> Topology:
    """The topology of `world_size` ranks that have not started; ranks without an entry take the nodes in file order.

    Raises:
        UsageError: if the file has fewer rails, or no job has as many ranks.
    """
    if world_size > MOST_RANKS:
        raise UsageError(f"{world_size} ranks are more than the {MOST_RANKS} that can be laid out")
    if found.rank and {entry.rank for entry in found.rank} == set(range(world_size)):
        return place_ranks(found, [entry.node for entry in sorted(found.rank, key=lambda entry: entry.rank)])
    if [node.name for node in found.node] == ["*"]:
        return place_ranks(found, ["any-host"] * world_size)
    places = [node.name for node in found.node for _ in (node.rails or [0])]
    if world_size > len(places):
        raise UsageError(
            f"{found.source} has {counted(len(places), 'rail')} on all its nodes, fewer than "
            f"{counted(world_size, 'rank')}"
        )
    return place_ranks(found, places[:world_size])


def rank_capacity(found: TopologyFile) -> int:
    """The number of ranks that a file can hold: those it lists; else one per rail, or one per node of unknown rails."""
    return len(found.rank) or sum(len(node.rails) or 1 for node in found.node)


class RankDetection(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank detected about its host.

    Attributes:
        nic: the NIC nearest to its GPU that no other GPU of its host is nearer to, or without a GPU the interface that
            gloo is set to use; "" if there is none.
        gbit_per_s: of that NIC.
        domain: the NVLink domain that NVML names; "" where it names none.
    """

    nic: str = ""
    gbit_per_s: float | None = None
    domain: str = ""


def place_detected_ranks(hosts: Sequence[str], found: Sequence[RankDetection]) -> Topology:
    """The topology of a job without a file: from host names, and from properties that all ranks detected."""
    topology = Topology.from_hosts(hosts)
    if any(one.domain for one in found):
        topology = replace(
            topology,
            domains=_indices([one.domain or host for host, one in zip(hosts, found, strict=True)]),
            sources={**topology.sources, "domain": "NVML's fabric information (cluster and clique)"},
        )
    ports = [(host, one.nic) for host, one in zip(hosts, found, strict=True)]
    if not all(one.nic for one in found) or len(set(ports)) < len(ports):
        return topology
    rail = "each rank's own NIC (nearest to its GPU by PCI distance, or gloo's interface), in their order on its host"
    wiring = Wiring(
        devices=tuple(one.nic for one in found),
        nic_gbit_per_s=np.array([one.gbit_per_s or np.nan for one in found]),
        leaves=np.full(len(found), UNKNOWN),
        leaf_names=(),
        uplinks=np.zeros(0, np.int64),
        uplink_gbit_per_s=np.zeros(0),
        domain_gbit_per_s=np.full(len(found), np.nan),
    )
    sources = {**topology.sources, "rail": rail}
    return replace(topology, rails=np.array(_rails_by_device(ports)), wiring=wiring, sources=sources)


def _rails_by_device(ports: Sequence[tuple[str, str]]) -> list[int]:
    """The index of each NIC among the NICs of its host that are used, in natural order."""
    by_host: dict[str, list[str]] = {}
    for host, nic in ports:
        by_host.setdefault(host, []).append(nic)
    ordered = {host: sorted(nics, key=natural_key) for host, nics in by_host.items()}
    return [ordered[host].index(nic) for host, nic in ports]


def straddling(topology: Topology, size: int) -> str:
    """A warning if groups of `size` consecutive ranks span several NVLink domains; "" if none does."""
    if size < 2 or size > topology.world_size or topology.world_size % size:
        return ""
    _, members = np.unique(topology.domains, return_counts=True)
    groups = topology.domains.reshape(-1, size)
    spans = np.array([len(np.unique(group)) for group in groups])
    split = np.flatnonzero(spans > 1)
    if not len(split):
        return ""
    first = f"ranks {split[0] * size} to {(split[0] + 1) * size - 1} sit in {spans[split[0]]} NVLink domains"
    fits = members.max() >= size
    advice = "place consecutive ranks in one domain" if fits else f"none here holds more than {members.max()} ranks"
    return f"{len(split)} of {len(groups)} expert-parallel groups of {size} straddle NVLink domains ({first}); {advice}"


def _indices(names: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """An index for each name, in order of first appearance."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(name, len(first)) for name in names], dtype=np.int64)


def _nodes_of(found: TopologyFile, hosts: Sequence[str]) -> list[Node]:
    by_name = {node.name: node for node in found.node}
    short = Counter(node.name.partition(".")[0] for node in found.node)
    by_short = {head: node for node in found.node if short[head := node.name.partition(".")[0]] == 1}
    said = {entry.rank: entry.node for entry in found.rank}
    beyond = [rank for rank in said if rank >= len(hosts)]
    if beyond:
        raise UsageError(f"{found.source}: unknown rank {min(beyond)}: this job has ranks 0 to {len(hosts) - 1}")
    nodes = []
    for rank, host in enumerate(hosts):
        name = said.get(rank, host)
        node = by_name.get(name) or by_short.get(name.partition(".")[0])
        if node is None and "*" in by_name:
            node = by_name[name] = msgspec.structs.replace(by_name["*"], name=name)
        if node is None:
            known = ", ".join([*by_name][:12]) + (f" and {len(by_name) - 12} more" if len(by_name) > 12 else "")
            raise UsageError(
                f"{found.source}: rank {rank} reports the host name {host!r}, and no node is called so; there are: "
                f"{known}; correct the name, or say `[[rank]] rank = {rank}, node = ...`"
            )
        nodes.append(node)
    return nodes


def _rails_of(found: TopologyFile, nodes: Sequence[Node]) -> list[int]:
    """The rail of each rank: as the file says, or the first free rail of its node."""
    said = {entry.rank: entry.rail for entry in found.rank if entry.rail is not None}
    taken: dict[tuple[str, int], int] = {(nodes[rank].name, rail): rank for rank, rail in said.items()}
    choices: dict[str, Iterator[int]] = {}  # of each node, the rails not tried yet
    rails = []
    for rank, node in enumerate(nodes):
        rail = said.get(rank)
        if rail is None:
            left = choices.setdefault(node.name, iter(node.rails or range(len(nodes))))
            rail = next((choice for choice in left if (node.name, choice) not in taken), None)
            if rail is None:
                others = [r for (name, _), r in taken.items() if name == node.name]
                raise UsageError(
                    f"{found.source}: {node.name} has rails {', '.join(map(str, node.rails))}, and ranks "
                    f"{', '.join(map(str, [*others, rank]))} are on it: two ranks would share one NIC"
                )
            taken[node.name, rail] = rank
        rails.append(rail)
    return rails


def _sources(found: TopologyFile, nodes: Sequence[Node], hosts: Sequence[str]) -> dict[str, str]:
    file = f"topology file {found.source}"
    said = {entry.rank for entry in found.rank}
    where = f"host name of each rank, looked up in {file}"
    if said:
        where = (
            f"{file}, [[rank]]" if len(said) == len(nodes) else f"{where}; {counted(len(said), 'rank')} by its [[rank]]"
        )
    short = [host.partition(".")[0] for host in hosts]
    elsewhere = sum(name != node.name.partition(".")[0] for name, node in zip(short, nodes, strict=True))
    if elsewhere:
        report = "rank reports" if elsewhere == 1 else "ranks report"
        where += f"; {elsewhere} {report} another host name than the file gives them"
    outright = {entry.rank for entry in found.rank if entry.rail is not None}
    rail = f"{file}, [[rank]]" if len(outright) == len(nodes) else f"assumed: ranks take the rails of {file} in order"
    sources = {
        "node": where,
        "domain": file if any(node.domain for node in found.node) else f"{file} names none: one NVLink domain per node",
        "rail": rail,
        "site": file if any(node.site for node in found.node) else f"{file} names none: one site",
        "leaf": file if found.leaf else f"{file} names none: unknown",
    }
    return {**sources, **({"file": f"{found.source} sha256:{found.sha256}"} if found.sha256 else {})}


def _wiring(found: TopologyFile, nodes: Sequence[Node], rails: Sequence[int]) -> Wiring:
    leaves = {leaf.name: k for k, leaf in enumerate(found.leaf)}
    spines = {spine.name: spine for spine in found.spine}
    domains = {domain.name: domain.gbit_per_s for domain in found.domain}
    ports = [node.ports(rail) for node, rail in zip(nodes, rails, strict=True)]
    rates = [[port.gbit_per_s for port in planes] for planes in ports]
    return Wiring(
        devices=tuple(",".join(port.device for port in planes if port.device) for planes in ports),
        nic_gbit_per_s=np.array([_total(planes) for planes in rates]),
        leaves=np.array([_leaf(node, planes, leaves) for node, planes in zip(nodes, ports, strict=True)]),
        leaf_names=tuple(leaves),
        uplinks=np.array([len(leaf.spines) for leaf in found.leaf]),
        uplink_gbit_per_s=np.array([_uplinks(leaf, spines) for leaf in found.leaf]),
        domain_gbit_per_s=np.array([domains.get(node.domain or node.name) or np.nan for node in nodes]),
    )


def _leaf(node: Node, planes: Sequence[Nic], leaves: dict[str, int]) -> int:
    return leaves.get((planes[0].leaf if planes else None) or node.leaf or "", UNKNOWN)


def _total(rates: Sequence[float | None]) -> float:
    """The sum; NaN if any is unknown, or there is none."""
    return sum(rate or np.nan for rate in rates) if rates else np.nan


def _uplinks(leaf: Switch, spines: dict[str, Switch]) -> float:
    """What a leaf can send up: of each uplink the slower of its two ends."""
    ends = [(leaf.uplink_gbit_per_s, spines[name].gbit_per_s) for name in leaf.spines]
    return _total([min((rate for rate in both if rate is not None), default=None) for both in ends])
