"""Where every rank sits: node, NVLink domain, rail and site, and the link class of a pair.

What only a topology file can tell (leaves, spines, rates) is in its `Wiring`.

A topology is detected or read, never guessed from rank order without saying so: `sources` tells for each property
where it came from, and goes into the manifest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ncclbench.errors import Unable, UsageError
from ncclbench.topology.wiring import Wiring, WiringRecord
from ncclbench.units import Int64

Ints = NDArray[np.int64]


class Link(IntEnum):
    """The class of the link between two ranks, nearest first."""

    SELF = 0
    NODE = 1
    DOMAIN = 2
    SAME_RAIL = 3
    CROSS_RAIL = 4
    CROSS_SITE = 5

    @property
    def label(self) -> str:
        """The name in records."""
        return self.name.lower()


def _frozen(values: ArrayLike) -> Ints:
    array = np.array(values, dtype=np.int64)
    array.setflags(write=False)
    return array


class TopologyRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A `Topology` as a manifest stores it; empty where nothing is known of the ranks' places.

    Attributes:
        world_size: number of ranks.
        nodes: the host or tray of each rank, counted from 0.
        domains: its NVLink domain.
        rails: the rail of its NIC.
        sites: its data centre.
        node_names: a name for each node.
        sources: for each property, where it came from, in words.
        wiring: NICs, leaves and rates, where something told them.
    """

    world_size: Int64 = 0
    nodes: list[Int64] = []
    domains: list[Int64] = []
    rails: list[Int64] = []
    sites: list[Int64] = []
    node_names: list[str] = []
    sources: dict[str, str] = {}
    wiring: WiringRecord | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Topology:
    """Where every rank of a world of R sits. All arrays have shape (R,) and hold indices from 0.

    Attributes:
        nodes: the host or tray of each rank.
        domains: its NVLink domain.
        rails: the rail of its NIC, counted inside its node.
        sites: its data centre.
        node_names: a name for each node index.
        sources: for each property, where it came from, in words.
        wiring: NICs, leaves and rates, where something told them.
    """

    nodes: Ints
    domains: Ints
    rails: Ints
    sites: Ints
    node_names: tuple[str, ...]
    sources: Mapping[str, str] = field(default_factory=dict)
    wiring: Wiring | None = None

    def __post_init__(self) -> None:
        """Freeze the arrays."""
        for name in ("nodes", "domains", "rails", "sites"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))
            if getattr(self, name).shape != self.nodes.shape:
                raise ValueError(f"topology: {name} has another length than nodes")

    @classmethod
    def from_hosts(cls, hosts: Sequence[str]) -> "Topology":
        """A topology known from host names alone, in rank order: a host is a node and a domain.

        The rail is the rank's place on its host, which is an assumption, and `sources` says so.
        """
        if not hosts or not all(hosts):
            raise ValueError("every rank needs a host name: ranks without one would look like one node")
        places: dict[str, int] = {}
        seen: dict[str, int] = {}
        nodes, rails = np.zeros(len(hosts), np.int64), np.zeros(len(hosts), np.int64)
        for rank, host in enumerate(hosts):
            nodes[rank] = places.setdefault(host, len(places))
            rails[rank] = seen.get(host, 0)
            seen[host] = seen.get(host, 0) + 1
        return cls(
            nodes=nodes,
            domains=nodes,
            rails=rails,
            sites=np.zeros_like(nodes),
            node_names=tuple(places),
            sources={
                "node": "host name of each rank",
                "domain": "assumed: one NVLink domain per node",
                "rail": "assumed from the place of a rank on its node",
                "site": "assumed: one site",
            },
        )

    @classmethod
    def single_node(cls, world_size: int, name: str = "local") -> "Topology":
        """`world_size` ranks on one node."""
        return cls.from_hosts([name] * world_size)

    @property
    def world_size(self) -> int:
        """R."""
        return len(self.nodes)

    def grid(self) -> Ints:
        """All ranks by NVLink domain, node and rail, shape (D, T, R); a domain of one node has T = 1.

        Raises:
            Unable: unless every domain has as many nodes, and every node a rank on each of the same rails.
        """
        _, per_node = np.unique(self.nodes, return_counts=True)
        if len(np.unique(per_node)) != 1:
            shown = [f"{name} {n}" for name, n in zip(self.node_names, per_node.tolist(), strict=False)]
            more = f" and {len(shown) - 6} more nodes" if len(shown) > 6 else ""
            raise Unable(f"ranks per node are uneven here: {', '.join(shown[:6])}{more}")
        order = np.lexsort((self.rails, self.nodes, self.domains))
        rows_NR = order.reshape(len(per_node), -1)
        for name, key in (("node", self.nodes), ("domain", self.domains)):
            if np.any(key[rows_NR] != key[rows_NR[:, :1]]):
                raise Unable(f"the ranks of one node are in several NVLink domains: there is no one {name} to a row")
        odd = np.flatnonzero(np.any(self.rails[rows_NR] != self.rails[rows_NR[:1]], axis=1))
        if len(odd):
            here, first = (self.rails[rows_NR[k]].tolist() for k in (odd[0], 0))
            names = [self.node_names[self.nodes[rows_NR[k, 0]]] for k in (odd[0], 0)]
            raise Unable(f"{names[0]} has its ranks on rails {here}, {names[1]} on {first}")
        _, per_domain = np.unique(self.domains[rows_NR[:, 0]], return_counts=True)
        if len(np.unique(per_domain)) != 1:
            raise Unable(f"NVLink domains differ in size here: {per_domain.tolist()[:8]} nodes")
        return np.asarray(rows_NR.reshape(len(per_domain), -1, rows_NR.shape[1]), dtype=np.int64)

    def carriers(self, src: ArrayLike, dst: ArrayLike, *, aligned: bool = False) -> tuple[Ints, Ints]:
        """The ranks whose NICs carry each flow out and in; -1 twice for a flow that stays in its NVLink domain.

        Args:
            src: sending ranks.
            dst: receiving ranks.
            aligned: traffic leaves by the NIC of the receiver's rail (NCCL's PXN), where the sender's node has one.
        """
        a, b = np.asarray(src, np.int64), np.asarray(dst, np.int64)
        out = a
        if aligned:
            rails = int(self.rails.max()) + 1
            at = np.full((int(self.nodes.max()) + 1) * rails, -1, np.int64)
            at[self.nodes * rails + self.rails] = np.arange(self.world_size)
            relay = at[self.nodes[a] * rails + self.rails[b]]
            out = np.where(relay >= 0, relay, a)
        inside = self.domains[a] == self.domains[b]
        return np.where(inside, -1, out), np.where(inside, -1, b)

    def link_classes(self, src: ArrayLike, dst: ArrayLike) -> Ints:
        """The `Link` of each pair; `src` and `dst` are ranks and broadcast against each other."""
        a, b = np.asarray(src, np.int64), np.asarray(dst, np.int64)
        same_rail = self.rails[a] == self.rails[b]
        link = np.where(same_rail, np.int64(Link.SAME_RAIL), np.int64(Link.CROSS_RAIL))
        link = np.where(self.sites[a] != self.sites[b], np.int64(Link.CROSS_SITE), link)
        link = np.where(self.domains[a] == self.domains[b], np.int64(Link.DOMAIN), link)
        link = np.where(self.nodes[a] == self.nodes[b], np.int64(Link.NODE), link)
        return np.asarray(np.where(a == b, np.int64(Link.SELF), link))

    def groups(self, spec: str) -> Ints:
        """Disjoint groups of ranks, shape (G, N).

        Args:
            spec: ``world``; ``node``, ``domain``, ``rail`` or ``site`` for the ranks that share one; or a whole
                number N for blocks of N consecutive ranks.

        Raises:
            UsageError: if `spec` is none of these.
            Unable: if the groups would not be of equal size here.
        """
        ranks = np.arange(self.world_size, dtype=np.int64)
        if spec == "world":
            return ranks[None]
        if spec.isdecimal():
            size = int(spec) if len(spec) < 10 else 10**9
            if size < 1:
                raise UsageError(f"group must be a number of ranks from 1 on, got {spec}")
            if self.world_size % size:
                raise Unable(f"groups of {spec[:10]} do not divide a world of {self.world_size}")
            return ranks.reshape(-1, size)
        keys = {"node": self.nodes, "domain": self.domains, "rail": self.rails, "site": self.sites}
        if spec not in keys:
            raise UsageError(f"no group {spec!r}; there are: world, {', '.join(keys)}, or a number of ranks")
        members = [ranks[keys[spec] == key] for key in np.unique(keys[spec])]
        if len({len(group) for group in members}) != 1:
            raise Unable(f"groups by {spec} differ in size here: {[len(group) for group in members]}")
        return np.stack(members)

    def as_record(self) -> TopologyRecord:
        """The form that a manifest stores."""
        return TopologyRecord(
            world_size=self.world_size,
            nodes=self.nodes.tolist(),
            domains=self.domains.tolist(),
            rails=self.rails.tolist(),
            sites=self.sites.tolist(),
            node_names=list(self.node_names),
            sources=dict(self.sources),
            wiring=self.wiring.as_record() if self.wiring else None,
        )

    @classmethod
    def from_record(cls, record: TopologyRecord) -> "Topology":
        """The inverse of `as_record`; `sites` that are missing are one site, and nodes without a name are numbered.

        Raises:
            ValueError: unless nodes, domains and rails have one entry per rank, each from 0.
        """
        count = len(record.nodes)
        sites = record.sites or [0] * count
        columns = {"nodes": record.nodes, "domains": record.domains, "rails": record.rails, "sites": sites}
        for name, column in columns.items():
            if len(column) != count or count != (record.world_size or count) or min(column, default=-1) < 0:
                raise ValueError(f"topology: {name} must have one index from 0 per rank")
        names = list(record.node_names)
        if max(record.nodes, default=0) >= max(count, len(names)):
            raise ValueError("topology: there cannot be more nodes than ranks")
        names += [f"node {index}" for index in range(len(names), max(record.nodes, default=-1) + 1)]
        return cls(
            nodes=_frozen(record.nodes),
            domains=_frozen(record.domains),
            rails=_frozen(record.rails),
            sites=_frozen(sites),
            node_names=tuple(names),
            sources=record.sources,
            wiring=Wiring.from_record(record.wiring, count) if record.wiring else None,
        )
