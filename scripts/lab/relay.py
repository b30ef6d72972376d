"""Delay Ethernet frames between two tap devices, in both directions and in order.

    relay.py TAP TAP SECONDS

This replaces netem, which small kernels leave out. Both taps exist when "ready" is printed, and disappear with this
process.
"""

import contextlib
import fcntl
import os
import selectors
import signal
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_LARGEST_FRAME = 65550


def open_tap(name: str) -> int:
    """Make a tap device of that name; returns its non-blocking descriptor."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return tap


def relay(left: int, right: int, seconds: float) -> None:
    """Forward frames, each `seconds` after its arrival; never returns."""
    other = {left: right, right: left}
    held: deque[tuple[float, int, bytes]] = deque()  # the delay is constant, so they are in order of time
    selector = selectors.DefaultSelector()
    for tap in other:
        selector.register(tap, selectors.EVENT_READ)
    while True:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else None
        for key, _ in selector.select(wait):
            held += [(time.monotonic() + seconds, other[key.fd], frame) for frame in frames_of(key.fd)]
        while held and held[0][0] <= time.monotonic():
            _due, tap, frame = held.popleft()
            with contextlib.suppress(OSError):  # a full or closed port drops the frame
                os.write(tap, frame)


def frames_of(tap: int) -> Iterator[bytes]:
    """The frames that wait at a tap."""
    try:
        while True:
            yield os.read(tap, _LARGEST_FRAME)
    except BlockingIOError:
        return
    except OSError:  # not up yet, or removed
        time.sleep(0.01)


def main() -> None:
    """Open the taps, print "ready", and relay."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the foreground command, not for the lab
    left, right = (open_tap(name) for name in sys.argv[1:3])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    relay(left, right, float(sys.argv[3]))


if __name__ == "__main__":
    main()
