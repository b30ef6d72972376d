import socket
from dataclasses import replace

import pytest

from ncclbench.errors import EnvironmentFault
from ncclbench.launch.rendezvous import with_store
from ncclbench.topology import network_addresses as _address
from ncclbench.topology.network_addresses import LOOPBACK, connect_first, interface_addresses, local_addresses
from ncclbench.topology.slurm import expand_nodes
from ncclbench.transports.base import RankIdentity

# Variables that srun sets for `srun -N 2 --ntasks-per-node 2`, on rank 3.
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
IDENTITY = RankIdentity(rank=3, world_size=4, local_rank=1, local_size=2, launcher="slurm")


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("node1", ["node1"]),
        ("a,b", ["a", "b"]),
        ("node[01-04,7],other", ["node01", "node02", "node03", "node04", "node7", "other"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("rack[1-2]n[01-02]", ["rack1n01", "rack1n02", "rack2n01", "rack2n02"]),
        ("n[1,3]-ib,login", ["n1-ib", "n3-ib", "login"]),
    ],
)
def test_node_lists_are_expanded(text: str, nodes: list[str]) -> None:
    assert expand_nodes(text) == nodes


@pytest.mark.parametrize("text", ["", "n[1-3", "n[x-3]"])
def test_broken_node_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"list of nodes|invalid literal"):
        expand_nodes(text)


def test_slurm_address_is_the_first_node_and_a_job_port() -> None:
    joined = with_store(IDENTITY, dict(SLURM))
    assert joined.address == ("gpu07", 15000 + (64 * 4711) % 15000)
    assert joined.listen_fd is None


def test_steps_of_one_job_have_different_ports() -> None:
    one, other = (with_store(IDENTITY, {**SLURM, "SLURM_STEP_ID": step}).address for step in ("0", "1"))
    assert one != other


def test_slurm_without_node_list_names_master_addr() -> None:
    with pytest.raises(EnvironmentFault, match="MASTER_ADDR"):
        with_store(IDENTITY, {"SLURM_JOB_ID": "1"})


def test_master_addr_has_precedence() -> None:
    joined = with_store(IDENTITY, {**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "2345"})
    assert joined.address == ("head", 2345)


@pytest.mark.parametrize("port", ["http", "0", "70000", "-1"])
def test_invalid_master_port_is_refused(port: str) -> None:
    with pytest.raises(EnvironmentFault, match="MASTER_PORT must be a port"):
        with_store(IDENTITY, {"MASTER_ADDR": "head", "MASTER_PORT": port})


def test_port_in_use_is_named() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentFault, match=f"port {port} .*MASTER_PORT.* in use"):
            with_store(replace(IDENTITY, rank=0), {"MASTER_ADDR": "head", "MASTER_PORT": str(port)})


def test_rank_0_listens_before_ranks_connect() -> None:
    with socket.create_server(("", 0)) as probe:
        port = probe.getsockname()[1]
    joined = with_store(replace(IDENTITY, rank=0), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    assert joined.listen_fd is not None
    with socket.socket(fileno=joined.listen_fd), socket.create_connection(("127.0.0.1", port), timeout=5):
        pass


def test_launcher_without_address_is_refused() -> None:
    with pytest.raises(EnvironmentFault, match="flux sets no rendezvous address"):
        with_store(replace(IDENTITY, launcher="flux"), {})


@pytest.mark.parametrize("identity", [replace(IDENTITY, launcher="torchrun"), replace(IDENTITY, address=("here", 1))])
def test_known_address_is_kept(identity: RankIdentity) -> None:
    assert with_store(identity, {}) == identity


def test_ranks_of_one_node_use_loopback() -> None:
    environ = dict(SLURM)
    joined = with_store(replace(IDENTITY, local_size=4), environ)
    assert joined.address is not None
    assert joined.address[0] == "127.0.0.1"
    assert environ.get("GLOO_SOCKET_IFNAME") == "lo"


def test_first_host_that_accepts_is_used() -> None:
    assert local_addresses()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with connect_first(["no-such-host.invalid", "127.0.0.1"], port, 5) as link:
            assert link.getpeername() == ("127.0.0.1", port)
    with pytest.raises(OSError, match=r"refused|reach|resolve|known|Name"):
        connect_first(["127.0.0.1"], port, 5)


def test_isolated_node_uses_interface_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an isolated cluster network; loopback would be the other node itself."""

    def no_name(*_: object) -> None:
        raise OSError("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr(_address, "ROUTED_ADDRESS", ("not an address", 9))
    monkeypatch.setattr(_address, "interface_addresses", lambda: ["10.0.0.7", "10.1.0.7"])
    assert local_addresses() == ["10.0.0.7", "10.1.0.7"]
    monkeypatch.setattr(_address, "interface_addresses", list)
    assert local_addresses() == [LOOPBACK]


def test_interface_addresses_are_valid_and_not_loopback() -> None:
    for address in interface_addresses():
        assert socket.inet_ntoa(socket.inet_aton(address)) == address
        assert not address.startswith("127.")
