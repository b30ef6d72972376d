"""Proof of the path: did each NIC carry what the ledger says it must have carried?

The counters of every rank's NIC before and after a case are held against the bytes of the schedule. Libraries choose
paths of their own: a cross-rail flow that hopped over NVLink, or a rail whose traffic went over another one, looks
right in every time and rate, and only the ports know.

- ``proven``: every NIC carried its bytes, within 5% and what protocols add;
- ``contradicted``: one or more carried less than 95% of them: the bytes went another way;
- ``unverified``: it cannot be told, for the reason given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, assert_never

import msgspec
import numpy as np
from numpy.typing import NDArray

from ncclbench.measure.network.counters import Port, moved, own_ports, read_ports
from ncclbench.measure.network.tcp_retransmits import own_connections, turned_round
from ncclbench.schedule.case import Needs
from ncclbench.schedule.ledger import flows
from ncclbench.schedule.phases import AllToAllV, Collective, Exchange, Ints, Local, Op, SimplePhase, flatten
from ncclbench.schedule.row_work import RowWork
from ncclbench.schedule.schedule import Schedule
from ncclbench.topology import Topology
from ncclbench.topology.network_addresses import addresses_of_interfaces
from ncclbench.transports.base import Transport, all_gather_text
from ncclbench.transports.capabilities import Capabilities
from ncclbench.units import format_bytes

_TOLERANCE = 0.05
# Headers of TCP, IP and Ethernet in frames of 1500 bytes, and acknowledgements of what came the other way.
_PROTOCOLS = 0.08
# Barriers and samples may share the NIC: bytes a launch, and once a case.
_CONTROL_EACH, _CONTROL_ONCE = 8 << 10, 256 << 10
# Below this multiple of those a NIC says nothing about the path.
_ENOUGH = 4
_WRAPS_AT = 1 << 32
_MOST_SHOWN = 16
_MOST_MOVED = 256
# Of TCP segments, over which a NIC is said to lose some; what is sent again by mistake, on a busy machine, is below.
_LOSSY, _FEWEST_LOST = 0.002, 3
# All of them are told to rank 0.
_MOST_CONNECTIONS = 1024


# Of each direction and rank, shape (2, R).
Flags: TypeAlias = NDArray[np.bool_]


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank's NIC counted during a case.

    Attributes:
        device: its ports, joined by commas.
        sent: bytes; None if it cannot be told.
        received: bytes; None if it cannot be told.
        narrow: whether a counter started again, as one of 32 bits does.
        reason: why it cannot be told.
        health: by port and counter, how far those that should stand still moved.
        others: bytes sent and received by the other ports of the host that carried most.
        connections: TCP segments sent, and sent again, on each connection of this rank over its NIC.
    """

    device: str = ""
    sent: int | None = None
    received: int | None = None
    narrow: bool = False
    reason: str = ""
    health: dict[str, dict[str, int]] = {}
    others: dict[str, tuple[int, int]] = {}
    connections: dict[str, tuple[int, int]] = {}


class PortWatch:
    """The ports of this rank's host from one moment to another."""

    def __init__(self, topology: Topology, transport: Transport) -> None:
        """Note where all counters stand; free where no byte of the case can leave its NVLink domain."""
        self._transport = transport
        self.needed = len(np.unique(topology.domains)) > 1
        self._reads = self.needed and transport.capabilities.uses_nics
        self._devices = topology.wiring.devices[transport.rank] if topology.wiring else ""
        self._before = self._read() if self._reads else {}
        # What a GPU sends is no socket's; where NCCL falls back to sockets, that is worse than a lost packet.
        self._addresses = addresses_of_interfaces(self._devices) if self._reads and transport.device == "cpu" else []
        self._connections = own_connections(self._addresses)

    def _read(self) -> dict[str, Port]:
        return read_ports([name for device in self._devices.split(",") for name in (device, device.partition(":")[0])])

    def finish(self) -> list[Counted]:
        """What every rank counted, in rank order; all ranks call it."""
        if not self.needed:
            return []
        mine = Counted(reason=f"{self._transport.name} sends nothing over a wire")
        if self._reads:
            mine = count(self._before, self._read(), self._devices)
            mine = msgspec.structs.replace(mine, connections=self._sent_meanwhile())
        texts = all_gather_text(self._transport.control, msgspec.json.encode(mine).decode())
        return [msgspec.json.decode(text, type=Counted) for text in texts]

    def _sent_meanwhile(self) -> dict[str, tuple[int, int]]:
        """Segments of each connection; one that was made meanwhile began with none."""
        now = own_connections(self._addresses)
        if len(now) > _MOST_CONNECTIONS:
            return {}
        found = {}
        for key, (segments, again) in now.items():
            segments_before, again_before = self._connections.get(key, (0, 0))
            found[key] = (segments - segments_before, again - again_before)
        return found


def count(before: Mapping[str, Port], after: Mapping[str, Port], devices: str) -> Counted:
    """How far the counters of a rank's NIC moved between two readings."""
    names, reason = own_ports(before, devices)
    names_after, reason_after = own_ports(after, devices)
    others = _others(before, after, names)
    if reason or reason_after or names != names_after:
        return Counted(
            device=devices, reason=reason or reason_after or f"the ports of {devices} changed", others=others
        )
    health = {name: _health(before[name], after[name]) for name in names}
    told = {"device": ",".join(names), "health": {k: v for k, v in health.items() if v}, "others": others}
    sent = [_bytes(before[name].sent, after[name].sent, before[name].unit) for name in names]
    received = [_bytes(before[name].received, after[name].received, before[name].unit) for name in names]
    if None in (*sent, *received):
        reason = f"a counter of {','.join(names)} went backwards or stands at its end"
        return Counted(reason=reason, **told)  # type: ignore[arg-type]
    return Counted(
        sent=sum(n or 0 for n in sent),
        received=sum(n or 0 for n in received),
        narrow=any((after[n].sent or 0) < (before[n].sent or 0) for n in names)
        or any((after[n].received or 0) < (before[n].received or 0) for n in names),
        **told,  # type: ignore[arg-type]
    )


def _bytes(before: int | None, after: int | None, unit: int) -> int | None:
    if before is None or after is None:
        return None
    counts = moved(before, after)
    return None if counts is None else counts * unit


def _health(before: Port, after: Port) -> dict[str, int]:
    # One that went backwards was set to zero by somebody: errors do not come in thousands of millions.
    return {name: n - before.health[name] for name, n in after.health.items() if n > before.health.get(name, n)}


def _others(before: Mapping[str, Port], after: Mapping[str, Port], own: Sequence[str]) -> dict[str, tuple[int, int]]:
    found = {}
    for name, port in after.items():
        if name in before and name not in own:
            sent = _bytes(before[name].sent, port.sent, port.unit) or 0
            received = _bytes(before[name].received, port.received, port.unit) or 0
            found[name] = (sent, received)
    busiest = sorted(found, key=lambda name: -sum(found[name]))[:2]
    return {name: found[name] for name in busiest if sum(found[name])}


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpectedTraffic:
    """What the NICs of a case must have carried.

    Attributes:
        bytes_2R: sent and received by each rank's NIC, shape (2, R).
        launches: iterations of any variant, for what control messages add.
        reason: why it cannot be told beforehand; "" if it can.
        pxn: whether NCCL must have hopped over NVLink, or not; None where that is left to it.
    """

    bytes_2R: Ints
    launches: int
    reason: str = ""
    pxn: bool | None = None


def expected_traffic(
    variants: Sequence[Schedule],
    runs_V: Sequence[int],
    topology: Topology,
    transport: Capabilities,
    needs: Needs | None = None,
) -> ExpectedTraffic:
    """The bytes that each NIC carries when variant v is run ``runs_V[v]`` times.

    Args:
        variants: of the case.
        runs_V: how often each was run.
        topology: where ranks sit.
        transport: what it can do; libraries differ in what they route as given.
        needs: how the process was started, which settles NCCL's choice of NIC.
    """
    total = np.zeros((2, topology.world_size), np.int64)
    other = np.zeros_like(total)
    reason = ""
    for schedule, runs in zip(variants, runs_V, strict=True):
        for phase in flatten(schedule.phases):
            reason = reason or _routed_by_library(phase, transport)
            _add(total, phase, schedule, topology, runs, aligned=schedule.aligned)
            _add(other, phase, schedule, topology, runs, aligned=not schedule.aligned)
    if transport.reads_nccl_settings and needs is None and not np.array_equal(total, other):
        reason = reason or "NCCL may hop over NVLink to another rail (PXN), and both would be right"
    pxn = needs.pxn if needs and transport.reads_nccl_settings else None
    return ExpectedTraffic(bytes_2R=total, launches=sum(runs_V), reason=reason, pxn=pxn)


def _add(
    total_2R: Ints, phase: SimplePhase, schedule: Schedule, topology: Topology, runs: int, *, aligned: bool
) -> None:
    for src, dst, nbytes in flows(phase, schedule.dtype.itemsize):
        out, into = topology.carriers(src, dst, aligned=aligned)
        outside = out >= 0
        np.add.at(total_2R[0], out[outside], runs * nbytes[outside])
        np.add.at(total_2R[1], into[outside], runs * nbytes[outside])


def _routed_by_library(phase: SimplePhase, transport: Capabilities) -> str:
    """Why the bytes of a phase on each NIC are not known beforehand; "" if they are."""
    all_to_all = f"{transport.name} chooses the route of an all-to-all" if transport.routes_all_to_all else ""
    match phase:
        case Exchange() | Local() | RowWork() | Collective(op=Op.BARRIER):
            return ""
        case AllToAllV() | Collective(op=Op.ALL_TO_ALL):
            return all_to_all
        case Collective():
            return f"the library chooses the route of {phase.op}"
        case _:
            assert_never(phase)


def reconcile(
    wanted: ExpectedTraffic, counted: Sequence[Counted], topology: Topology, log: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The part of a record's `path` that the counters give, and what NCCL's `log` says of its way.

    Keys: ``proof``; ``reason`` unless proven; ``counters`` with ``rails`` (expected and counted bytes of each),
    ``off`` (the NICs that do not agree) and ``moved`` (error and congestion counters).
    """
    slack = _CONTROL_ONCE + _CONTROL_EACH * wanted.launches
    carried = np.array([[(c.sent, c.received)[k] if c.sent is not None else -1 for c in counted] for k in (0, 1)])
    told = carried >= 0
    enough = (wanted.bytes_2R >= _ENOUGH * slack) & told
    short = enough & (carried < (1 - _TOLERANCE) * wanted.bytes_2R)
    long = told & (carried > (1 + _TOLERANCE + _PROTOCOLS) * wanted.bytes_2R + slack)
    proof, reason = _judge(wanted, counted, topology, short, long, enough)
    if wanted.pxn is not None and proof != "contradicted":
        proof, reason = _judge_hop(wanted.pxn, (log or {}).get("pxn"), proof, reason)
    counters: dict[str, Any] = {
        "rails": _by_rail(wanted.bytes_2R, carried, topology),
        "off": [
            _off(rank, k, wanted, counted, topology) for k, rank in np.argwhere(short | long)[:_MOST_SHOWN].tolist()
        ],
        "moved": [
            {"rank": rank, "port": port, "counter": name, "by": by}
            for rank, one in enumerate(counted)
            for port, steps in one.health.items()
            for name, by in steps.items()
        ][:_MOST_MOVED],
    }
    repeats = sent_again(counted)
    if repeats is not None:
        counters["repeats"] = repeats.as_record()
        counters["moved"] += repeats.losses(counted)
    return {"proof": proof, **({"reason": reason} if reason else {}), "counters": counters}


def _judge(
    wanted: ExpectedTraffic, counted: Sequence[Counted], topology: Topology, short: Flags, long: Flags, enough: Flags
) -> tuple[str, str]:
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
        return "contradicted", _sentence(_off(rank, k, wanted, counted, topology)) + also
    untold = [rank for rank, one in enumerate(counted) if one.reason and needed[:, rank].any()]
    if untold:
        return "unverified", f"rank {untold[0]}: {counted[untold[0]].reason}"
    if long.any():
        k, rank = np.argwhere(long)[0].tolist()
        return "unverified", _sentence(_off(rank, k, wanted, counted, topology)) + ": other traffic, or sent again"
    if np.any(needed & ~enough):
        least = format_bytes(int(wanted.bytes_2R[needed].min()))
        return "unverified", f"{least} on a NIC is too little to be told from control messages"
    return "proven", ""


def _judge_hop(wanted: bool, seen: bool | None, proof: str, reason: str) -> tuple[str, str]:
    """PXN moves as many bytes over every NIC as going straight does, if all rails are busy: only the log tells."""
    if seen is None:
        why = "NCCL's log does not say whether it hopped over NVLink (PXN), and the counters would be the same"
        return "unverified", reason or why
    if seen != wanted:
        did, should = ("hopped", "had to go straight") if seen else ("went straight", "had to hop")
        return "contradicted", f"NCCL's log says that it {did} where it {should} over NVLink (PXN)"
    return proof, reason


def _off(rank: int, k: int, wanted: ExpectedTraffic, counted: Sequence[Counted], topology: Topology) -> dict[str, Any]:
    one = counted[rank]
    return {
        "rank": rank,
        "node": topology.node_names[topology.nodes[rank]],
        "rail": int(topology.rails[rank]),
        "device": one.device,
        "direction": ("sent", "received")[k],
        "expected_bytes": int(wanted.bytes_2R[k, rank]),
        "counted_bytes": (one.sent, one.received)[k],
        "other_ports": {name: both[k] for name, both in one.others.items()},
    }


def _sentence(off: Mapping[str, Any]) -> str:
    where = f"{off['device']} of {off['node']} (rank {off['rank']}, rail {off['rail']})"
    return (
        f"{where} {off['direction']} {format_bytes(off['counted_bytes'])} "
        f"where {format_bytes(off['expected_bytes'])} had to go"
    )


def _by_rail(wanted_2R: Ints, carried_2R: Ints, topology: Topology) -> list[dict[str, int | None]]:
    rows = []
    for rail in np.unique(topology.rails).tolist():
        mine = topology.rails == rail
        known = bool(np.all(carried_2R[:, mine] >= 0))
        rows.append(
            {
                "rail": rail,
                "expected_sent": int(wanted_2R[0, mine].sum()),
                "sent": int(carried_2R[0, mine].sum()) if known else None,
                "expected_received": int(wanted_2R[1, mine].sum()),
                "received": int(carried_2R[1, mine].sum()) if known else None,
            }
        )
    return rows


def proof_notes(path: Mapping[str, Any] | None) -> list[str]:
    """What of a record's `path` a reader of the table must know."""
    if not path or "proof" not in path:
        return []
    notes = [f"path {path['proof']}: {path['reason']}"] if path.get("reason") else []
    moves = path["counters"]["moved"]
    shown = [f"{m['counter']} of {m['port']} (rank {m['rank']}) rose by {m['by']}" for m in moves[:_MOST_SHOWN]]
    return (
        notes + shown + ([f"and {len(moves) - len(shown)} more counters that rose"] if len(moves) > len(shown) else [])
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Repeats:
    """TCP segments between F pairs of ranks, and how many were sent again; each array of shape (F,)."""

    src: Ints
    dst: Ints
    segments: Ints
    again: Ints

    def as_record(self) -> dict[str, list[int]]:
        """Plain data."""
        return {name: values.tolist() for name, values in vars(self).items()}

    def losses(self, counted: Sequence[Counted]) -> list[dict[str, Any]]:
        """The NICs that lose segments, in a direction: at least 0.2%, to most of their distinct peers.

        What a NIC loses of what it sends, it has to send again itself; what it loses of what it is sent, its peers do.
        The one with most losses is named first, and its flows are put aside, or its peers would be named for it. Where
        a flow's two ends have no other peer, nothing tells them apart, and both are named.
        """
        left = np.ones(len(self.src), bool)
        found = []
        while suspects := self._suspects(left):
            most = max(lost for lost, *_ in suspects)
            for lost, name, rank, mine in suspects:
                if lost == most:
                    found.append({"rank": rank, "port": counted[rank].device, "counter": name, "by": lost})
                    left[mine] = False
        return found

    def _suspects(self, left: NDArray[np.bool_]) -> list[tuple[int, str, int, NDArray[np.bool_]]]:
        """Ends that lose, by the flows that are `left`: how many segments, which way, which rank, and its flows."""
        found = []
        for name, ends in (("tcp_lost_sending", self.src), ("tcp_lost_receiving", self.dst)):
            for rank in np.unique(ends[left]).tolist():
                mine = left & (ends == rank)
                shares = np.sort(self.again[mine] / self.segments[mine])
                lost = int(self.again[mine].sum())
                # Of two peers the better one: a single bad peer makes nobody suspect.
                if lost >= _FEWEST_LOST and shares[(len(shares) - 1) // 2] >= _LOSSY:
                    found.append((lost, name, rank, mine))
        return found


def sent_again(counted: Sequence[Counted]) -> Repeats | None:
    """Whose segments to whom were sent again; None if none were, or nobody knows.

    A connection belongs to the two ranks that both have it, one as the other's far end.
    """
    owner = {key: rank for rank, one in enumerate(counted) for key in one.connections}
    total: dict[tuple[int, int], tuple[int, int]] = {}
    for src, one in enumerate(counted):
        for key, (segments, again) in one.connections.items():
            dst = owner.get(turned_round(key), src)
            if dst != src and segments:
                before = total.get((src, dst), (0, 0))
                total[src, dst] = (before[0] + segments, before[1] + again)
    if not any(again for _, again in total.values()):
        return None
    pairs, counts = np.array(list(total), np.int64), np.array(list(total.values()), np.int64)
    return Repeats(src=pairs[:, 0], dst=pairs[:, 1], segments=counts[:, 0], again=counts[:, 1])
