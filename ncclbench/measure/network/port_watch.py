"""What each rank's NIC counted during a case: the port counters and TCP connections read before and after it."""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from ncclbench.measure.network.counters import Port, moved, own_ports, read_ports
from ncclbench.measure.network.tcp_retransmits import own_connections
from ncclbench.topology import Topology
from ncclbench.topology.network_addresses import addresses_of_interfaces
from ncclbench.transports.base import Transport, all_gather_text

# Rank 0 receives every connection of every rank; above this number a rank sends none.
_MOST_CONNECTIONS = 1024


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank's NIC counted during a case.

    Attributes:
        device: its ports, joined by commas.
        sent: bytes; None if unknown.
        received: bytes; None if unknown.
        narrow: whether a counter started again from 0, as one of 32 bits does.
        reason: why the bytes are unknown.
        health: by port and counter, how far each error or congestion counter rose.
        others: bytes sent and received by the busiest other ports of the host.
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
    """Reads the ports of this rank's host at the start and at the end of a case."""

    def __init__(self, topology: Topology, transport: Transport) -> None:
        """Read all counters; nothing is read where no byte of the case can leave its NVLink domain."""
        self._transport = transport
        self.needed = len(np.unique(topology.domains)) > 1
        self._reads = self.needed and transport.capabilities.uses_nics
        self._devices = topology.wiring.devices[transport.rank] if topology.wiring else ""
        self._before = self._read() if self._reads else {}
        # A GPU's traffic uses no sockets. Where NCCL falls back to sockets, the record says so anyway.
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
        """Segments of each connection since the start; a connection made since then began with none."""
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
    counted = Counted(device=",".join(names), health={k: v for k, v in health.items() if v}, others=others)
    sent = [_bytes(before[name].sent, after[name].sent, before[name].unit) for name in names]
    received = [_bytes(before[name].received, after[name].received, before[name].unit) for name in names]
    if None in (*sent, *received):
        reason = f"a counter of {','.join(names)} went backwards or stands at its end"
        return msgspec.structs.replace(counted, reason=reason)
    return msgspec.structs.replace(
        counted,
        sent=sum(n or 0 for n in sent),
        received=sum(n or 0 for n in received),
        narrow=any((after[n].sent or 0) < (before[n].sent or 0) for n in names)
        or any((after[n].received or 0) < (before[n].received or 0) for n in names),
    )


def _bytes(before: int | None, after: int | None, unit: int) -> int | None:
    if before is None or after is None:
        return None
    counts = moved(before, after)
    return None if counts is None else counts * unit


def _health(before: Port, after: Port) -> dict[str, int]:
    # A counter that fell was reset: errors are too few to wrap one.
    return {name: n - before.health[name] for name, n in after.health.items() if n > before.health.get(name, n)}


def _others(before: Mapping[str, Port], after: Mapping[str, Port], own: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Bytes sent and received by the two busiest ports of the host that are not this rank's."""
    found = {}
    for name, port in after.items():
        if name in before and name not in own:
            sent = _bytes(before[name].sent, port.sent, port.unit) or 0
            received = _bytes(before[name].received, port.received, port.unit) or 0
            found[name] = (sent, received)
    busiest = sorted(found, key=lambda name: -sum(found[name]))[:2]
    return {name: found[name] for name in busiest if sum(found[name])}
