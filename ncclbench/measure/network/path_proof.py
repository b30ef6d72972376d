"""Proof of the path: did each NIC carry what the ledger says it must have carried?

The counters of every rank's NIC before and after a case are compared with the bytes of its schedules. Libraries choose
paths of their own. A cross-rail flow that hops over NVLink, or a rail whose traffic takes another rail, looks right in
every time and rate; only the port counters show it.

- ``proven``: every NIC carried its bytes, within 5% and the overhead of protocols;
- ``contradicted``: one or more NICs carried less than 95% of them, so the bytes went another way;
- ``unverified``: the counters cannot decide, for the reason given.
"""

from collections.abc import Sequence
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from ncclbench.measure.network.expected_traffic import ExpectedTraffic
from ncclbench.measure.network.lossy_nics import retransmits_by_pair
from ncclbench.measure.network.port_watch import Counted
from ncclbench.schedule.phases import Ints
from ncclbench.store.records import CounterMove, NicMismatch, PathCounters, PathRecord, RailCounters
from ncclbench.topology import Topology
from ncclbench.units import format_bytes

_TOLERANCE = 0.05
# Headers of TCP, IP and Ethernet in frames of 1500 bytes, and acknowledgements of the opposite direction.
_PROTOCOLS = 0.08
# Barriers and samples may share the NIC: bytes per launch, and once per case.
_CONTROL_EACH, _CONTROL_ONCE = 8 << 10, 256 << 10
# Below this multiple of the control bytes, a NIC's counters say nothing about the path.
_ENOUGH = 4
_WRAPS_AT = 1 << 32
_MOST_SHOWN = 16
_MOST_MOVED = 256
_DIRECTIONS = ("sent", "received")

# Of each direction and rank, shape (2, R).
Flags: TypeAlias = NDArray[np.bool_]


def reconcile(
    wanted: ExpectedTraffic, counted: Sequence[Counted], topology: Topology, log: PathRecord | None = None
) -> PathRecord:
    """`log`, which is what NCCL logged of its path, with the proof from the counters.

    ``proof``, ``reason`` (unless proven) and ``counters`` are set.
    """
    log = log or PathRecord()
    slack = _CONTROL_ONCE + _CONTROL_EACH * wanted.launches
    carried = np.array([[(c.sent, c.received)[k] if c.sent is not None else -1 for c in counted] for k in (0, 1)])
    known = carried >= 0
    enough = (wanted.bytes_2R >= _ENOUGH * slack) & known
    short = enough & (carried < (1 - _TOLERANCE) * wanted.bytes_2R)
    long = known & (carried > (1 + _TOLERANCE + _PROTOCOLS) * wanted.bytes_2R + slack)
    proof, reason = _judge(wanted, counted, topology, short, long, enough)
    if wanted.pxn is not None and proof != "contradicted":
        proof, reason = _judge_hop(wanted.pxn, log.pxn, proof, reason)
    mismatches = [
        _mismatch(rank, k, wanted, counted, topology) for k, rank in np.argwhere(short | long)[:_MOST_SHOWN].tolist()
    ]
    moves = [
        CounterMove(rank=rank, port=port, counter=name, by=by)
        for rank, one in enumerate(counted)
        for port, steps in one.health.items()
        for name, by in steps.items()
    ][:_MOST_MOVED]
    retransmits = retransmits_by_pair(counted)
    counters = PathCounters(
        rails=_by_rail(wanted.bytes_2R, carried, topology),
        off=mismatches,
        moved=[*moves, *(retransmits.losses(counted) if retransmits else [])],
        repeats=retransmits.as_record() if retransmits else None,
    )
    return msgspec.structs.replace(log, proof=proof, reason=reason or None, counters=counters)


def _judge(
    wanted: ExpectedTraffic, counted: Sequence[Counted], topology: Topology, short: Flags, long: Flags, enough: Flags
) -> tuple[str, str]:
    """The proof by the counters alone, and its reason."""
    if wanted.reason:
        return "unverified", wanted.reason
    needed = wanted.bytes_2R > 0
    if not needed.any():
        return "unverified", "nothing of this case leaves an NVLink domain"
    wraps = [c.narrow and max(w) >= _WRAPS_AT for c, w in zip(counted, wanted.bytes_2R.T.tolist(), strict=True)]
    if any(wraps):
        return "unverified", f"a counter of 32 bits of rank {wraps.index(True)} wrapped, perhaps more than once"
    if short.any():
        k, rank = np.argwhere(short)[0].tolist()
        more = int(short.any(axis=0).sum()) - 1
        also = f", and {more} more NICs like it" if more else ""
        return "contradicted", _sentence(rank, k, wanted, counted, topology) + also
    unread = [rank for rank, one in enumerate(counted) if one.reason and needed[:, rank].any()]
    if unread:
        return "unverified", f"rank {unread[0]}: {counted[unread[0]].reason}"
    if long.any():
        k, rank = np.argwhere(long)[0].tolist()
        return "unverified", _sentence(rank, k, wanted, counted, topology) + ": other traffic, or sent again"
    if np.any(needed & ~enough):
        least = format_bytes(int(wanted.bytes_2R[needed].min()))
        return "unverified", f"{least} on a NIC is too little to distinguish from control messages"
    return "proven", ""


def _judge_hop(wanted: bool, seen: bool | list[str] | None, proof: str, reason: str) -> tuple[str, str]:
    """The proof with what NCCL logged of PXN.

    If all rails are busy, PXN puts as many bytes on every NIC as the straight path does. Only the log can decide.
    """
    if seen is None:
        why = "NCCL's log does not say whether it hopped over NVLink (PXN), and the counters would be the same"
        return "unverified", reason or why
    if seen != wanted:
        did, should = ("hopped", "had to go straight") if seen else ("went straight", "had to hop")
        return "contradicted", f"NCCL's log says that it {did} where it {should} over NVLink (PXN)"
    return proof, reason


def _mismatch(
    rank: int, k: int, wanted: ExpectedTraffic, counted: Sequence[Counted], topology: Topology
) -> NicMismatch:
    one = counted[rank]
    return NicMismatch(
        rank=rank,
        node=topology.node_names[topology.nodes[rank]],
        rail=int(topology.rails[rank]),
        device=one.device,
        direction=_DIRECTIONS[k],
        expected_bytes=int(wanted.bytes_2R[k, rank]),
        counted_bytes=(one.sent, one.received)[k],
        other_ports={name: both[k] for name, both in one.others.items()},
    )


def _sentence(rank: int, k: int, wanted: ExpectedTraffic, counted: Sequence[Counted], topology: Topology) -> str:
    """A mismatch in words; the bytes of `rank` must be known."""
    one = counted[rank]
    nbytes = (one.sent, one.received)[k]
    assert nbytes is not None, "only NICs whose bytes are known are compared"
    node, rail = topology.node_names[topology.nodes[rank]], int(topology.rails[rank])
    return (
        f"{one.device} of {node} (rank {rank}, rail {rail}) {_DIRECTIONS[k]} {format_bytes(nbytes)} "
        f"where {format_bytes(int(wanted.bytes_2R[k, rank]))} had to go"
    )


def _by_rail(wanted_2R: Ints, carried_2R: Ints, topology: Topology) -> list[RailCounters]:
    rows = []
    for rail in np.unique(topology.rails).tolist():
        ranks = topology.rails == rail
        known = bool(np.all(carried_2R[:, ranks] >= 0))
        rows.append(
            RailCounters(
                rail=rail,
                expected_sent=int(wanted_2R[0, ranks].sum()),
                sent=int(carried_2R[0, ranks].sum()) if known else None,
                expected_received=int(wanted_2R[1, ranks].sum()),
                received=int(carried_2R[1, ranks].sum()) if known else None,
            )
        )
    return rows


def proof_notes(path: PathRecord | None) -> list[str]:
    """The notes of a record about its path."""
    if path is None or path.proof is None:
        return []
    notes = [f"path {path.proof}: {path.reason}"] if path.reason else []
    moves = (path.counters.moved if path.counters else None) or []
    shown = [f"{move.counter} of {move.port} (rank {move.rank}) rose by {move.by}" for move in moves[:_MOST_SHOWN]]
    more = [f"and {len(moves) - len(shown)} more counters that rose"] if len(moves) > len(shown) else []
    return notes + shown + more
