"""Rendezvous: find rank 0's address and a free port if the launcher names none, without a server or SSH.

torch.distributed needs an address. torchrun sets one; mpiexec and srun do not. The first of these applies:

1. MASTER_ADDR and MASTER_PORT, if both are set;
2. under mpiexec, MPI: rank 0 listens on a free port and broadcasts it, and MPI is finalized before torch starts;
3. under srun, Slurm's variables: the first node of the step, and port 15000 + (64 x job id + step id) mod 15000.
"""

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import replace

from ncclbench.errors import EnvironmentFault
from ncclbench.launch.launcher_detection import slurm_step
from ncclbench.topology.network_addresses import LOOPBACK
from ncclbench.topology.slurm import expand_nodes
from ncclbench.transports.base import RankIdentity

# Below the kernel's ephemeral ports (from 32768), so that no other connection has the port by chance.
_FIRST_PORT, _PORTS = 15000, 15000


def with_store(identity: RankIdentity, environ: MutableMapping[str, str] = os.environ) -> RankIdentity:
    """Add the address of the store to `identity`, and on rank 0 a socket that already listens there.

    Raises:
        EnvironmentFault: if the ranks cannot agree on an address, or if the port is in use.
    """
    if identity.address is not None or identity.launcher == "torchrun":
        return identity
    if identity.local_size == identity.world_size:
        stay_on_this_host(environ)
    if environ.get("MASTER_ADDR") and environ.get("MASTER_PORT"):
        return _listening(identity, environ["MASTER_ADDR"], _port(environ), "MASTER_PORT")
    if identity.launcher == "slurm":
        return _by_slurm(identity, environ)
    if identity.launcher in ("openmpi", "mpich"):
        from ncclbench.transports.mpi import agree_on_store

        return agree_on_store(identity)
    raise EnvironmentFault(
        f"{identity.launcher} sets no rendezvous address: set MASTER_ADDR (rank 0's host) and MASTER_PORT (a free port "
        "there) on all ranks, or start with torchrun"
    )


def stay_on_this_host(environ: MutableMapping[str, str]) -> None:
    """Let gloo use the loopback interface, because the host's name need not resolve."""
    if "GLOO_SOCKET_IFNAME" not in environ and any(name == "lo" for _, name in socket.if_nameindex()):
        environ["GLOO_SOCKET_IFNAME"] = "lo"


def _port(environ: Mapping[str, str]) -> int:
    text = environ["MASTER_PORT"]
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise EnvironmentFault(f"MASTER_PORT must be a port, and is {text!r}")
    return int(text)


def _by_slurm(identity: RankIdentity, environ: Mapping[str, str]) -> RankIdentity:
    try:
        listed, job, step = slurm_step(environ)
        nodes = expand_nodes(listed)
    except (KeyError, ValueError) as error:
        raise EnvironmentFault(
            f"Slurm sets no rendezvous address ({error}): set MASTER_ADDR and MASTER_PORT on all ranks"
        ) from None
    port = _FIRST_PORT + (64 * job + step) % _PORTS
    host = LOOPBACK if identity.local_size == identity.world_size else nodes[0]
    return _listening(identity, host, port, "Slurm's job id")


def _listening(identity: RankIdentity, host: str, port: int, source: str) -> RankIdentity:
    """Listen on rank 0 now, so that a port in use is reported here with a clear message."""
    if identity.rank:
        return replace(identity, address=(host, port))
    try:
        listener = socket.create_server(("", port), backlog=min(identity.world_size, 4096))
    except OSError as error:
        raise EnvironmentFault(
            f"port {port} (from {source}) on {host}: {error.strerror or error}; set MASTER_ADDR and MASTER_PORT on "
            "all ranks to a port that is free"
        ) from None
    return replace(identity, address=(host, port), listen_fd=listener.detach())
