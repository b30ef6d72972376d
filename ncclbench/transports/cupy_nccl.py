"""NCCL through CuPy's own bindings, without torch in the data path."""

from importlib import import_module
from typing import TYPE_CHECKING

from ncclbench.transports.capabilities import CUPY, GPU_PACE, TORCH, Capabilities

if TYPE_CHECKING:
    from ncclbench.transports.base import RankIdentity, Transport

CAPABILITIES = Capabilities(
    name="cupy_nccl",
    devices=("cuda",),
    graphs=True,
    needs_store=True,  # control messages use torch's rendezvous
    reads_nccl_settings=True,
    pace=GPU_PACE,
    packages=(CUPY, TORCH),
    import_libraries=lambda: import_module("ncclbench.transports._cupy_nccl"),
)


def open_transport(_name: str, identity: "RankIdentity", timeout: float) -> "Transport":
    """Join the job as `identity`; see `ncclbench.transports._cupy_nccl.open_transport`."""
    from ncclbench.transports._cupy_nccl import open_transport as open_cupy

    return open_cupy(CAPABILITIES, identity, timeout)
