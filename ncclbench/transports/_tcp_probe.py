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


class Doors:
    """One listening socket a rank on the measured network, and the addresses of all.

    Args:
        control: over which the addresses are exchanged; all ranks make their doors at the same time.
        interface: the network interface of the measured network on this rank.

    Raises:
        EnvironmentFault: if there is no such interface, or it has no address.
    """

    def __init__(self, control: Control, interface: str) -> None:
        """Open this rank's door, and learn where the others are."""
        self._address = address_of_interface(interface)
        self._door = socket.create_server((self._address, 0), backlog=4096)
        self._door.setblocking(False)
        texts = all_gather_text(control, msgspec.json.encode(self._door.getsockname()).decode())
        self._doors = [msgspec.json.decode(text, type=tuple[str, int]) for text in texts]

    def silent(self, ranks: Sequence[int], seconds: float) -> list[int]:
        """Those of `ranks` with which no connection comes about within `seconds`; the kernel answers for them."""
        selector = selectors.DefaultSelector()
        missing = set(ranks)
        for rank in ranks:
            knock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            knock.setblocking(False)
            knock.bind((self._address, 0))
            if knock.connect_ex(self._doors[rank]) in _UNDER_WAY:
                selector.register(knock, selectors.EVENT_WRITE, rank)
            else:
                knock.close()
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
        """Take in what others have left at the door; they have gone already."""
        with suppress(OSError):
            while True:
                self._door.accept()[0].close()

    def close(self) -> None:
        """Nobody is heard any more."""
        self._door.close()
