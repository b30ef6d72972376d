"""Where the contents of a buffer come from: a schedule traced backwards, one rank at a time.

No data is moved and no rank is started. `trace` answers, for a stretch of one rank's buffer after the last phase,
which ranks' inputs it holds and how they were reduced. One rank's answer costs no more than its own share of the
schedule, so it works for 8,192 ranks as for 2.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from typing import TypeAlias

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
from ncclbench.schedule.schedule import Schedule


@dataclass(frozen=True)
class Given:
    """Elements of an input as it was filled, from `start` on."""

    rank: int
    buffer: str
    start: int


@dataclass(frozen=True)
class Reduced:
    """The element-wise reduction of `terms`."""

    redop: Redop
    terms: "tuple[Term, ...]"


class Mark(Enum):
    """Contents that come from no input."""

    CANARY = "canary"  # nothing wrote here: the canary must have survived
    UNSPECIFIED = "unspecified"  # the library may leave anything, as a reduce does on ranks other than the root


Term: TypeAlias = Given | Reduced | Mark


@dataclass(frozen=True)
class Segment:
    """Elements `start` to `stop` of a buffer hold `term`."""

    start: int
    stop: int
    term: Term


@dataclass(frozen=True)
class Piece:
    """What one phase writes to elements `start` to `stop`: one source, or the reduction of several.

    Attributes:
        start: first element written.
        stop: one past the last.
        sources: rank and first element of each source in the phase's read buffer; empty for unspecified contents.
        redop: how several sources are joined.
    """

    start: int
    stop: int
    sources: tuple[tuple[int, int], ...]
    redop: Redop | None = None


def shift(term: Term, by: int) -> Term:
    """`term`, `by` elements further on."""
    if isinstance(term, Given):
        return replace(term, start=term.start + by)
    if isinstance(term, Reduced):
        return Reduced(term.redop, tuple(shift(inner, by) for inner in term.terms))
    return term


def trace(schedule: Schedule, rank: int, buffer: str) -> list[Segment]:
    """What `buffer` of `rank` holds after the last phase: segments in order, without gaps."""
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
        term: Term = Given(rank, buffer, low) if buffer in schedule.inputs else Mark.CANARY
        done.append(Segment(low, high, term))
    return sorted(done, key=lambda segment: segment.start)


def _split(pending: list[tuple[int, int]], piece: Piece) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """What of `pending` the piece leaves untouched, and what it hits."""
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
    """Contents of elements `low` to `high`, which lie inside `piece`."""
    if not piece.sources:
        return [Segment(low, high, Mark.UNSPECIFIED)]
    traced = []
    for source, first in piece.sources:
        offset = first - piece.start  # from this rank's elements to the source's
        found = _trace(schedule, before, source, read, low + offset, high + offset)
        traced.append([replace(seg, start=seg.start - offset, stop=seg.stop - offset) for seg in found])
    if piece.redop is None:
        return traced[0]
    return _reduce(traced, piece.redop)


def _reduce(traced: list[list[Segment]], redop: Redop) -> list[Segment]:
    """One list of segments from several that cover the same elements, cut where any of them is cut."""
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
        unknown = Mark.UNSPECIFIED in terms
        joined.append(Segment(low, high, Mark.UNSPECIFIED if unknown else Reduced(redop, tuple(terms))))
    return joined


def pieces(phase: SimplePhase, rank: int, itemsize: int) -> Iterator[Piece]:
    """What `phase` writes on `rank`, in elements of `itemsize` bytes."""
    if isinstance(phase, Collective):
        group, member = _membership(phase, rank)
        if group >= 0:
            yield from _collective_pieces(phase, group, member)
    elif isinstance(phase, AllToAllV):
        group, member = _membership(phase, rank)
        if group >= 0:
            yield from _uneven_pieces(phase, group, member, itemsize)
    elif isinstance(phase, Exchange):
        for k in np.flatnonzero(phase.dst == rank):
            start, first = int(phase.recv_offset[k]) // itemsize, int(phase.send_offset[k]) // itemsize
            yield Piece(start, start + int(phase.nbytes[k]) // itemsize, ((int(phase.src[k]), first),))
    elif isinstance(phase, Local):
        yield from _local_pieces(phase, rank)
    else:
        raise ValueError(f"{phase.label}: work on rows is not traced; its schedule says what it expects")


def _membership(phase: Collective | AllToAllV, rank: int) -> tuple[int, int]:
    """Group and place in it of `rank`, or (-1, -1)."""
    where = np.argwhere(phase.groups == rank)
    return (int(where[0, 0]), int(where[0, 1])) if len(where) else (-1, -1)


def _collective_pieces(phase: Collective, group: int, member: int) -> Iterator[Piece]:
    ranks, count, is_root = phase.groups[group].tolist(), phase.count, member == phase.root
    if phase.op is Op.BARRIER or (phase.op is Op.GATHER and not is_root):
        return
    # Each op takes either the first shard of what it reads, or the one that is meant for this member.
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
    if phase.kernel is Kernel.COPY:
        yield Piece(0, count, ((rank, 0),))
    elif phase.kernel is Kernel.REDUCE_CHUNKS:
        yield Piece(0, count, tuple((rank, k * count) for k in range(phase.chunks)), Redop.SUM)
    else:
        for i, row in enumerate(phase.rows[rank]):
            yield Piece(i * count, (i + 1) * count, ((rank, int(row) * count),))
