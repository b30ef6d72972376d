"""What the kernel says of TCP connections: this machine's own, and answers made by hand."""

import socket
import struct

import pytest

from ncclbench.measure.network.tcp_retransmits import ask_kernel, own_connections, parse, turned_round


def message(ends: tuple[bytes, int, bytes, int], inode: int, again: int, segments: int, info: int = 232) -> bytes:
    """One connection, as the kernel writes it."""
    near, near_port, far, far_port = ends
    identity = struct.pack("!HH4s12x4s12x12x", near_port, far_port, near, far)
    head = bytes(4) + identity + struct.pack("=16xI", inode)
    values = bytearray(info)
    if info >= 160:
        struct.pack_into("=I", values, 100, again)
        struct.pack_into("=I", values, 156, segments)
    other = struct.pack("=HH", 5, 1) + b"x" + bytes(3)  # an attribute of 5 bytes, filled up to 8
    body = head + other + struct.pack("=HH", 4 + info, 2) + bytes(values)
    return struct.pack("=IHHII", 16 + len(body), 20, 2, 1, 0) + body


ENDS = (bytes([198, 18, 0, 1]), 4000, bytes([198, 18, 0, 2]), 5000)
DONE = struct.pack("=IHHII4x", 20, 3, 2, 1, 0)


def test_connections_are_read_one_after_the_other() -> None:
    found, done = parse(message(ENDS, 7, 3, 900) + message(ENDS, 8, 0, 1))
    assert [(one.near, one.far, one.inode, one.segments, one.again) for one in found] == [
        (("198.18.0.1", 4000), ("198.18.0.2", 5000), 7, 900, 3),
        (("198.18.0.1", 4000), ("198.18.0.2", 5000), 8, 1, 0),
    ]
    assert not done
    assert parse(message(ENDS, 7, 3, 900) + DONE)[1]


def test_a_kernel_that_counts_less_or_refuses_says_nothing() -> None:
    assert parse(message(ENDS, 7, 3, 900, info=104) + DONE) == ([], True)
    with pytest.raises(OSError, match="tells nothing"):
        parse(struct.pack("=IHHIIi16x", 36, 2, 0, 1, 0, -2))


def test_the_far_end_has_the_same_connection_turned_round() -> None:
    assert turned_round("10.0.0.1:1 10.0.0.2:2") == "10.0.0.2:2 10.0.0.1:1"


def test_this_process_finds_its_own_connections_and_what_it_sent() -> None:
    try:
        ask_kernel()
    except OSError as error:
        pytest.skip(f"this kernel does not tell: {error}")
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as link:
        far, _ = listener.accept()
        with far:
            (here, there) = (f"{host}:{port}" for host, port in (link.getsockname(), link.getpeername()))
            before = own_connections(["127.0.0.1"])[f"{here} {there}"][0]
            for _ in range(5):
                link.sendall(b"x")
                far.recv(1)
            after = own_connections(["127.0.0.1"])
            assert after[f"{here} {there}"][0] - before == 5
            assert turned_round(f"{here} {there}") in after
            assert own_connections(["127.0.0.9"]) == own_connections([]) == {}
    assert f"{here} {there}" not in own_connections(["127.0.0.1"])
