"""The kernel's counts of TCP segments sent and retransmitted, for each connection of this process.

A NIC that loses one packet in a hundred hardly changes a median: TCP repairs a loss inside a message within one round
trip. The kernel counts retransmits per connection, and so per flow. They are read by ``NETLINK_SOCK_DIAG``
(linux/inet_diag.h, linux/tcp.h), as ``ss -ti`` does.
"""

import socket
import struct
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_SOCK_DIAG, _BY_FAMILY = 4, 20
_REQUEST, _DUMP = 0x1, 0x300
_ERROR, _DONE = 2, 3
_ESTABLISHED = 1 << 1
_TCP_INFO = 2
# Offsets in inet_diag_msg (72 bytes) and in tcp_info.
_MESSAGE_BYTES, _IDENTITY_AT, _INODE_AT = 72, 4, 68
_RETRANSMITS_AT, _DATA_SEGMENTS_AT = 100, 156
_SECONDS = 5.0


@dataclass(frozen=True)
class Connection:
    """One TCP connection: its two ends, as address and port, and the data segments that the near end sent.

    Attributes:
        segments: number of segments sent.
        again: number of segments sent again, since they were not acknowledged.
    """

    near: tuple[str, int]
    far: tuple[str, int]
    inode: int
    segments: int
    again: int


def own_connections(addresses: Collection[str]) -> dict[str, tuple[int, int]]:
    """Segments sent, and sent again, of each connection of this process that leaves from one of `addresses`.

    Keys are both ends as text, ``198.18.0.1:4000 198.18.0.2:5000``, which match those of the far end. Empty if the
    kernel does not have them.
    """
    if not addresses:
        return {}
    inodes = _own_inodes()
    with suppress(OSError, struct.error):
        found = [one for one in ask_kernel() if one.near[0] in addresses and one.inode in inodes]
        return {f"{_text(one.near)} {_text(one.far)}": (one.segments, one.again) for one in found}
    return {}


def turned_round(key: str) -> str:
    """The far end's key for the same connection."""
    near, _, far = key.partition(" ")
    return f"{far} {near}"


def ask_kernel() -> list[Connection]:
    """All TCP connections over IPv4 that are established in this network namespace.

    Raises:
        OSError: if the kernel does not answer.
    """
    body = struct.pack("=BBBBI", socket.AF_INET, socket.IPPROTO_TCP, 1 << (_TCP_INFO - 1), 0, _ESTABLISHED) + bytes(48)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as link:
        link.settimeout(_SECONDS)
        link.send(struct.pack("=IHHII", 16 + len(body), _BY_FAMILY, _REQUEST | _DUMP, 1, 0) + body)
        found: list[Connection] = []
        done = False
        while not done:
            more, done = parse(link.recv(1 << 18))
            found += more
        return found


def parse(answer: bytes) -> tuple[list[Connection], bool]:
    """The connections in one datagram of the kernel's answer, and whether it was the last.

    Raises:
        OSError: if the answer is an error.
    """
    found: list[Connection] = []
    at = 0
    while at + 16 <= len(answer):
        length, kind = struct.unpack_from("=IH", answer, at)
        if kind == _DONE:
            return found, True
        if kind == _ERROR:
            raise OSError(-struct.unpack_from("=i", answer, at + 16)[0], "the kernel tells nothing of TCP connections")
        one = _connection(answer[at + 16 : at + length])
        if one is not None:
            found.append(one)
        at += max(16, length + -length % 4)
    return found, not answer


def _connection(message: bytes) -> Connection | None:
    """The connection in one message; None if the kernel is too old to count segments."""
    (inode,) = struct.unpack_from("=I", message, _INODE_AT)
    near_port, far_port, near, far = struct.unpack_from("!HH4s12x4s", message, _IDENTITY_AT)
    for kind, value in _attributes(message[_MESSAGE_BYTES:]):
        if kind == _TCP_INFO and len(value) >= _DATA_SEGMENTS_AT + 4:
            again, segments = (struct.unpack_from("=I", value, k)[0] for k in (_RETRANSMITS_AT, _DATA_SEGMENTS_AT))
            ends = (socket.inet_ntoa(near), near_port), (socket.inet_ntoa(far), far_port)
            return Connection(*ends, inode=inode, segments=segments, again=again)
    return None


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        yield kind, data[at + 4 : at + length]
        at += max(4, length + -length % 4)


def _own_inodes() -> set[int]:
    found = set()
    for file in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            target = str(file.readlink())
            if target.startswith("socket:["):
                found.add(int(target[8:-1]))
    return found


def _text(end: tuple[str, int]) -> str:
    return f"{end[0]}:{end[1]}"
