"""The rows that an expert-parallel layer moves: from which rank, to which rank, in which order, with which choices.

A row is a token on its way to a rank, with the choices that the token makes there. In the first hop of a hierarchical
dispatch its destination is a domain. Rows leave ordered by destination and then by token; they arrive ordered by
source and then by token. All of it follows from the routing alone, so every rank knows every other rank's rows.

Shapes: G expert-parallel groups, N members of one, D domains, L members of a domain, T tokens, k choices, n rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import Unable
from ncclbench.moe.expert_placement import ExpertPlacement
from ncclbench.moe.routing import Choices, Ints, expert_hosts

# A count of rows is an int32, and so is the index of a peer's first row: MPI's displacements are sums of its counts.
MOST_ROWS = 2**31 - 1


@dataclass(frozen=True, eq=False)
class RowSet:
    """Rows in the order in which they are stored in a buffer.

    Attributes:
        src: the member that owns the token, shape (n,); -1 for a row of padding.
        tok: index of the token on that member, shape (n,).
        slots: the choices j that the row carries, in ascending order, shape (n, S); -1 is none.
    """

    src: Ints
    tok: Ints
    slots: Ints

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.src)

    def keys(self, tokens: int) -> Ints:
        """A number that identifies the token of each row, shape (n,); -1 for padding."""
        return np.where(self.src < 0, -1, self.src * tokens + self.tok)

    def take(self, chosen: NDArray[np.bool_] | Ints) -> "RowSet":
        """The chosen rows, by mask or by index."""
        return RowSet(self.src[chosen], self.tok[chosen], self.slots[chosen])


def positions(wanted: RowSet, stored: RowSet, tokens: int) -> Ints:
    """The index in `stored` of each token of `wanted`, shape (n,); -1 for padding.

    A token occurs in `stored` once.
    """
    keys, sought = stored.keys(tokens), wanted.keys(tokens)
    order = np.argsort(keys, kind="stable")
    where = np.minimum(np.searchsorted(keys[order], sought), max(0, len(order) - 1))
    found = order[where] if len(order) else np.full(len(sought), -1)
    return np.where(sought < 0, -1, found)


def all_positions(wanted: RowSet, stored: RowSet, tokens: int, terms: int) -> Ints:
    """All indices in `stored` of each token of `wanted`, shape (n, terms); filled up with -1."""
    out = np.full((len(wanted), terms), -1, np.int64)
    real = np.flatnonzero(stored.src >= 0)
    keys = stored.keys(tokens)[real]
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
        name: distinguishes its phases from those of another hop; empty if there is only one.
        groups: ranks, shape (number of subgroups, members).
        rows: rows from member to member, shape (number of subgroups, members, members).
        sent: the rows of a rank as they leave.
        received: the rows of a rank as they arrive.
        fan_out: the largest number of rows that one row becomes in this hop.
    """

    name: str
    groups: Ints
    rows: Ints
    sent: Callable[[int], RowSet]
    received: Callable[[int], RowSet]
    fan_out: int


def refuse_too_many_rows(rows_GNN: Ints) -> None:
    """Refuse more rows than the counts and displacements of a library's all-to-all can hold.

    Every rank sees the same matrices, so all ranks refuse alike.

    Raises:
        Unable: if any rank has more rows than an int32 can count.
    """
    sent_GN, received_GN = rows_GNN.sum(axis=2), rows_GNN.sum(axis=1)
    most = int(max(sent_GN.max(), received_GN.max()))
    if most > MOST_ROWS:
        raise Unable(
            f"{most} rows leave or reach one rank, and counts and displacements are int32: at most {MOST_ROWS}; lower "
            "tokens"
        )


class GroupRows:
    """The rows of one expert-parallel group.

    Args:
        choices: experts of the members' tokens, shape (N, T, k).
        experts: E.
        domains: the domain of each member, shape (N,).
        dedup: whether a token is sent to a rank once, or once per choice.
    """

    def __init__(self, choices: Choices, experts: int, domains: Ints, *, dedup: bool) -> None:
        """Look up the member of every choice."""
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
        """The domain of every choice, shape (N, T, k); -1 is none."""
        return np.where(self.dest < 0, -1, self.domains[self.dest])

    def _has(self, target: Ints, number: int) -> NDArray[np.bool_]:
        has = np.zeros((self.members, self.tokens, number + 1), bool)
        np.put_along_axis(has, target, True, axis=2)  # -1 sets the last column, which is dropped
        return has[:, :, :number]

    @cached_property
    def rank_rows(self) -> Ints:
        """Tokens from member to member, each counted once per destination: shape (N, N)."""
        return np.asarray(self.to_rank.sum(axis=1), np.int64)

    @cached_property
    def selection_rows(self) -> Ints:
        """Choices from member to member, k per token: shape (N, N)."""
        return np.stack([np.bincount(d[d >= 0].ravel(), minlength=self.members) for d in self.dest]).astype(np.int64)

    @cached_property
    def domain_rows(self) -> Ints:
        """Tokens from member to domain, each counted once per destination: shape (N, D)."""
        return np.asarray(self.to_domain.sum(axis=1), np.int64)

    def _slots(self, hit_nk: NDArray[np.bool_]) -> Ints:
        """The choices that are hit, in ascending order, then -1: shape (n, k)."""
        order = np.argsort(~hit_nk, axis=1, kind="stable")
        return np.where(np.take_along_axis(hit_nk, order, axis=1), order, -1)

    def own(self, member: int) -> RowSet:
        """The tokens of a member before anything is sent."""
        count = int((self.choices[member, :, 0] >= 0).sum())
        slots = np.broadcast_to(np.arange(self.top_k), (count, self.top_k))
        return RowSet(np.full(count, member), np.arange(count), slots)

    def to_ranks(self, member: int) -> RowSet:
        """The rows that `member` sends if tokens go directly to their ranks."""
        if self.dedup:
            target, tok = np.nonzero(self.to_rank[member].T)
            return RowSet(np.full(len(tok), member), tok, self._slots(self.dest[member, tok] == target[:, None]))
        flat = self.dest[member].ravel()
        chosen = np.argsort(flat, kind="stable")[int((flat < 0).sum()) :]
        tok, slot = np.divmod(chosen, self.top_k)
        return RowSet(np.full(len(tok), member), tok, slot[:, None])

    def at_rank(self, member: int) -> RowSet:
        """The rows that `member` receives if tokens go directly to their ranks."""
        if self.dedup:
            src, tok = np.nonzero(self.to_rank[:, :, member])
            return RowSet(src, tok, self._slots(self.dest[src, tok] == member))
        src, tok, slot = np.nonzero(self.dest == member)
        return RowSet(src, tok, slot[:, None])

    def to_proxies(self, member: int) -> RowSet:
        """The rows that `member` sends if every token goes once to each of its domains."""
        target, tok = np.nonzero(self.to_domain[member].T)
        return RowSet(
            np.full(len(tok), member), tok, self._slots(self.domain_of_choice[member, tok] == target[:, None])
        )

    def at_proxy(self, member: int, peers: Ints) -> RowSet:
        """The rows that `member` receives then from its `peers`, one in each domain."""
        domain = self.domains[member]
        peer, tok = np.nonzero(self.to_domain[peers][:, :, domain])
        src = peers[peer]
        return RowSet(src, tok, self._slots(self.domain_of_choice[src, tok] == domain))

    def from_proxy(self, arrived: RowSet, member: int) -> RowSet:
        """The rows that a proxy passes on to `member`, of those that `arrived`."""
        some = arrived.take(self.to_rank[arrived.src, arrived.tok, member])
        return replace(some, slots=self._slots(self.dest[some.src, some.tok] == member))


def joined(parts: list[RowSet]) -> RowSet:
    """The rows of all parts, one part after the other."""
    return RowSet(
        src=np.concatenate([part.src for part in parts]),
        tok=np.concatenate([part.tok for part in parts]),
        slots=np.concatenate([part.slots for part in parts]),
    )


def padded(rows: RowSet, counts: Ints, capacity: int) -> RowSet:
    """The rows for (or from) each peer, `counts` each, followed by padding up to `capacity`."""
    index = np.concatenate([np.arange(count) + peer * capacity for peer, count in enumerate(counts.tolist())])
    total = capacity * len(counts)
    src, tok, slots = np.full(total, -1), np.zeros(total, np.int64), np.full((total, rows.slots.shape[1]), -1)
    src[index], tok[index], slots[index] = rows.src, rows.tok, rows.slots
    return RowSet(src, tok, slots)


class LayerRows:
    """The rows of all expert-parallel groups of a job for one routing.

    Args:
        choices: experts of all ranks' tokens, shape (W, T, k).
        experts: E.
        placement: the ranks that share experts.
        dedup: see `GroupRows`.
    """

    def __init__(self, choices: Choices, experts: int, placement: ExpertPlacement, *, dedup: bool) -> None:
        """Compute the rows of every group."""
        self.placement = placement
        self.groups = [
            GroupRows(choices[ranks], experts, domains, dedup=dedup)
            for ranks, domains in zip(placement.groups, placement.domains, strict=True)
        ]

    def own(self, rank: int) -> RowSet:
        """The tokens of a rank, before anything is sent."""
        g, member = self.placement.group_and_member(rank)
        return self.groups[g].own(member)

    @property
    def flat_rows(self) -> Ints:
        """Rows from member to member if tokens go directly to their ranks: shape (G, N, N)."""
        return np.stack([group.rank_rows if group.dedup else group.selection_rows for group in self.groups])

    def flat(self, capacity: int = 0) -> list[Hop]:
        """One hop, directly to the ranks; with a capacity every pair exchanges that many rows."""
        rows_GNN, placement = self.flat_rows, self.placement

        def sent(rank: int) -> RowSet:
            g, member = placement.group_and_member(rank)
            rows = self.groups[g].to_ranks(member)
            return padded(rows, rows_GNN[g, member], capacity) if capacity else rows

        def received(rank: int) -> RowSet:
            g, member = placement.group_and_member(rank)
            rows = self.groups[g].at_rank(member)
            return padded(rows, rows_GNN[g, :, member], capacity) if capacity else rows

        group = self.groups[0]
        fan_out = min(group.top_k, group.members) if group.dedup else group.top_k
        moved_GNN = np.full_like(rows_GNN, capacity) if capacity else rows_GNN
        return [Hop("", placement.groups, moved_GNN, sent, received, fan_out)]

    def hierarchical(self) -> list[Hop]:
        """Two hops: to the proxy in each domain, then inside the domain.

        The proxy is the member at the sender's position in the domain. A token is sent to each domain once.
        """
        placement, members_GDL = self.placement, self.placement.by_domain
        ranks_GDL = np.take_along_axis(
            placement.groups[:, None, :], members_GDL.reshape(len(members_GDL), 1, -1), axis=2
        )
        ranks_GDL = ranks_GDL.reshape(members_GDL.shape)
        top_k, (_, domains, local) = self.groups[0].top_k, members_GDL.shape

        def locate(rank: int) -> tuple[GroupRows, int, int, int]:
            g, d, position = (int(x[0]) for x in np.nonzero(ranks_GDL == rank))
            return self.groups[g], g, d, position

        def arrived(rank: int) -> RowSet:
            group, g, d, position = locate(rank)
            return group.at_proxy(int(members_GDL[g, d, position]), members_GDL[g, :, position])

        def passed_on(rank: int) -> RowSet:
            group, g, d, _ = locate(rank)
            rows = arrived(rank)
            return joined([group.from_proxy(rows, int(m)) for m in members_GDL[g, d]])

        def delivered(rank: int) -> RowSet:
            group, g, d, position = locate(rank)
            me = int(members_GDL[g, d, position])
            return joined([group.from_proxy(arrived(int(r)), me) for r in ranks_GDL[g, d]])

        def leaving(rank: int) -> RowSet:
            group, g, d, position = locate(rank)
            return group.to_proxies(int(members_GDL[g, d, position]))

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
    """Rows that each proxy passes on inside its domain, shape (D, L, L): those of all sources at its position."""
    rows_DLDL = group.rank_rows[members_DL.ravel()][:, members_DL.ravel()].reshape(*members_DL.shape, *members_DL.shape)
    return np.asarray(rows_DLDL.sum(axis=0).transpose(1, 0, 2), np.int64)
