"""Test of which ranks answer on the measured network: a TCP connection to each is made and closed.

The library itself cannot test this: gloo's messages cannot be polled, and a message that exceeds its time limit breaks
all others of its group.
"""

import errno
import selectors
import socket
import time
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from ncclbench.topology.network_addresses import address_of_interface
from ncclbench.transports.base import Control, all_gather_text

_UNDER_WAY = (0, errno.EINPROGRESS)


class Listeners:
    """One listening socket per rank on the measured network, and the addresses of all.

    Args:
        control: exchanges the addresses; all ranks create their `Listeners` at the same time.
        interface: the network interface of the measured network on this rank.

    Raises:
        EnvironmentFault: if there is no such interface, or it has no address.
    """

    def __init__(self, control: Control, interface: str) -> None:
        """Listen on this rank, and gather the addresses of all ranks."""
        self._address = address_of_interface(interface)
        self._listener = socket.create_server((self._address, 0), backlog=4096)
        self._listener.setblocking(False)
        texts = all_gather_text(control, msgspec.json.encode(self._listener.getsockname()).decode())
        self.addresses = [msgspec.json.decode(text, type=tuple[str, int]) for text in texts]

    def unreachable(self, ranks: Sequence[int], seconds: float) -> list[int]:
        """Those of `ranks` that accept no connection within `seconds`; their kernels accept for them, even if busy."""
        selector = selectors.DefaultSelector()
        missing = set(ranks)
        for rank in ranks:
            attempt = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            attempt.setblocking(False)
            attempt.bind((self._address, 0))
            if attempt.connect_ex(self.addresses[rank]) in _UNDER_WAY:
                selector.register(attempt, selectors.EVENT_WRITE, rank)
            else:
                attempt.close()
        deadline = time.monotonic() + seconds
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                link = key.fileobj
                assert isinstance(link, socket.socket)
                if link.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    missing.discard(key.data)
                selector.unregister(link)
                link.close()
        for key in list(selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._clear()
        return sorted(missing)

    def _clear(self) -> None:
        """Accept and close the connections of other ranks, which have already closed them."""
        with suppress(OSError):
            while True:
                self._listener.accept()[0].close()

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()
