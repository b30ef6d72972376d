"""The phases a schedule is made of: who sends what to whom.

All are frozen and hold NumPy arrays, so that a schedule of 8,192 ranks is a few hundred kilobytes. A phase names the
buffers it reads and writes; a schedule says how large they are. Lengths and offsets of a `Collective` and of a
`Local` are in elements, those of an `AllToAllV` and an `Exchange` in bytes, as the libraries below have them.

Names carry shapes: G groups, N members of a group, F flows, R ranks.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ncclbench.schedule.dtypes import Redop
from ncclbench.schedule.row_work import RowWork

Ints = NDArray[np.int64]


class Op(StrEnum):
    """Collective operations, with the field's names."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    BROADCAST = "broadcast"
    REDUCE = "reduce"
    ALL_TO_ALL = "all_to_all"
    GATHER = "gather"
    SCATTER = "scatter"
    BARRIER = "barrier"


# What each op reads and writes on a rank, in units of the phase's `count`: "1" a shard, "n" one shard a member.
READS_ALL_SHARDS = frozenset({Op.REDUCE_SCATTER, Op.ALL_TO_ALL, Op.SCATTER})
WRITES_ALL_SHARDS = frozenset({Op.ALL_GATHER, Op.ALL_TO_ALL, Op.GATHER})
REDUCING = frozenset({Op.ALL_REDUCE, Op.REDUCE_SCATTER, Op.REDUCE})


def frozen_ints(values: ArrayLike, ndim: int, name: str) -> Ints:
    """`values` as an unwritable int64 array of `ndim` dimensions; a builder's mistake is a ValueError."""
    array = np.array(values, dtype=np.int64)
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {array.shape}")
    array.setflags(write=False)
    return array


def _check_groups(groups_GN: Ints, label: str) -> None:
    if groups_GN.size == 0:
        raise ValueError(f"{label}: no groups")
    if groups_GN.min() < 0:
        raise ValueError(f"{label}: negative rank in groups")
    if len(np.unique(groups_GN)) != groups_GN.size:
        raise ValueError(f"{label}: groups must be disjoint, and a rank may stand in its group once")


@dataclass(frozen=True, eq=False)
class Collective:
    """One op over disjoint groups, all groups at once.

    Attributes:
        label: the phase's name in samples and records.
        op: what every group does.
        groups: ranks, shape (G, N); the order of a group's members is the order of its shards.
        count: elements a rank contributes or receives: the whole buffer for all_reduce, broadcast and reduce,
            one shard for the others.
        root: position of the root *in its group*, for the rooted ops.
        redop: for the reducing ops.
        read: name of the buffer that is sent.
        write: name of the buffer that is received into; equal to `read` for an in-place op.
        persistent: planned once and only started each time (MPI-4); a transport that has no such thing is `Unable`.
        overlap: started, and waited for later, so that a rank can compute in between; a transport that cannot do that
            is `Unable`.
    """

    label: str
    op: Op
    groups: Ints
    count: int
    root: int = 0
    redop: Redop = Redop.SUM
    read: str = "send"
    write: str = "recv"
    persistent: bool = False
    overlap: bool = False

    def __post_init__(self) -> None:
        """Freeze the arrays and refuse what no library could run."""
        object.__setattr__(self, "op", Op(self.op))
        object.__setattr__(self, "redop", Redop(self.redop))
        object.__setattr__(self, "groups", frozen_ints(self.groups, 2, "groups"))
        _check_groups(self.groups, self.label)
        if self.count < 1 and self.op is not Op.BARRIER:
            raise ValueError(f"{self.label}: count must be positive, got {self.count}")
        if not 0 <= self.root < self.members:
            raise ValueError(f"{self.label}: root {self.root} is not in a group of {self.members}")

    @property
    def members(self) -> int:
        """N, the size of every group."""
        return int(self.groups.shape[1])

    @property
    def read_count(self) -> int:
        """Elements read on a rank."""
        if self.op is Op.BARRIER:
            return 0
        return self.count * (self.members if self.op in READS_ALL_SHARDS else 1)

    @property
    def write_count(self) -> int:
        """Elements written on a rank."""
        if self.op is Op.BARRIER:
            return 0
        return self.count * (self.members if self.op in WRITES_ALL_SHARDS else 1)


@dataclass(frozen=True, eq=False)
class AllToAllV:
    """An all-to-all of uneven splits: ``rows[g, i, j]`` rows go from member i to member j of group g.

    A rank's send buffer holds its rows ordered by destination, its receive buffer by source, both without gaps.

    Attributes:
        label: the phase's name in samples and records.
        groups: ranks, shape (G, N).
        rows: shape (G, N, N).
        row_bytes: bytes a row.
        read: name of the buffer that is sent.
        write: name of the buffer that is received into.
    """

    label: str
    groups: Ints
    rows: Ints
    row_bytes: int
    read: str = "send"
    write: str = "recv"

    def __post_init__(self) -> None:
        """Freeze the arrays and refuse what no library could run."""
        object.__setattr__(self, "groups", frozen_ints(self.groups, 2, "groups"))
        object.__setattr__(self, "rows", frozen_ints(self.rows, 3, "rows"))
        _check_groups(self.groups, self.label)
        groups, members = self.groups.shape
        if self.rows.shape != (groups, members, members):
            raise ValueError(f"{self.label}: rows must be {(groups, members, members)}, got {self.rows.shape}")
        if self.rows.min() < 0 or self.row_bytes < 1:
            raise ValueError(f"{self.label}: rows must not be negative, and a row has at least one byte")
        if self.read == self.write:
            raise ValueError(f"{self.label}: an all-to-all of uneven splits cannot be in place")

    def splits(self, group: int, member: int) -> tuple[Ints, Ints]:
        """Bytes that `member` sends to, and receives from, each member of its group: two arrays of shape (N,)."""
        return self.rows[group, member] * self.row_bytes, self.rows[group, :, member] * self.row_bytes


@dataclass(frozen=True, eq=False)
class Exchange:
    """One round of point-to-point flows, all at once. A flow from a rank to itself is a local copy.

    In place, no flow may land on bytes that its rank sends in the same round.

    Attributes:
        label: the phase's name in samples and records.
        src: sending ranks, shape (F,).
        dst: receiving ranks, shape (F,).
        nbytes: bytes a flow, shape (F,) or one number for all.
        send_offset: where a flow starts in the sender's buffer, bytes, shape (F,) or one number.
        recv_offset: where a flow lands in the receiver's buffer, bytes, shape (F,) or one number.
        read: name of the buffer that is sent.
        write: name of the buffer that is received into.
    """

    label: str
    src: Ints
    dst: Ints
    nbytes: Ints
    send_offset: Ints = field(default_factory=lambda: np.zeros(1, np.int64))
    recv_offset: Ints = field(default_factory=lambda: np.zeros(1, np.int64))
    read: str = "send"
    write: str = "recv"

    def __post_init__(self) -> None:
        """Freeze the arrays, spread single numbers over all flows, and refuse flows that overlap at a receiver."""
        flows = len(frozen_ints(self.src, 1, "src"))
        for name in ("src", "dst", "nbytes", "send_offset", "recv_offset"):
            array = np.broadcast_to(np.array(getattr(self, name), np.int64), (flows,))
            object.__setattr__(self, name, frozen_ints(array, 1, name))
        if flows == 0:
            raise ValueError(f"{self.label}: no flows")
        if min(self.src.min(), self.dst.min(), self.send_offset.min(), self.recv_offset.min()) < 0:
            raise ValueError(f"{self.label}: negative rank or offset")
        if self.nbytes.min() < 1:
            raise ValueError(f"{self.label}: a flow has at least one byte")
        order = np.lexsort((self.recv_offset, self.dst))
        dst, start = self.dst[order], self.recv_offset[order]
        end = start + self.nbytes[order]
        if np.any((dst[1:] == dst[:-1]) & (start[1:] < end[:-1])):
            raise ValueError(f"{self.label}: two flows land on the same bytes of one rank")
        if self.read == self.write and self._overwrites_a_source():
            raise ValueError(
                f"{self.label}: a flow lands on bytes of {self.read!r} that another sends at the same time"
            )

    def _overwrites_a_source(self) -> bool:
        """Whether any rank receives where it also sends from: in place, what is sent would depend on who is faster."""
        starts, ends = self.recv_offset, self.recv_offset + self.nbytes
        order = np.lexsort((starts, self.dst))
        dst, starts, ends = self.dst[order], starts[order], ends[order]
        # Where flows land they do not overlap, so of those on a rank that begin before a source ends, the last one
        # reaches furthest. Offsets are replaced by their place among all, so that rank and offset fit one number.
        places = np.unique(np.concatenate([starts, self.send_offset + self.nbytes]))
        landing = dst * len(places) + np.searchsorted(places, starts)
        sources = self.src * len(places) + np.searchsorted(places, self.send_offset + self.nbytes)
        last = np.searchsorted(landing, sources) - 1  # the last that begins before the source ends, if on its rank
        return bool(np.any((last >= 0) & (dst[last] == self.src) & (ends[last] > self.send_offset)))


class Kernel(StrEnum):
    """What a `Local` phase does on a rank's own buffers."""

    COPY = "copy"
    GATHER_ROWS = "gather_rows"
    REDUCE_CHUNKS = "reduce_chunks"


@dataclass(frozen=True, eq=False)
class Local:
    """Work on a rank's own buffers between phases; every rank does it.

    - ``copy``: ``write[:count] = read[:count]``.
    - ``gather_rows``: row i of `write` is row ``rows[rank, i]`` of `read`; a row has `count` elements. This is
      how an expert-parallel dispatch packs its tokens by destination.
    - ``reduce_chunks``: `write[:count]` is the sum of the `chunks` consecutive chunks of `count` elements of `read`.

    Attributes:
        label: the phase's name in samples and records.
        kernel: which of the above.
        count: elements of the piece that the kernel works on.
        rows: for ``gather_rows``, shape (R, rows written).
        chunks: for ``reduce_chunks``, how many.
        read: name of the buffer that is read.
        write: name of the buffer that is written.
    """

    label: str
    kernel: Kernel
    count: int
    rows: Ints = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    chunks: int = 1
    read: str = "send"
    write: str = "recv"

    def __post_init__(self) -> None:
        """Freeze the arrays and refuse what has no meaning."""
        object.__setattr__(self, "kernel", Kernel(self.kernel))
        object.__setattr__(self, "rows", frozen_ints(self.rows, 2, "rows"))
        if self.count < 1 or self.chunks < 1:
            raise ValueError(f"{self.label}: count and chunks must be positive")
        if self.read == self.write:
            raise ValueError(f"{self.label}: a local phase reads one buffer and writes another")
        if self.kernel is Kernel.GATHER_ROWS and (self.rows.size == 0 or self.rows.min() < 0):
            raise ValueError(f"{self.label}: gather_rows needs the rows of every rank")

    @cached_property
    def read_count(self) -> int:
        """Elements of `read` that are touched on the rank that touches most."""
        if self.kernel is Kernel.GATHER_ROWS:
            return self.count * (int(self.rows.max()) + 1)
        return self.count * self.chunks

    @property
    def write_count(self) -> int:
        """Elements written on every rank."""
        return self.count * (self.rows.shape[1] if self.kernel is Kernel.GATHER_ROWS else 1)


@dataclass(frozen=True, eq=False)
class Concurrent:
    """Branches of phases on separate communicators and streams at the same time.

    No branch may write a buffer that another one reads or writes, so the result does not depend on their order.

    Attributes:
        label: the phase's name in samples and records.
        branches: one tuple of phases a branch; a branch's phases run in order.
        names: of the branches, where each is to be timed by itself too: a column ``label.name`` in samples. On the
            host only, where a branch has a thread.
    """

    label: str
    branches: "tuple[tuple[SimplePhase, ...], ...]"
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse branches that race."""
        if not self.branches or not all(self.branches):
            raise ValueError(f"{self.label}: a branch without phases")
        if self.names and (len(self.names) != len(self.branches) or len(set(self.names)) != len(self.names)):
            raise ValueError(f"{self.label}: every branch needs a name of its own, got {self.names}")
        for i, one in enumerate(self.branches):
            written = {phase.write for phase in one}
            for j, other in enumerate(self.branches):
                if i != j and written & {name for phase in other for name in (phase.read, phase.write)}:
                    raise ValueError(f"{self.label}: branch {i} writes what branch {j} uses")


SimplePhase: TypeAlias = Collective | AllToAllV | Exchange | Local | RowWork
Phase: TypeAlias = SimplePhase | Concurrent


def flatten(phases: tuple[Phase, ...]) -> tuple[SimplePhase, ...]:
    """The phases one after the other, branches too: same contents, same bytes, since branches do not race."""
    flat: list[SimplePhase] = []
    for phase in phases:
        if isinstance(phase, Concurrent):
            flat.extend(step for branch in phase.branches for step in branch)
        else:
            flat.append(phase)
    return tuple(flat)
