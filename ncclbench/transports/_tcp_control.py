"""Control messages over TCP connections of their own, all to rank 0: for a library whose only network is measured.

MPI ends a job in which one rank cannot be reached, at the first message to it. Where ``NCCLBENCH_CONTROL_IFNAME`` names
another network, and MASTER_ADDR and MASTER_PORT say where rank 0 is on it, control messages go there, and ranks whose
NIC is down can still be asked and told.
"""

import socket
import struct
import time

import numpy as np

from ncclbench.errors import EnvironmentFault
from ncclbench.schedule.dtypes import Array

_HELLO = struct.Struct("!II")
_RETRY_SECONDS = 0.05


class StarControl:
    """One rank's end of the star; rank 0 has a connection to each other rank, the others one to rank 0."""

    def __init__(self, rank: int, world_size: int, address: tuple[str, int], seconds: float) -> None:
        """Meet the other ranks at `address`, which is rank 0's.

        Raises:
            EnvironmentFault: if they do not meet within `seconds`.
        """
        self.rank, self.world_size = rank, world_size
        self._links: dict[int, socket.socket] = {}
        deadline = time.monotonic() + seconds
        try:
            if rank == 0:
                self._welcome(address, deadline)
            else:
                self._links[0] = _reach(address, deadline)
                self._links[0].sendall(_HELLO.pack(rank, world_size))
        except OSError as error:
            missing = [r for r in range(1, world_size) if r not in self._links] if rank == 0 else [0]
            self.close()
            raise EnvironmentFault(
                f"rank {rank} did not meet rank {', '.join(map(str, missing[:8]))} at {address[0]}:{address[1]} within "
                f"{seconds:g} s ({error}): see that MASTER_ADDR is rank 0's address on the control network"
            ) from None
        for link in self._links.values():
            link.settimeout(None)  # from now on the watchdog sees to ranks that do not answer
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _welcome(self, address: tuple[str, int], deadline: float) -> None:
        with socket.create_server(address, backlog=min(self.world_size, 4096)) as door:
            while len(self._links) < self.world_size - 1:
                door.settimeout(max(0.01, deadline - time.monotonic()))
                link, _ = door.accept()
                link.settimeout(max(0.01, deadline - time.monotonic()))
                rank, size = _HELLO.unpack(_read(link, _HELLO.size))
                if size != self.world_size or not 0 < rank < size or rank in self._links:
                    link.close()
                    raise OSError(f"rank {rank} of {size} came to a job of {self.world_size}")
                self._links[rank] = link

    def gather(self, array: Array) -> Array | None:
        """All ranks' arrays, on rank 0."""
        mine = np.ascontiguousarray(array)
        if self.rank:
            self._links[0].sendall(mine.tobytes())
            return None
        everyone = np.empty((self.world_size, *mine.shape), mine.dtype)
        everyone[0] = mine
        for rank, link in self._links.items():
            everyone[rank] = np.frombuffer(_read(link, mine.nbytes), mine.dtype).reshape(mine.shape)
        return everyone

    def all_gather(self, array: Array) -> Array:
        """All ranks' arrays, on every rank."""
        everyone = self.gather(array)
        if everyone is None:
            everyone = np.empty((self.world_size, *np.shape(array)), np.asarray(array).dtype)
        return self.broadcast(everyone)

    def broadcast(self, array: Array) -> Array:
        """Rank 0's array, on every rank."""
        mine = np.array(array)
        if self.rank:
            return np.frombuffer(bytearray(_read(self._links[0], mine.nbytes)), mine.dtype).reshape(mine.shape)
        for link in self._links.values():
            link.sendall(mine.tobytes())
        return mine

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.all_gather(np.zeros(1, np.uint8))

    def close(self) -> None:
        """Leave."""
        for link in self._links.values():
            link.close()
        self._links.clear()


def _reach(address: tuple[str, int], deadline: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection(address, timeout=max(0.01, deadline - time.monotonic()))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_SECONDS)


def _read(link: socket.socket, nbytes: int) -> bytes:
    parts = bytearray()
    while len(parts) < nbytes:
        part = link.recv(min(1 << 20, nbytes - len(parts)))
        if not part:
            raise ConnectionError("a rank has gone")
        parts += part
    return bytes(parts)
