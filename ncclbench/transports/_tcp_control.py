"""Control messages over TCP connections to rank 0, for a library whose own messages all use the measured network.

MPI ends a job at the first message to an unreachable rank. ``NCCLBENCH_CONTROL_IFNAME`` names a separate control
network, and MASTER_ADDR and MASTER_PORT are rank 0's address on it. Control messages then still reach a rank whose
measured NIC is down.
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
    """One rank's connections: from rank 0 to all other ranks, from each of those to rank 0 alone."""

    def __init__(self, rank: int, world_size: int, address: tuple[str, int], seconds: float) -> None:
        """Connect the ranks over `address`, which is rank 0's.

        Raises:
            EnvironmentFault: if a rank does not connect within `seconds`.
        """
        self.rank, self.world_size = rank, world_size
        self._links: dict[int, socket.socket] = {}
        deadline = time.monotonic() + seconds
        try:
            if rank == 0:
                self._accept_ranks(address, deadline)
            else:
                self._links[0] = _connect(address, deadline)
                self._links[0].sendall(_HELLO.pack(rank, world_size))
        except OSError as error:
            missing = [r for r in range(1, world_size) if r not in self._links] if rank == 0 else [0]
            self.close()
            raise EnvironmentFault(
                f"rank {rank} did not meet rank {', '.join(map(str, missing[:8]))} at {address[0]}:{address[1]} within "
                f"{seconds:g} s ({error}): see that MASTER_ADDR is rank 0's address on the control network"
            ) from None
        for link in self._links.values():
            link.settimeout(None)  # from here on the watchdog detects ranks that do not answer
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _accept_ranks(self, address: tuple[str, int], deadline: float) -> None:
        with socket.create_server(address, backlog=min(self.world_size, 4096)) as listener:
            while len(self._links) < self.world_size - 1:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                link, _ = listener.accept()
                link.settimeout(max(0.01, deadline - time.monotonic()))
                rank, size = _HELLO.unpack(_read(link, _HELLO.size))
                if size != self.world_size or not 0 < rank < size or rank in self._links:
                    link.close()
                    raise OSError(f"rank {rank} of {size} connected to a job of {self.world_size}")
                self._links[rank] = link

    def gather(self, array: Array) -> Array | None:
        """All ranks' arrays, on rank 0."""
        own = np.ascontiguousarray(array)
        if self.rank:
            self._links[0].sendall(own.tobytes())
            return None
        gathered = np.empty((self.world_size, *own.shape), own.dtype)
        gathered[0] = own
        for rank, link in self._links.items():
            gathered[rank] = np.frombuffer(_read(link, own.nbytes), own.dtype).reshape(own.shape)
        return gathered

    def all_gather(self, array: Array) -> Array:
        """All ranks' arrays, on every rank."""
        gathered = self.gather(array)
        if gathered is None:
            gathered = np.empty((self.world_size, *np.shape(array)), np.asarray(array).dtype)
        return self.broadcast(gathered)

    def broadcast(self, array: Array) -> Array:
        """Rank 0's array, on every rank."""
        own = np.array(array)
        if self.rank:
            return np.frombuffer(bytearray(_read(self._links[0], own.nbytes)), own.dtype).reshape(own.shape)
        for link in self._links.values():
            link.sendall(own.tobytes())
        return own

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.all_gather(np.zeros(1, np.uint8))

    def close(self) -> None:
        """Close all connections."""
        for link in self._links.values():
            link.close()
        self._links.clear()


def _connect(address: tuple[str, int], deadline: float) -> socket.socket:
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
            raise ConnectionError("a rank closed its connection")
        parts += part
    return bytes(parts)
