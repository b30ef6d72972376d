"""The counters of this host's network ports in /sys, and how far they moved.

InfiniBand and RoCE count in ``class/infiniband/DEVICE/ports/N/{counters,hw_counters}``, with data in words of 4 bytes.
Other interfaces count in ``class/net/DEVICE/statistics``, which has no RDMA traffic. Pause frames are only in the
driver's own counters, as ``ethtool -S`` shows them.
"""

import array
import fcntl
import re
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SYS = Path("/sys")

# From linux/ethtool.h: the number of a driver's counters, their names, and their values.
_SIOCETHTOOL = 0x8946
_DRIVER_INFO, _STRINGS, _STATS = 0x03, 0x1B, 0x1D
_STATS_SET = 1
_INFO_BYTES, _COUNT_AT, _NAME_BYTES = 196, 180, 32
_MOST = 1 << 16

_WORD = 4  # bytes: the unit of port_xmit_data and port_rcv_data, InfiniBand specification 1.7, 16.1.3.5
_WRAP = 1 << 32
# Counters that are reported if they rise: errors, links that went down, drops, and congestion.
_WORTH = re.compile(
    r"err|symbol|discard|drop|down|out_of_|cnp|ecn|xmit_wait|pause|pfc|retrans|timeout|nak|slow_restart|overrun|missed"
    r"|carrier_changes"
)
_NEVER = re.compile(r"packets?$(?<!roce_packets)|_frames$")


@dataclass(frozen=True)
class Port:
    """One port's counters at one moment.

    Attributes:
        unit: bytes per count of `sent` and `received`.
        sent: None if it cannot be read.
        received: None if it cannot be read.
        health: error and congestion counters, which should not rise.
    """

    unit: int
    sent: int | None
    received: int | None
    health: Mapping[str, int] = field(default_factory=dict)


def read_ports(
    healthy: Sequence[str] = (), root: Path | None = None, ask_driver: Callable[[str], Mapping[str, int]] | None = None
) -> dict[str, Port]:
    """Every port by name: ``eth0``, ``mlx5_0:1``.

    Args:
        healthy: the devices whose health counters are read; reading all would take too long on a large host.
        root: replaces /sys.
        ask_driver: replaces `driver_counters`.
    """
    sys, ask = root or SYS, ask_driver or driver_counters
    found: dict[str, Port] = {}
    for folder in _folders(sys / "class/infiniband"):
        for port in _folders(folder / "ports"):
            name = f"{folder.name}:{port.name}"
            health = _infiniband_health(folder, port, ask) if folder.name in healthy or name in healthy else {}
            data = port / "counters"
            found[name] = Port(_WORD, _number(data / "port_xmit_data"), _number(data / "port_rcv_data"), health)
    for folder in _folders(sys / "class/net"):
        counts = folder / "statistics"
        health = _ethernet_health(folder, ask) if folder.name in healthy else {}
        found[folder.name] = Port(1, _number(counts / "tx_bytes"), _number(counts / "rx_bytes"), health)
    return found


def _infiniband_health(device: Path, port: Path, ask: Callable[[str], Mapping[str, int]]) -> dict[str, int]:
    found = {**_worthy(port / "counters"), **_worthy(port / "hw_counters")}
    for interface in _folders(device / "device/net"):
        found.update(_chosen(ask(interface.name)))
    return found


def _ethernet_health(interface: Path, ask: Callable[[str], Mapping[str, int]]) -> dict[str, int]:
    changes = _number(interface / "carrier_changes")
    own = {"carrier_changes": changes} if changes is not None else {}
    return {**_worthy(interface / "statistics"), **own, **_chosen(ask(interface.name))}


def _worthy(folder: Path) -> dict[str, int]:
    try:
        names = [file.name for file in folder.iterdir()]
    except OSError:
        return {}
    values = {name: _number(folder / name) for name in _chosen(dict.fromkeys(names, 0))}
    return {name: value for name, value in values.items() if value is not None}


def _chosen(counters: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in counters.items() if _WORTH.search(name) and not _NEVER.search(name)}


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir())
    except OSError:
        return []


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def moved(before: int, after: int) -> int | None:
    """How far a counter moved; None if unknown.

    A 32-bit counter wraps to 0 or stays at its largest value. A 64-bit counter does neither.
    """
    if after == _WRAP - 1:
        return None
    if after >= before:
        return after - before
    return after - before + _WRAP if before < _WRAP else None


def own_ports(ports: Mapping[str, Port], devices: str) -> tuple[list[str], str]:
    """The ports of a rank's NIC, and the reason if one is missing or cannot be read.

    Args:
        ports: of this host.
        devices: as the topology has them: ``mlx5_0``, ``mlx5_0:1``, ``eth0``, or several planes joined by commas.
    """
    if not devices:
        return [], "no topology file says which NIC is whose"
    names: list[str] = []
    for device in devices.split(","):
        matching = [name for name in ports if name == device or name.partition(":")[0] == device]
        if not matching:
            return [], f"this host has no port {device}; it has {', '.join(ports) or 'none that can be read'}"
        names += matching
    unreadable = [name for name in names if ports[name].sent is None or ports[name].received is None]
    return names, f"the counters of {unreadable[0]} cannot be read" if unreadable else ""


def driver_counters(interface: str) -> dict[str, int]:
    """Every counter of the driver of `interface`; empty if it has none or they cannot be read."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
            info = _ask(handle, interface, struct.pack("I", _DRIVER_INFO).ljust(_INFO_BYTES, b"\0"))
            count = struct.unpack_from("I", info, _COUNT_AT)[0]
            if not 0 < count <= _MOST:
                return {}
            head = struct.pack("III", _STRINGS, _STATS_SET, count)
            texts = _ask(handle, interface, head + bytes(count * _NAME_BYTES))[len(head) :]
            values = _ask(handle, interface, struct.pack("II", _STATS, count) + bytes(count * 8))[8:]
    except (OSError, struct.error):
        return {}
    names = [texts[k * _NAME_BYTES : (k + 1) * _NAME_BYTES].partition(b"\0")[0] for k in range(count)]
    return dict(zip((name.decode(errors="replace") for name in names), struct.unpack(f"{count}Q", values), strict=True))


def _ask(handle: socket.socket, interface: str, question: bytes) -> bytes:
    buffer = array.array("B", question)
    address, _ = buffer.buffer_info()
    fcntl.ioctl(handle, _SIOCETHTOOL, struct.pack("16sP", interface.encode()[:15], address))
    return buffer.tobytes()
