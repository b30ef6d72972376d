"""gloo through torch.distributed, on CPUs."""

from importlib import import_module
from typing import TYPE_CHECKING

from ncclbench.transports.capabilities import TORCH, Capabilities

if TYPE_CHECKING:
    from ncclbench.transports.base import RankIdentity, Transport

CAPABILITIES = Capabilities(
    name="gloo",
    devices=("cpu",),
    needs_store=True,
    packages=(TORCH,),
    import_libraries=lambda: import_module("ncclbench.transports._torch_dist"),
)


def open_transport(_name: str, identity: "RankIdentity", timeout: float) -> "Transport":
    """Join the job as `identity`; see `ncclbench.transports._torch_dist.open_transport`."""
    from ncclbench.transports._torch_dist import open_transport as open_torch

    return open_torch(CAPABILITIES, identity, timeout)
