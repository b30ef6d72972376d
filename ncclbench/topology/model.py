"""Where every rank sits: node, NVLink domain, rail and site, and the link class of a pair.

A topology is detected or read, never guessed from rank order without saying so: `sources` tells for each property
where it came from, and goes into the manifest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ncclbench.errors import Unable, UsageError

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
    """

    nodes: Ints
    domains: Ints
    rails: Ints
    sites: Ints
    node_names: tuple[str, ...]
    sources: Mapping[str, str] = field(default_factory=dict)

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
                "domain": "assumed: one NVLink domain a node",
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
            size = int(spec)
            if size < 1 or self.world_size % size:
                raise Unable(f"groups of {size} do not divide a world of {self.world_size}")
            return ranks.reshape(-1, size)
        keys = {"node": self.nodes, "domain": self.domains, "rail": self.rails, "site": self.sites}
        if spec not in keys:
            raise UsageError(f"no group {spec!r}; there are: world, {', '.join(keys)}, or a number of ranks")
        members = [ranks[keys[spec] == key] for key in np.unique(keys[spec])]
        if len({len(group) for group in members}) != 1:
            raise Unable(f"groups by {spec} differ in size here: {[len(group) for group in members]}")
        return np.stack(members)

    def as_record(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return {
            "world_size": self.world_size,
            "nodes": self.nodes.tolist(),
            "domains": self.domains.tolist(),
            "rails": self.rails.tolist(),
            "sites": self.sites.tolist(),
            "node_names": list(self.node_names),
            "sources": dict(self.sources),
        }
