"""Which rows an expert-parallel layer moves: from whom, to whom, in which order, and with which choices.

A row is a token on its way to a rank (or, in the first hop of a hierarchical dispatch, to a domain), with the choices
that it makes there. Rows leave ordered by destination and then by token; they arrive ordered by source and then by
token. All of it follows from the routing alone, so every rank knows every other's rows.

Shapes: G expert-parallel groups, N members of one, D domains, L members of a domain, T tokens, k choices, n rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import Unable, UsageError
from ncclbench.moe.routing import Choices, Ints, expert_hosts
from ncclbench.topology import Topology

# A count of rows is an int32, and so is where a peer's rows begin: MPI's displacements are sums of its counts.
_MOST_ROWS = 2**31 - 1


@dataclass(frozen=True, eq=False)
class ExpertPlacement:
    """Which ranks share experts, and in which domain each of them is.

    Attributes:
        groups: ranks of each group in ascending order, shape (G, N).
        domains: the domain of each member, counted from 0 inside its group, shape (G, N).
        assumed: where the domains come from, if not from the topology.
    """

    groups: Ints
    domains: Ints
    assumed: str | None = None

    @classmethod
    def of(cls, topology: Topology, members: int, shape: str = "") -> "ExpertPlacement":
        """Groups of `members` ranks; `shape` such as ``16x2`` asks for 2 domains of 16 ranks each.

        Raises:
            UsageError: if `shape` is no such thing, or does not make `members`.
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
        """N."""
        return int(self.groups.shape[1])

    def seat(self, rank: int) -> tuple[int, int]:
        """Group and place in it of a rank."""
        return self._seats[rank]

    @cached_property
    def _seats(self) -> dict[int, tuple[int, int]]:
        """Asked for in every phase of every rank, so looked for once."""
        return {rank: (g, member) for g, row in enumerate(self.groups.tolist()) for member, rank in enumerate(row)}

    @cached_property
    def by_domain(self) -> Ints:
        """Members of each domain in order, shape (G, D, L).

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
    """Ranks in blocks of `size` that share a domain, one of every domain before the second of any."""
    found = []
    for domain in np.unique(topology.domains):
        ranks = np.flatnonzero(topology.domains == domain)
        if len(ranks) % size:
            raise Unable(f"placement: blocks of {size} ranks do not divide a domain of {len(ranks)}")
        found += [(i, int(domain), ranks[i * size : (i + 1) * size]) for i in range(len(ranks) // size)]
    return np.array([ranks for _, _, ranks in sorted(found, key=lambda one: one[:2])])


def _counted(labels_GN: Ints) -> Ints:
    """Labels counted from 0 in each row, in the order of first appearance."""
    out = np.empty_like(labels_GN)
    for g, row in enumerate(labels_GN):
        _, first, inverse = np.unique(row, return_index=True, return_inverse=True)
        out[g] = np.argsort(np.argsort(first))[inverse.ravel()]
    return out


@dataclass(frozen=True, eq=False)
class RowSet:
    """Rows in the order in which they lie in a buffer.

    Attributes:
        src: the member whose token it is, shape (n,); -1 for a row of padding.
        tok: which of its tokens, shape (n,).
        slots: the choices j that the row carries, first ones first, shape (n, S); -1 is none.
    """

    src: Ints
    tok: Ints
    slots: Ints

    def __len__(self) -> int:
        """N."""
        return len(self.src)

    def keys(self, tokens: int) -> Ints:
        """One number for each token; all padding has -1."""
        return np.where(self.src < 0, -1, self.src * tokens + self.tok)

    def take(self, chosen: NDArray[np.bool_] | Ints) -> "RowSet":
        """Some of the rows."""
        return RowSet(self.src[chosen], self.tok[chosen], self.slots[chosen])


def positions(wanted: RowSet, held: RowSet, tokens: int) -> Ints:
    """Where each token of `wanted` lies in `held`, shape (n,); -1 for padding. A token lies in `held` once."""
    keys, sought = held.keys(tokens), wanted.keys(tokens)
    order = np.argsort(keys, kind="stable")
    where = np.minimum(np.searchsorted(keys[order], sought), max(0, len(order) - 1))
    found = order[where] if len(order) else np.full(len(sought), -1)
    return np.where(sought < 0, -1, found)


def all_positions(wanted: RowSet, held: RowSet, tokens: int, terms: int) -> Ints:
    """All places where each token of `wanted` lies in `held`, shape (n, terms); -1 where there are no more."""
    out = np.full((len(wanted), terms), -1, np.int64)
    real = np.flatnonzero(held.src >= 0)
    keys = held.keys(tokens)[real]
    order = np.argsort(keys, kind="stable")
    first = np.searchsorted(keys[order], wanted.keys(tokens))
    last = np.searchsorted(keys[order], wanted.keys(tokens), side="right")
    for j in range(terms):
        there = (first + j < last) & (wanted.src >= 0)
        out[there, j] = real[order[(first + j)[there]]]
    return out


@dataclass(frozen=True, eq=False)
class Hop:
    """One all-to-all of rows, in subgroups of all groups at once.

    Attributes:
        name: what tells its phases from another hop's; empty if there is only one.
        groups: ranks, shape (number of subgroups, members).
        rows: shape (number of subgroups, members, members).
        sent: a rank's rows as they leave.
        received: a rank's rows as they arrive.
        fan_out: the most rows that one row held before becomes.
    """

    name: str
    groups: Ints
    rows: Ints
    sent: Callable[[int], RowSet]
    received: Callable[[int], RowSet]
    fan_out: int


def refuse_too_many_rows(rows_GNN: Ints) -> None:
    """Refuse what counts and displacements of a library's all-to-all cannot say; every rank sees the same matrices.

    Raises:
        Unable: with more rows on any rank than an int32 counts.
    """
    sent_GN, received_GN = rows_GNN.sum(axis=2), rows_GNN.sum(axis=1)
    most = int(max(sent_GN.max(), received_GN.max()))
    if most > _MOST_ROWS:
        raise Unable(
            f"{most} rows leave or reach one rank, and counts and displacements are int32: at most {_MOST_ROWS}; lower "
            "tokens"
        )


class GroupRows:
    """The rows of one expert-parallel group.

    Args:
        choices: experts of the members' tokens, shape (N, T, k).
        experts: E.
        domains: the domain of each member, shape (N,).
        dedup: whether a token goes to a rank once, or once a choice.
    """

    def __init__(self, choices: Choices, experts: int, domains: Ints, *, dedup: bool) -> None:
        """Work out where every choice lives."""
        self.choices, self.domains, self.dedup = choices, domains, dedup
        self.members, self.tokens, self.top_k = choices.shape
        self.hosts = expert_hosts(experts, self.members)
        self.dest = np.where(choices < 0, -1, self.hosts[choices])

    @cached_property
    def to_rank(self) -> NDArray[np.bool_]:
        """Whether a token has a choice on a rank, shape (N, T, N)."""
        return self._has(self.dest, self.members)

    @cached_property
    def to_domain(self) -> NDArray[np.bool_]:
        """Whether a token has a choice in a domain, shape (N, T, D)."""
        return self._has(self.domain_of_choice, int(self.domains.max()) + 1)

    @cached_property
    def domain_of_choice(self) -> Ints:
        """Shape (N, T, k); -1 is none."""
        return np.where(self.dest < 0, -1, self.domains[self.dest])

    def _has(self, target: Ints, number: int) -> NDArray[np.bool_]:
        has = np.zeros((self.members, self.tokens, number + 1), bool)
        np.put_along_axis(has, target, True, axis=2)  # -1 is the last, which is dropped
        return has[:, :, :number]

    @cached_property
    def rank_rows(self) -> Ints:
        """Tokens that go from each member to each, once a token: shape (N, N)."""
        return np.asarray(self.to_rank.sum(axis=1), np.int64)

    @cached_property
    def selection_rows(self) -> Ints:
        """Choices of each member's tokens on each member: shape (N, N)."""
        return np.stack([np.bincount(d[d >= 0].ravel(), minlength=self.members) for d in self.dest]).astype(np.int64)

    @cached_property
    def domain_rows(self) -> Ints:
        """Tokens that go from each member to each domain, once a token: shape (N, D)."""
        return np.asarray(self.to_domain.sum(axis=1), np.int64)

    def _slots(self, hit_nk: NDArray[np.bool_]) -> Ints:
        """The choices that are hit, the first ones first, shape (n, k)."""
        order = np.argsort(~hit_nk, axis=1, kind="stable")
        return np.where(np.take_along_axis(hit_nk, order, axis=1), order, -1)

    def own(self, member: int) -> RowSet:
        """A member's tokens before anything is sent."""
        count = int((self.choices[member, :, 0] >= 0).sum())
        slots = np.broadcast_to(np.arange(self.top_k), (count, self.top_k))
        return RowSet(np.full(count, member), np.arange(count), slots)

    def to_ranks(self, member: int) -> RowSet:
        """What `member` sends when every token goes straight to its ranks."""
        if self.dedup:
            target, tok = np.nonzero(self.to_rank[member].T)
            return RowSet(np.full(len(tok), member), tok, self._slots(self.dest[member, tok] == target[:, None]))
        flat = self.dest[member].ravel()
        chosen = np.argsort(flat, kind="stable")[int((flat < 0).sum()) :]
        tok, slot = np.divmod(chosen, self.top_k)
        return RowSet(np.full(len(tok), member), tok, slot[:, None])

    def at_rank(self, member: int) -> RowSet:
        """What arrives at `member` then."""
        if self.dedup:
            src, tok = np.nonzero(self.to_rank[:, :, member])
            return RowSet(src, tok, self._slots(self.dest[src, tok] == member))
        src, tok, slot = np.nonzero(self.dest == member)
        return RowSet(src, tok, slot[:, None])

    def to_proxies(self, member: int) -> RowSet:
        """What `member` sends when every token goes once to each of its domains."""
        target, tok = np.nonzero(self.to_domain[member].T)
        return RowSet(
            np.full(len(tok), member), tok, self._slots(self.domain_of_choice[member, tok] == target[:, None])
        )

    def at_proxy(self, member: int, peers: Ints) -> RowSet:
        """What arrives at `member` then, from its `peers`, one in each domain."""
        domain = self.domains[member]
        src_place, tok = np.nonzero(self.to_domain[peers][:, :, domain])
        src = peers[src_place]
        return RowSet(src, tok, self._slots(self.domain_of_choice[src, tok] == domain))

    def from_proxy(self, held: RowSet, member: int) -> RowSet:
        """The rows that a proxy that has `held` passes on to `member`."""
        some = held.take(self.to_rank[held.src, held.tok, member])
        return replace(some, slots=self._slots(self.dest[some.src, some.tok] == member))


def joined(parts: list[RowSet]) -> RowSet:
    """One after the other."""
    return RowSet(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("src", "tok", "slots")))


def padded(rows: RowSet, counts: Ints, capacity: int) -> RowSet:
    """The rows for (or from) each peer followed by padding up to `capacity`; `counts` of each peer."""
    place = np.concatenate([np.arange(count) + peer * capacity for peer, count in enumerate(counts.tolist())])
    total = capacity * len(counts)
    src, tok, slots = np.full(total, -1), np.zeros(total, np.int64), np.full((total, rows.slots.shape[1]), -1)
    src[place], tok[place], slots[place] = rows.src, rows.tok, rows.slots
    return RowSet(src, tok, slots)


class LayerRows:
    """All expert-parallel groups of a job for one routing.

    Args:
        choices: experts of all ranks' tokens, shape (W, T, k).
        experts: E.
        placement: who shares experts.
        dedup: see `GroupRows`.
    """

    def __init__(self, choices: Choices, experts: int, placement: ExpertPlacement, *, dedup: bool) -> None:
        """Make every group's rows."""
        self.placement = placement
        self.groups = [
            GroupRows(choices[ranks], experts, domains, dedup=dedup)
            for ranks, domains in zip(placement.groups, placement.domains, strict=True)
        ]

    def own(self, rank: int) -> RowSet:
        """A rank's tokens."""
        g, member = self.placement.seat(rank)
        return self.groups[g].own(member)

    @property
    def flat_rows(self) -> Ints:
        """Rows between members when every token goes straight to its ranks: shape (G, N, N)."""
        return np.stack([group.rank_rows if group.dedup else group.selection_rows for group in self.groups])

    def flat(self, capacity: int = 0) -> list[Hop]:
        """One hop, straight to the ranks; with a capacity every pair exchanges so many rows."""
        rows, placement = self.flat_rows, self.placement

        def of(rank: int, what: str) -> RowSet:
            g, member = placement.seat(rank)
            found: RowSet = getattr(self.groups[g], what)(member)
            if not capacity:
                return found
            return padded(found, rows[g, member] if what == "to_ranks" else rows[g, :, member], capacity)

        group = self.groups[0]
        fan_out = min(group.top_k, group.members) if group.dedup else group.top_k
        sent = np.full_like(rows, capacity) if capacity else rows
        return [Hop("", placement.groups, sent, lambda r: of(r, "to_ranks"), lambda r: of(r, "at_rank"), fan_out)]

    def hierarchical(self) -> list[Hop]:
        """Two hops: once to each domain, to the member in the sender's place there; then inside the domain."""
        placement, members_GDL = self.placement, self.placement.by_domain
        ranks_GDL = np.take_along_axis(
            placement.groups[:, None, :], members_GDL.reshape(len(members_GDL), 1, -1), axis=2
        )
        ranks_GDL = ranks_GDL.reshape(members_GDL.shape)
        top_k, (_, domains, local) = self.groups[0].top_k, members_GDL.shape

        def seat(rank: int) -> tuple[GroupRows, int, int, int]:
            g, d, place = (int(x[0]) for x in np.nonzero(ranks_GDL == rank))
            return self.groups[g], g, d, place

        def arrived(rank: int) -> RowSet:
            group, g, d, place = seat(rank)
            return group.at_proxy(int(members_GDL[g, d, place]), members_GDL[g, :, place])

        def passed_on(rank: int) -> RowSet:
            group, g, d, _ = seat(rank)
            held = arrived(rank)
            return joined([group.from_proxy(held, int(m)) for m in members_GDL[g, d]])

        def delivered(rank: int) -> RowSet:
            group, g, d, place = seat(rank)
            me = int(members_GDL[g, d, place])
            return joined([group.from_proxy(arrived(int(r)), me) for r in ranks_GDL[g, d]])

        def leaving(rank: int) -> RowSet:
            group, g, d, place = seat(rank)
            return group.to_proxies(int(members_GDL[g, d, place]))

        rail_rows = np.stack([g.domain_rows[m] for g, m in zip(self.groups, members_GDL, strict=True)])  # G D L D
        inner = np.stack([_inner_rows(g, m) for g, m in zip(self.groups, members_GDL, strict=True)])  # G D L L
        return [
            Hop(
                "rail",
                ranks_GDL.transpose(0, 2, 1).reshape(-1, domains),
                rail_rows.transpose(0, 2, 1, 3).reshape(-1, domains, domains),
                leaving,
                arrived,
                min(top_k, domains),
            ),
            Hop(
                "domain",
                ranks_GDL.reshape(-1, local),
                inner.reshape(-1, local, local),
                passed_on,
                delivered,
                min(top_k, local),
            ),
        ]


def _inner_rows(group: GroupRows, members_DL: Ints) -> Ints:
    """Rows that each proxy passes on inside its domain, shape (D, L, L): those of all sources in its place."""
    rows_DLDL = group.rank_rows[members_DL.ravel()][:, members_DL.ravel()].reshape(*members_DL.shape, *members_DL.shape)
    return np.asarray(rows_DLDL.sum(axis=0).transpose(1, 0, 2), np.int64)
