"""MPI through mpi4py: buffers in upper-case calls, never pickle."""

from importlib import import_module
from typing import TYPE_CHECKING

from ncclbench.transports.capabilities import MPI4PY, Capabilities

if TYPE_CHECKING:
    from ncclbench.transports.base import RankIdentity, Transport

CAPABILITIES = Capabilities(
    name="mpi",
    devices=("cpu", "cuda"),
    routes_all_to_all=True,
    started_by_mpiexec=True,
    packages=(MPI4PY,),
    import_libraries=lambda: import_module("ncclbench.transports._mpi_transport"),
)


def open_transport(_name: str, identity: "RankIdentity", timeout: float) -> "Transport":
    """Join the job as `identity`; see `ncclbench.transports._mpi_transport.open_transport`."""
    from ncclbench.transports._mpi_transport import open_transport as open_mpi

    return open_mpi(CAPABILITIES, identity, timeout)


def agree_on_store(identity: "RankIdentity") -> "RankIdentity":
    """`identity` with the address of a store for another library, agreed on over MPI."""
    from ncclbench.transports._mpi_transport import agree_on_store as agree

    return agree(identity)
