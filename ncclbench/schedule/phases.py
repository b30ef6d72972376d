"""The phases of a schedule: which rank sends what to which rank.

All are frozen and use NumPy arrays, so that a schedule of 8,192 ranks takes a few hundred kilobytes. A phase names the
buffers that it reads and writes; the schedule has their sizes. Lengths and offsets of a `Collective` and of a `Local`
are in elements, those of an `AllToAllV` and an `Exchange` in bytes, as in the libraries below.

Code that depends on the kind of phase is one function per use: a ``match`` over `SimplePhase`, or over `Phase`, that
ends with ``assert_never``. A kind without a case is then a type error.

Names carry shapes: G groups, N members of a group, F flows, R ranks.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TypeAlias, assert_never

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ncclbench.schedule.dtypes import Redop
from ncclbench.schedule.row_work import RowWork

Ints = NDArray[np.int64]


class Op(StrEnum):
    """Collective operations."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    BROADCAST = "broadcast"
    REDUCE = "reduce"
    ALL_TO_ALL = "all_to_all"
    GATHER = "gather"
    SCATTER = "scatter"
    BARRIER = "barrier"


# Ops that read, or write, one shard per member on a rank rather than one shard; a shard is the phase's `count`.
READS_ALL_SHARDS = frozenset({Op.REDUCE_SCATTER, Op.ALL_TO_ALL, Op.SCATTER})
WRITES_ALL_SHARDS = frozenset({Op.ALL_GATHER, Op.ALL_TO_ALL, Op.GATHER})
REDUCING = frozenset({Op.ALL_REDUCE, Op.REDUCE_SCATTER, Op.REDUCE})


def frozen_ints(values: ArrayLike, ndim: int, name: str) -> Ints:
    """`values` as a read-only int64 array.

    Raises:
        ValueError: if it does not have `ndim` dimensions.
    """
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
        label: name of the phase in samples and records.
        op: the operation of every group.
        groups: ranks, shape (G, N); the order of a group's members is the order of its shards.
        count: elements that a rank contributes or receives: the whole buffer for all_reduce, broadcast and reduce, one
            shard for the others.
        root: position of the root *in its group*, for the rooted ops.
        redop: reduction, for the reducing ops.
        read: name of the send buffer.
        write: name of the receive buffer; equal to `read` for an in-place op.
        persistent: plan the call once, and only start it each time (MPI-4). A transport that cannot is `Unable`.
        overlap: start the call and wait for it later, so that a rank can compute in between. A transport that cannot is
            `Unable`.
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
        """Freeze the arrays, and refuse what no library can run."""
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
        """Elements read per rank."""
        if self.op is Op.BARRIER:
            return 0
        return self.count * (self.members if self.op in READS_ALL_SHARDS else 1)

    @property
    def write_count(self) -> int:
        """Elements written per rank."""
        if self.op is Op.BARRIER:
            return 0
        return self.count * (self.members if self.op in WRITES_ALL_SHARDS else 1)


@dataclass(frozen=True, eq=False)
class AllToAllV:
    """An all-to-all of uneven splits: ``rows[g, i, j]`` rows go from member i to member j of group g.

    The rows of a send buffer are ordered by destination, those of a receive buffer by source, both without gaps.

    Attributes:
        label: name of the phase in samples and records.
        groups: ranks, shape (G, N).
        rows: shape (G, N, N).
        row_bytes: bytes per row.
        read: name of the send buffer.
        write: name of the receive buffer.
    """

    label: str
    groups: Ints
    rows: Ints
    row_bytes: int
    read: str = "send"
    write: str = "recv"

    def __post_init__(self) -> None:
        """Freeze the arrays, and refuse what no library can run."""
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

    In place, no flow may overwrite bytes that its receiver sends in the same round.

    Attributes:
        label: name of the phase in samples and records.
        src: sending ranks, shape (F,).
        dst: receiving ranks, shape (F,).
        nbytes: bytes per flow, shape (F,) or one number for all.
        send_offset: first byte of each flow in the sender's buffer, shape (F,) or one number.
        recv_offset: first byte of each flow in the receiver's buffer, shape (F,) or one number.
        read: name of the send buffer.
        write: name of the receive buffer.
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
        """Freeze the arrays, broadcast single numbers to all flows, and refuse flows that overlap at a receiver."""
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
        """Whether any rank receives into bytes that it also sends, so that the data sent would depend on timing."""
        starts, ends = self.recv_offset, self.recv_offset + self.nbytes
        order = np.lexsort((starts, self.dst))
        dst, starts, ends = self.dst[order], starts[order], ends[order]
        # Received flows do not overlap. So of those on a rank that begin before a source ends, the last one ends last.
        # Offsets are replaced by their index among all offsets, so that rank and offset fit into one number.
        known = np.unique(np.concatenate([starts, self.send_offset + self.nbytes]))
        received = dst * len(known) + np.searchsorted(known, starts)
        sources = self.src * len(known) + np.searchsorted(known, self.send_offset + self.nbytes)
        last = np.searchsorted(received, sources) - 1  # the last that begins before the source ends, if on its rank
        return bool(np.any((last >= 0) & (dst[last] == self.src) & (ends[last] > self.send_offset)))


class Kernel(StrEnum):
    """Kinds of work of a `Local` phase."""

    COPY = "copy"
    GATHER_ROWS = "gather_rows"
    REDUCE_CHUNKS = "reduce_chunks"


@dataclass(frozen=True, eq=False)
class Local:
    """Work of every rank on its own buffers.

    - ``copy``: ``write[:count] = read[:count]``.
    - ``gather_rows``: row i of `write` is row ``rows[rank, i]`` of `read`; a row has `count` elements. An
      expert-parallel dispatch packs its tokens by destination in this way.
    - ``reduce_chunks``: `write[:count]` is the sum of the `chunks` consecutive chunks of `count` elements of `read`.

    Attributes:
        label: name of the phase in samples and records.
        kernel: one of the above.
        count: elements per copy, row or chunk.
        rows: for ``gather_rows``, shape (R, rows written).
        chunks: for ``reduce_chunks``, the number of chunks.
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
        """Freeze the arrays, and refuse what has no meaning."""
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
        """Elements of `read` that are used, on the rank that uses most."""
        if self.kernel is Kernel.GATHER_ROWS:
            return self.count * (int(self.rows.max()) + 1)
        return self.count * self.chunks

    @property
    def write_count(self) -> int:
        """Elements written per rank."""
        return self.count * (self.rows.shape[1] if self.kernel is Kernel.GATHER_ROWS else 1)


@dataclass(frozen=True, eq=False)
class Concurrent:
    """Branches of phases on separate communicators and streams at the same time.

    No branch may write a buffer that another branch reads or writes, so the result does not depend on their order.

    Attributes:
        label: name of the phase in samples and records.
        branches: one tuple of phases per branch; the phases of a branch run in order.
        names: names of the branches, if each branch is timed by itself too, as a column ``label.name`` in samples. This
            works on the host only, where a branch has a thread.
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
    """The phases one after the other, with the branches of concurrent ones in order.

    Contents and bytes stay the same, since branches do not race.
    """
    return tuple(step for phase in phases for step in _steps(phase))


def _steps(phase: Phase) -> tuple[SimplePhase, ...]:
    match phase:
        case Concurrent():
            return tuple(step for branch in phase.branches for step in branch)
        case Collective() | AllToAllV() | Exchange() | Local() | RowWork():
            return (phase,)
        case _:
            assert_never(phase)
