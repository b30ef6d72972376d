"""The origin of the contents of a buffer: a schedule traced backwards, one rank at a time.

No data is moved and no rank is started. For each segment of a buffer after the last phase, `trace` returns the ranks
whose inputs it contains, and how they were reduced. The cost per rank is that of the rank's own part of the schedule,
so a trace works for 8,192 ranks as for 2.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from typing import TypeAlias, assert_never

import numpy as np

from ncclbench.schedule.dtypes import Redop
from ncclbench.schedule.phases import (
    READS_ALL_SHARDS,
    REDUCING,
    WRITES_ALL_SHARDS,
    AllToAllV,
    Collective,
    Exchange,
    Kernel,
    Local,
    Op,
    SimplePhase,
    flatten,
)
from ncclbench.schedule.row_work import RowWork
from ncclbench.schedule.schedule import Schedule


@dataclass(frozen=True)
class InputElements:
    """Elements of an input as filled, from element `start` on."""

    rank: int
    buffer: str
    start: int


@dataclass(frozen=True)
class Reduced:
    """The element-wise reduction of `terms`."""

    redop: Redop
    terms: "tuple[Term, ...]"


class NoInput(Enum):
    """Contents that come from no input."""

    CANARY = "canary"  # nothing writes here, so the canary must be intact
    UNSPECIFIED = "unspecified"  # the library may leave anything, as a reduce does on ranks other than the root


Term: TypeAlias = InputElements | Reduced | NoInput


@dataclass(frozen=True)
class Segment:
    """Elements `start` to `stop` of a buffer contain `term`."""

    start: int
    stop: int
    term: Term


@dataclass(frozen=True)
class Piece:
    """The write of one phase to elements `start` to `stop`: from one source, or the reduction of several.

    Attributes:
        start: first element written.
        stop: one past the last.
        sources: rank and first element of each source in the phase's read buffer; empty for unspecified contents.
        redop: the reduction of several sources.
    """

    start: int
    stop: int
    sources: tuple[tuple[int, int], ...]
    redop: Redop | None = None


def shift(term: Term, by: int) -> Term:
    """`term`, moved by `by` elements."""
    match term:
        case InputElements():
            return replace(term, start=term.start + by)
        case Reduced():
            return Reduced(term.redop, tuple(shift(inner, by) for inner in term.terms))
        case NoInput():
            return term
        case _:
            assert_never(term)


def trace(schedule: Schedule, rank: int, buffer: str) -> list[Segment]:
    """The contents of `buffer` of `rank` after the last phase: segments in order, without gaps."""
    stop = schedule.buffers[buffer] // schedule.dtype.itemsize
    return _trace(schedule, flatten(schedule.phases), rank, buffer, 0, stop)


def _trace(
    schedule: Schedule, phases: tuple[SimplePhase, ...], rank: int, buffer: str, start: int, stop: int
) -> list[Segment]:
    """Contents of elements `start` to `stop` after `phases`."""
    done: list[Segment] = []
    pending = [(start, stop)]
    for k in range(len(phases) - 1, -1, -1):
        if not pending:
            break
        if phases[k].write != buffer:
            continue
        for piece in pieces(phases[k], rank, schedule.dtype.itemsize):
            pending, hits = _split(pending, piece)
            for low, high in hits:
                done += _resolve(schedule, phases[:k], phases[k].read, piece, low, high)
    for low, high in pending:
        term: Term = InputElements(rank, buffer, low) if buffer in schedule.inputs else NoInput.CANARY
        done.append(Segment(low, high, term))
    return sorted(done, key=lambda segment: segment.start)


def _split(pending: list[tuple[int, int]], piece: Piece) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The parts of `pending` that the piece leaves untouched, and those that it writes."""
    rest, hits = [], []
    for low, high in pending:
        a, b = max(low, piece.start), min(high, piece.stop)
        if a >= b:
            rest.append((low, high))
            continue
        hits.append((a, b))
        rest += [part for part in ((low, a), (b, high)) if part[0] < part[1]]
    return rest, hits


def _resolve(
    schedule: Schedule, before: tuple[SimplePhase, ...], read: str, piece: Piece, low: int, high: int
) -> list[Segment]:
    """Contents of elements `low` to `high`, which are inside `piece`."""
    if not piece.sources:
        return [Segment(low, high, NoInput.UNSPECIFIED)]
    traced = []
    for source, first in piece.sources:
        offset = first - piece.start  # from this rank's elements to the source's
        found = _trace(schedule, before, source, read, low + offset, high + offset)
        traced.append([replace(seg, start=seg.start - offset, stop=seg.stop - offset) for seg in found])
    if piece.redop is None:
        return traced[0]
    return _reduce(traced, piece.redop)


def _reduce(traced: list[list[Segment]], redop: Redop) -> list[Segment]:
    """One list of segments from several that cover the same elements, cut at every edge of any of them."""
    cuts = sorted({edge for segments in traced for seg in segments for edge in (seg.start, seg.stop)})
    cursors = [0] * len(traced)
    joined = []
    for low, high in pairwise(cuts):
        terms = []
        for k, segments in enumerate(traced):
            while segments[cursors[k]].stop <= low:
                cursors[k] += 1
            seg = segments[cursors[k]]
            terms.append(shift(seg.term, low - seg.start))
        unknown = NoInput.UNSPECIFIED in terms
        joined.append(Segment(low, high, NoInput.UNSPECIFIED if unknown else Reduced(redop, tuple(terms))))
    return joined


def pieces(phase: SimplePhase, rank: int, itemsize: int) -> Iterator[Piece]:
    """The writes of `phase` on `rank`, in elements of `itemsize` bytes.

    Raises:
        ValueError: for work on rows, which is not traced; its schedule has `contents`.
    """
    match phase:
        case Collective():
            group, member = _membership(phase, rank)
            if group >= 0:
                yield from _collective_pieces(phase, group, member)
        case AllToAllV():
            group, member = _membership(phase, rank)
            if group >= 0:
                yield from _uneven_pieces(phase, group, member, itemsize)
        case Exchange():
            yield from _exchange_pieces(phase, rank, itemsize)
        case Local():
            yield from _local_pieces(phase, rank)
        case RowWork():
            raise ValueError(f"{phase.label}: work on rows is not traced; its schedule says what it expects")
        case _:
            assert_never(phase)


def _exchange_pieces(phase: Exchange, rank: int, itemsize: int) -> Iterator[Piece]:
    for k in np.flatnonzero(phase.dst == rank):
        start, first = int(phase.recv_offset[k]) // itemsize, int(phase.send_offset[k]) // itemsize
        yield Piece(start, start + int(phase.nbytes[k]) // itemsize, ((int(phase.src[k]), first),))


def _membership(phase: Collective | AllToAllV, rank: int) -> tuple[int, int]:
    """The group of `rank` and its position there, or (-1, -1)."""
    where = np.argwhere(phase.groups == rank)
    return (int(where[0, 0]), int(where[0, 1])) if len(where) else (-1, -1)


def _collective_pieces(phase: Collective, group: int, member: int) -> Iterator[Piece]:
    ranks, count, is_root = phase.groups[group].tolist(), phase.count, member == phase.root
    if phase.op is Op.BARRIER or (phase.op is Op.GATHER and not is_root):
        return
    # Each op reads either the first shard of the sender's buffer, or the one for this member.
    first = member * count if phase.op in READS_ALL_SHARDS else 0
    if phase.op in REDUCING:
        specified = is_root or phase.op is not Op.REDUCE
        yield Piece(0, count, tuple((r, first) for r in ranks) if specified else (), phase.redop)
    elif phase.op in WRITES_ALL_SHARDS:
        for j, r in enumerate(ranks):
            yield Piece(j * count, (j + 1) * count, ((r, first),))
    else:
        yield Piece(0, count, ((ranks[phase.root], first),))


def _uneven_pieces(phase: AllToAllV, group: int, member: int, itemsize: int) -> Iterator[Piece]:
    elements_NN = phase.rows[group] * (phase.row_bytes // itemsize)
    first_N = elements_NN[:, :member].sum(axis=1)
    start = 0
    for j, r in enumerate(phase.groups[group]):
        stop = start + int(elements_NN[j, member])
        if stop > start:
            yield Piece(start, stop, ((int(r), int(first_N[j])),))
        start = stop


def _local_pieces(phase: Local, rank: int) -> Iterator[Piece]:
    count = phase.count
    match phase.kernel:
        case Kernel.COPY:
            yield Piece(0, count, ((rank, 0),))
        case Kernel.REDUCE_CHUNKS:
            yield Piece(0, count, tuple((rank, k * count) for k in range(phase.chunks)), Redop.SUM)
        case Kernel.GATHER_ROWS:
            for i, row in enumerate(phase.rows[rank]):
                yield Piece(i * count, (i + 1) * count, ((rank, int(row) * count),))
        case _:
            assert_never(phase.kernel)
