"""A device whose memory is NumPy's. Copies that are enqueued happen when the stream is synchronized.

A copy without a synchronization has not happened yet when MPI reads, as on a GPU.
"""

import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ncclbench.schedule.dtypes import Array


class FakeDevice:
    """A `Memory` whose stream does nothing until it is synchronized."""

    pci = "0000:00:00.0"

    def __init__(self) -> None:
        self.identity = f"fake GPU of process {os.getpid()}"
        self.enqueued: list[Callable[[], None]] = []
        self.to_host_bytes = self.to_device_bytes = self.synchronised = 0

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        return np.full(nbytes, 0x5A, np.uint8)

    def to_host(self, host: Array, device: Array) -> None:
        assert host.nbytes == device.nbytes
        self.to_host_bytes += host.nbytes
        self.enqueued.append(lambda: np.copyto(host, device))

    def to_device(self, device: Array, host: Array) -> None:
        assert host.nbytes == device.nbytes
        self.to_device_bytes += host.nbytes
        self.enqueued.append(lambda: np.copyto(device, host))

    def synchronize(self) -> None:
        self.synchronised += 1
        while self.enqueued:
            self.enqueued.pop(0)()
