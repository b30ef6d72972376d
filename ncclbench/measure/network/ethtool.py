"""A network driver's own counters, as ``ethtool -S`` shows them; pause frames are nowhere else.

Three ioctls, from linux/ethtool.h: how many counters there are, what they are called, what they say.
"""

import array
import fcntl
import socket
import struct

_SIOCETHTOOL = 0x8946
_DRIVER_INFO, _STRINGS, _STATS = 0x03, 0x1B, 0x1D
_STATS_SET = 1
_INFO_BYTES, _COUNT_AT, _NAME_BYTES = 196, 180, 32
_MOST = 1 << 16


def driver_counters(interface: str) -> dict[str, int]:
    """Every counter of the driver of `interface`; empty where it has none or does not tell."""
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
