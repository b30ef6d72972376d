"""Whether other ranks answer on the network that is measured: a TCP connection to each, made and closed again.

The library itself cannot be asked: gloo's messages cannot be polled, and one that runs into its time limit breaks
every other of the same group.
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
        control: over which the addresses are exchanged; all ranks make theirs at the same time.
        interface: the network interface of the measured network on this rank.

    Raises:
        EnvironmentFault: if there is no such interface, or it has no address.
    """

    def __init__(self, control: Control, interface: str) -> None:
        """Listen on this rank, and learn where the others listen."""
        self._address = address_of_interface(interface)
        self._listener = socket.create_server((self._address, 0), backlog=4096)
        self._listener.setblocking(False)
        texts = all_gather_text(control, msgspec.json.encode(self._listener.getsockname()).decode())
        self._addresses = [msgspec.json.decode(text, type=tuple[str, int]) for text in texts]

    def silent(self, ranks: Sequence[int], seconds: float) -> list[int]:
        """Those of `ranks` with which no connection comes about within `seconds`; the kernel answers for them."""
        selector = selectors.DefaultSelector()
        missing = set(ranks)
        for rank in ranks:
            attempt = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            attempt.setblocking(False)
            attempt.bind((self._address, 0))
            if attempt.connect_ex(self._addresses[rank]) in _UNDER_WAY:
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
        """Accept and close the connections of others, which have closed them already."""
        with suppress(OSError):
            while True:
                self._listener.accept()[0].close()

    def close(self) -> None:
        """Listen no more."""
        self._listener.close()
