"""Ranks that share experts: expert-parallel groups, and the NVLink domain of each of their members."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ncclbench.errors import Unable, UsageError
from ncclbench.moe.routing import Ints
from ncclbench.topology import Topology


@dataclass(frozen=True, eq=False)
class ExpertPlacement:
    """The ranks that share experts, and the domain of each of them.

    Attributes:
        groups: ranks of each group in ascending order, shape (G, N).
        domains: the domain of each member, numbered from 0 inside its group, shape (G, N).
        assumed: source of the domains, if they are not those of the topology.
    """

    groups: Ints
    domains: Ints
    assumed: str | None = None

    @classmethod
    def of(cls, topology: Topology, members: int, shape: str = "") -> "ExpertPlacement":
        """Groups of `members` ranks; a `shape` such as ``16x2`` asks for 2 domains of 16 ranks each.

        If the job is a single domain, blocks of ranks stand in for the domains, and `assumed` states it.

        Raises:
            UsageError: if `shape` is malformed, or does not have `members` ranks.
            Unable: if the job's ranks or domains do not allow it.
        """
        world = topology.world_size
        if members < 1 or world % members:
            raise Unable(f"ep = {members} needs a multiple of {members} ranks; this job has {world}")
        if not shape:
            groups = np.arange(world).reshape(-1, members)
            return cls(groups, _counted(topology.domains[groups]))
        size, number = _shape(shape, members)
        blocks = _blocks(topology, size)
        groups = np.sort(blocks.reshape(-1, number * size), axis=1)
        real = _counted(topology.domains[groups])
        if len(np.unique(topology.domains)) == 1:
            label = np.empty(world, np.int64)
            label[blocks.ravel()] = np.repeat(np.arange(len(blocks)), size)
            return cls(groups, _counted(label[groups]), f"{shape}: this job is one domain, played as {number}")
        if any(len(np.unique(row)) != number for row in real):
            raise Unable(f"placement {shape}: this job's domains do not make groups of {number} domains")
        return cls(groups, real)

    @property
    def members(self) -> int:
        """N, ranks per group."""
        return int(self.groups.shape[1])

    def group_and_member(self, rank: int) -> tuple[int, int]:
        """The group of a rank, and its position in the group."""
        return self._group_and_member[rank]

    @cached_property
    def _group_and_member(self) -> dict[int, tuple[int, int]]:
        """Computed once, since every phase of every rank asks for it."""
        return {rank: (g, member) for g, row in enumerate(self.groups.tolist()) for member, rank in enumerate(row)}

    @cached_property
    def by_domain(self) -> Ints:
        """Members of each domain in ascending order, shape (G, D, L).

        Raises:
            Unable: if domains differ in size.
        """
        found = []
        for row in self.domains:
            found.append([np.flatnonzero(row == d) for d in range(int(row.max()) + 1)])
        if len({(len(row), len(one)) for row in found for one in row}) != 1:
            raise Unable("hierarchical needs domains of equal size in every expert-parallel group")
        return np.array(found)


def _shape(shape: str, members: int) -> tuple[int, int]:
    size, cross, number = shape.partition("x")
    if not (cross and size.isdecimal() and number.isdecimal() and int(size) and int(number)):
        raise UsageError(f"placement must be RANKSxDOMAINS such as 16x2, got {shape!r}")
    if int(size) * int(number) != members:
        raise UsageError(f"placement {shape} is {int(size) * int(number)} ranks, and ep is {members}")
    return int(size), int(number)


def _blocks(topology: Topology, size: int) -> Ints:
    """Blocks of `size` ranks that share a domain, shape (blocks, size): the first block of every domain comes first."""
    found = []
    for domain in np.unique(topology.domains):
        ranks = np.flatnonzero(topology.domains == domain)
        if len(ranks) % size:
            raise Unable(f"placement: blocks of {size} ranks do not divide a domain of {len(ranks)}")
        found += [(i, int(domain), ranks[i * size : (i + 1) * size]) for i in range(len(ranks) // size)]
    return np.array([ranks for _, _, ranks in sorted(found, key=lambda one: one[:2])])


def _counted(labels_GN: Ints) -> Ints:
    """Labels renumbered from 0 in each row, in the order of first appearance."""
    out = np.empty_like(labels_GN)
    for g, row in enumerate(labels_GN):
        _, first, inverse = np.unique(row, return_index=True, return_inverse=True)
        out[g] = np.argsort(np.argsort(first))[inverse.ravel()]
    return out
