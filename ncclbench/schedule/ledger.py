"""The ledger: exact bytes sent and received per rank and link class, counted from the schedule.

For ops whose pairs are given (all_to_all, gather, scatter, exchanges, uneven all-to-alls) the pairs are counted as they
are; bytes that a rank sends to itself are a class of their own (`self`). For ops whose route the library chooses
(all_reduce, all_gather, reduce_scatter, broadcast, reduce) the ledger counts the ring, or the chain, in group order.
This is the bandwidth-optimal volume that bus bandwidth assumes as well. `basis` names which of the two was counted.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict, assert_never

import numpy as np

from ncclbench.schedule.phases import (
    AllToAllV,
    Collective,
    Exchange,
    Ints,
    Local,
    Op,
    Phase,
    SimplePhase,
    flatten,
)
from ncclbench.schedule.rates import GIGA
from ncclbench.schedule.row_work import RowWork
from ncclbench.schedule.schedule import Schedule
from ncclbench.topology import Link, Topology

# Sources, destinations and bytes: three arrays of shape (F,).
Flows = tuple[Ints, Ints, Ints]

# Pairs in memory at once while counting: an all_to_all of 8,192 ranks has 67 million.
_BLOCK_PAIRS = 1 << 22

_RING = frozenset({Op.ALL_REDUCE, Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.BROADCAST, Op.REDUCE})


class LinkData(TypedDict):
    """The bottleneck of one link class, as stored in a record."""

    bottleneck_bytes: int
    bottleneck_gb_per_s: float | None


class LedgerData(TypedDict):
    """A ledger as stored in a record; `docs/formats.md` defines the fields."""

    sent_bytes: dict[str, int]
    bottleneck_bytes: int
    bottleneck_gb_per_s: float | None
    basis: str
    links: NotRequired[dict[str, LinkData]]


@dataclass(frozen=True, eq=False)
class Ledger:
    """Bytes of one phase, or the sum of several.

    Attributes:
        sent: bytes sent, shape (R, number of link classes).
        received: bytes received, same shape.
        basis: ``pairs`` as given, ``ring`` in group order, both joined by a plus, or ``none``.
    """

    sent: Ints
    received: Ints
    basis: str

    @property
    def bottleneck_bytes(self) -> int:
        """The most that any one rank sends or receives over links; bytes that it sends to itself do not count."""
        wire = slice(Link.SELF + 1, None)
        return int(max(self.sent[:, wire].sum(axis=1).max(), self.received[:, wire].sum(axis=1).max()))

    @property
    def link_bottlenecks(self) -> dict[str, int]:
        """The same for each link class that carries bytes; the busiest rank may differ between classes."""
        most = np.maximum(self.sent.max(axis=0), self.received.max(axis=0))
        return {link.label: int(most[link]) for link in Link if link is not Link.SELF and most[link]}

    def __add__(self, other: "Ledger") -> "Ledger":
        """The sum of both."""
        basis = "+".join(sorted({*self.basis.split("+"), *other.basis.split("+")} - {"none"})) or "none"
        return Ledger(self.sent + other.sent, self.received + other.received, basis)

    def as_record(self, seconds: float | None = None) -> LedgerData:
        """Data for a record: bytes sent per link class over all ranks, and the bottleneck with its rate."""
        bottleneck = self.bottleneck_bytes
        return {
            "sent_bytes": {link.label: int(total) for link, total in zip(Link, self.sent.sum(axis=0), strict=True)},
            "bottleneck_bytes": bottleneck,
            "bottleneck_gb_per_s": bottleneck / seconds / GIGA if seconds else None,
            "basis": self.basis,
        }


def rotation_record(ledgers: Sequence[Ledger], seconds: float | None = None) -> LedgerData:
    """Data for a record of all variants of a case, run one after the other in `seconds`.

    The busiest rank may differ between variants, so the bottlenecks of the variants are added, not the bytes per rank.
    """
    record = _total(ledgers).as_record()
    bottleneck = sum(ledger.bottleneck_bytes for ledger in ledgers)
    record["bottleneck_bytes"] = bottleneck
    record["bottleneck_gb_per_s"] = bottleneck / seconds / GIGA if seconds else None
    links: dict[str, int] = {}
    for ledger in ledgers:
        for link, nbytes in ledger.link_bottlenecks.items():
            links[link] = links.get(link, 0) + nbytes
    record["links"] = {
        link: {"bottleneck_bytes": nbytes, "bottleneck_gb_per_s": nbytes / seconds / GIGA if seconds else None}
        for link, nbytes in links.items()
    }
    return record


def phase_ledger(phase: Phase, topology: Topology, itemsize: int) -> Ledger:
    """The bytes of one phase; of a concurrent one, those of all its branches."""
    return _total([_simple_ledger(step, topology, itemsize) for step in flatten((phase,))])


def schedule_ledger(schedule: Schedule, topology: Topology) -> Ledger:
    """The bytes of all phases of one iteration."""
    return _total([phase_ledger(phase, topology, schedule.dtype.itemsize) for phase in schedule.phases])


def _total(ledgers: Iterable[Ledger]) -> Ledger:
    first, *others = ledgers
    return sum(others, first)


def _simple_ledger(phase: SimplePhase, topology: Topology, itemsize: int) -> Ledger:
    shape = (topology.world_size, len(Link))
    sent, received = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for src, dst, nbytes in flows(phase, itemsize):
        link = topology.link_classes(src, dst)
        np.add.at(sent, (src, link), nbytes)
        np.add.at(received, (dst, link), nbytes)
    return Ledger(sent, received, _basis(phase))


def _basis(phase: SimplePhase) -> str:
    match phase:
        case Collective(op=Op.BARRIER) | Local() | RowWork():
            return "none"
        case Collective():
            return "ring" if phase.op in _RING else "pairs"
        case AllToAllV() | Exchange():
            return "pairs"
        case _:
            assert_never(phase)


def flows(phase: SimplePhase, itemsize: int) -> Iterator[Flows]:
    """The phase as point-to-point flows, in blocks of limited size."""
    match phase:
        case Exchange():
            yield phase.src, phase.dst, phase.nbytes
        case AllToAllV():
            for ranks_N, rows_NN in zip(phase.groups, phase.rows, strict=True):
                yield from _matrix_flows(ranks_N, rows_NN * phase.row_bytes)
        case Collective():
            for ranks_N in phase.groups:
                yield from _collective_flows(phase, ranks_N, itemsize)
        case Local() | RowWork():
            return
        case _:
            assert_never(phase)


def _matrix_flows(ranks_N: Ints, bytes_NN: Ints) -> Iterator[Flows]:
    members = len(ranks_N)
    rows = max(1, _BLOCK_PAIRS // members)
    for first in range(0, members, rows):
        block = bytes_NN[first : first + rows]
        src = np.repeat(ranks_N[first : first + rows], members)
        dst = np.tile(ranks_N, len(block))
        yield src, dst, block.ravel()


def _collective_flows(phase: Collective, ranks_N: Ints, itemsize: int) -> Iterator[Flows]:
    members, shard = len(ranks_N), phase.count * itemsize
    root = np.full(members, ranks_N[phase.root])
    shards = np.full(members, shard, np.int64)
    match phase.op:
        case Op.BARRIER:
            return
        case Op.ALL_TO_ALL:
            yield from _matrix_flows(ranks_N, np.broadcast_to(shards, (members, members)))
        case Op.GATHER:
            yield ranks_N, root, shards
        case Op.SCATTER:
            yield root, ranks_N, shards
        case Op.ALL_REDUCE | Op.ALL_GATHER | Op.REDUCE_SCATTER | Op.BROADCAST | Op.REDUCE:
            if members > 1:
                yield ranks_N, np.roll(ranks_N, -1), _ring_bytes(phase, members, itemsize)
        case _:
            assert_never(phase.op)


def _ring_bytes(phase: Collective, members: int, itemsize: int) -> Ints:
    """Bytes that each member sends to the next one in its group, shape (N,)."""
    member_N = np.arange(members)
    if phase.op is Op.ALL_REDUCE:
        # Reduce-scatter, then all-gather around the ring. In the first, member i passes on every chunk except the one
        # that it owns at the end, i + 1; in the second, every chunk except the one that its neighbor owns, i + 2.
        base, extra = divmod(phase.count, members)
        chunks = base + (member_N < extra)
        elements = 2 * phase.count - np.roll(chunks, -1) - np.roll(chunks, -2)
    elif phase.op in (Op.ALL_GATHER, Op.REDUCE_SCATTER):
        elements = np.full(members, (members - 1) * phase.count)
    elif phase.op is Op.BROADCAST:
        elements = np.where(member_N == (phase.root - 1) % members, 0, phase.count)  # the chain ends before the root
    else:
        elements = np.where(member_N == phase.root, 0, phase.count)  # a reduce's chain ends in the root
    return np.asarray(elements * itemsize, dtype=np.int64)
