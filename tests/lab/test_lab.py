"""The lab itself: made, degraded, restored, and removed completely, even if the process that made it is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ncclbench.topology.topology_file import parse_topology
from scripts.fabric_lab import main as fabric_lab_here
from scripts.lab import execute, faults, kernel
from scripts.lab.plan import Lab, LabError
from tests.lab.conftest import SCRIPT, fabric_lab

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.lab

# Bytes from rank 0 to another, in one TCP connection over the rails; prints Mbit/s at the receiver.
_SEND = """
import os, socket, sys, time
address, source, size = sys.argv[2], sys.argv[3], int(sys.argv[4])
rank = int(os.environ["RANK"])
if rank == int(sys.argv[1]):
    server = socket.create_server((address, 7000))
    link, _ = server.accept()
    got = len(link.recv(1))
    began = time.perf_counter()
    while chunk := link.recv(1 << 20):
        got += len(chunk)
    print(got * 8 / (time.perf_counter() - began) / 1e6)
elif rank == 0:
    for _ in range(200):
        try:
            link = socket.create_connection((address, 7000), timeout=30, source_address=(source, 0))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    link.sendall(bytes(size))
    link.close()
"""


def mbit(lab: Lab, to: str, size: int = 1 << 22) -> float:
    """The rate of one TCP connection from n0:r0 to another GPU, Mbit/s."""
    target, source = lab.nics_named(to)[0], lab.nics_named("n0:r0")[0]
    rank = lab.gpus().index(target.gpu)
    command = [sys.executable, "-S", "-c", _SEND, str(rank), target.address, source.address, str(size)]
    ranks = execute.start_ranks(lab, command, stdout=subprocess.PIPE)
    assert ranks.wait(60) == [0] * len(lab.gpus())
    said = [process.communicate()[0] for process in ranks.processes]
    return float(said[rank])


def carried(lab: Lab) -> dict[str, int]:
    """Bytes that each NIC has sent."""
    return {name: values["tx_bytes"] for name, values in faults.counters(lab).items()}


def made(lab: Lab) -> Lab:
    kernel.make(lab)
    return lab


@pytest.fixture(scope="module")
def shared() -> Iterator[Lab]:
    """A lab of 2 nodes x 1 rail; every test leaves it as it was made."""
    if (reason := kernel.unable()) is not None:
        pytest.skip(reason)
    lab = Lab(prefix=f"t{uuid.uuid4().hex[:8]}", nodes=2, rails=1)
    try:
        yield made(lab)
    finally:
        kernel.remove(lab.prefix)


def here(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The command in this process, which is quicker: its exit code, and what it complained about."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        return fabric_lab_here(arguments), capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, before)


def traces(prefix: str) -> list[str]:
    """All that is left of a prefix: namespaces, processes in them, and files."""
    left = kernel.spaces_of(prefix) + [str(pid) for pid in kernel.processes_of(prefix)]
    if kernel.state_folder(prefix).exists():
        left.append(str(kernel.state_folder(prefix)))
    return left


def test_traffic_takes_the_way_that_the_fabric_has(prefix: str) -> None:
    lab = made(Lab(prefix=prefix, nodes=2, rails=2, nic_rate=1e8, spine_rate=5e7))
    before = carried(lab)
    assert mbit(lab, "n0:r1") > 150, "the node's own switch is not shaped"
    inside = carried(lab)
    assert all(inside[name] - before[name] < 100_000 for name in before), "and no NIC carries it"
    assert 60 <= mbit(lab, "n1:r0") <= 125
    assert 30 <= mbit(lab, "n1:r1") <= 62
    spine = kernel.in_space(lab.spine_space(0), ["cat", "/sys/class/net/l1/statistics/tx_bytes"])
    assert 1 << 22 < int(spine) < 1.1 * (1 << 22), "only what crosses the rails goes by the spine"


def test_planes_spines_and_sites_reach_each_other(prefix: str) -> None:
    lab = made(Lab(prefix=prefix, nodes=4, rails=2, planes=2, sites=2, spines=2, nic_rate=1e8, spine_rate=4e8))
    for name in ("n1:r0", "n1:r1", "n2:r0", "n3:r1"):
        assert mbit(lab, name, 1 << 18) > 40, name
    topology = parse_topology(lab.topology(), "lab")
    assert [node.site for node in topology.node] == ["a", "a", "b", "b"]
    assert len(topology.leaf) == 8
    assert len(topology.spine) == 4


def test_no_name_server_is_asked_in_the_lab(shared: Lab) -> None:
    """No name server is reachable, so a lookup waits for seconds. Outside the lab nothing changes."""
    if not Path("/etc/resolv.conf").exists():
        pytest.skip("this machine has no list of name servers")
    outside = Path("/etc/resolv.conf").read_bytes()
    for entering in (execute.entering(shared, shared.gpu("n1:r0"), []), agent(shared, "n1r0")):
        inside = subprocess.run([*entering, "cat", "/etc/resolv.conf"], capture_output=True, check=True)
        assert inside.stdout == b""
    assert Path("/etc/resolv.conf").read_bytes() == outside


def agent(lab: Lab, host: str) -> list[str]:
    """What mpiexec calls to start something on a host."""
    return ["env", f"FABRIC_LAB_PREFIX={lab.prefix}", str(SCRIPT.parent / "lab" / "agent"), host]


def test_an_uplink_that_is_down_is_routed_around(prefix: str) -> None:
    lab = made(Lab(prefix=prefix, nodes=2, rails=2, spines=2))
    on = faults.inject(lab, [], "uplink", "leaf0:spine0", "down")
    for _ in range(3):  # ECMP would take the dead one in every second connection
        assert mbit(lab, "n1:r1", 1 << 17) > 40
    faults.heal(lab, on)
    assert (
        len(kernel.run(["ip", "-n", lab.gpu_space(lab.gpus()[0]), "route", "show", "198.18.1.0/24"]).splitlines()) == 3
    )


def test_the_sites_rate_holds_between_sites(prefix: str) -> None:
    lab = made(Lab(prefix=prefix, nodes=2, rails=1, sites=2, nic_rate=1e8, site_rate=4e7))
    assert 24 <= mbit(lab, "n1:r0") <= 50


@pytest.mark.parametrize(
    ("where", "name", "kind", "value"),
    [
        ("nic", "n1:r0", "rate", "50%"),
        ("nic", "n1:r0", "loss", "50%"),
        ("nic", "n1:r0", "delay", "20ms"),
        ("nic", "n1:r0", "down", ""),
        ("node", "n1", "rate", "10mbit"),
        ("uplink", "leaf0", "rate", "10%"),
        ("spine", "spine0", "loss", "1%"),
        ("nvlink", "n0", "rate", "10mbit"),
        ("nvlink", "n0", "delay", "5ms"),
    ],
)
def test_what_is_healed_is_as_it_was_made(shared: Lab, where: str, name: str, kind: str, value: str) -> None:
    heals(shared, where, name, kind, value)


def heals(lab: Lab, where: str, name: str, kind: str, value: str) -> None:
    whole = shape_of(lab)
    on = faults.inject(lab, [], where, name, kind, value)
    assert kernel.load(lab.prefix)[1] == on, "it is known to the next command"
    assert shape_of(lab) != whole
    faults.heal(lab, on)
    assert shape_of(lab) == whole
    assert kernel.load(lab.prefix)[1] == []
    assert not kernel.processes_of(lab.prefix)


def shape_of(lab: Lab) -> list[str]:
    """Queues, filters and links of all namespaces, without counts and handles."""
    found = []
    for space in kernel.spaces_of(lab.prefix):
        links = json.loads(kernel.run(["ip", "-n", space, "-j", "-d", "link"]))
        found += [f"{space} {one['ifname']} {one.get('master')} {'UP' in one['flags']}" for one in links]
        for line in kernel.run(["tc", "-n", space, "qdisc", "show"]).splitlines():
            words = line.split()
            found.append(" ".join([space, words[1], *words[3:]]))
        shown = [f"class show dev {one['ifname']}" for one in links]
        found.append(kernel.run(["tc", "-n", space, "-batch", "-"], shown))
    return sorted(found)


def test_a_loss_is_the_share_that_was_asked_for(prefix: str) -> None:
    lab = made(Lab(prefix=prefix, nodes=2, rails=1))
    faults.inject(lab, [], "nic", "n1:r0", "loss", "25%", ("receive",))
    to = lab.nics_named("n1:r0")[0].address
    out = subprocess.run(
        execute.entering(lab, lab.gpu("n0:r0"), [sys.executable, "-S", "-c", _FLOOD, to]),
        check=True,
        capture_output=True,
    )
    assert out.stdout.strip() == b"2000"
    arrived = int(
        kernel.in_space(lab.gpu_space(lab.gpu("n1:r0")), ["cat", "/sys/class/net/rail0/statistics/rx_packets"])
    )
    assert 1400 <= arrived <= 1600  # 25% of 2000 are lost: 1500, with a standard deviation of 19


_FLOOD = """
import socket, sys, time
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for k in range(2000):
    link.sendto(bytes(100), (sys.argv[1], 9))
    if k % 100 == 99:
        time.sleep(0.01)
print(k + 1)
"""


def test_the_command_from_up_to_down(prefix: str, tmp_path: Path) -> None:
    up = fabric_lab("--prefix", prefix, "up", "--nodes", "2", "--rails", "2", "--spine-rate", "50mbit")
    assert (up.returncode, up.stderr) == (0, "")
    again = fabric_lab("--prefix", prefix, "up")
    assert (again.returncode, again.stderr.count("\n")) == (3, 1)
    assert "already exists" in again.stderr
    names = fabric_lab("--prefix", prefix, "exec", "--", "sh", "-c", f'echo "$(hostname) $RANK" > {tmp_path}/$RANK')
    assert (names.returncode, names.stderr) == (0, "")
    assert [(tmp_path / str(k)).read_text() for k in range(4)] == ["n0 0\n", "n0 1\n", "n1 2\n", "n1 3\n"]
    one = fabric_lab("--prefix", prefix, "exec", "--on", "n1:r1", "--", "ls", "/sys/class/net")
    assert set(one.stdout.split()) == {"ctl", "lo", "nvl", "rail1"}
    fault = fabric_lab("--prefix", prefix, "fault", "--nic", "n1:r0", "--rate", "50%", "--only", "send")
    assert fault.stdout == "fault: nic n1:r0 rate 50% (send only); `heal` removes it\n"
    status = json.loads(fabric_lab("--prefix", prefix, "status", "--json").stdout)
    assert (status["lab"]["nodes"], [f["name"] for f in status["faults"]]) == (2, ["n1:r0"])
    assert "nic n1:r0 rate 50%" in fabric_lab("--prefix", prefix, "status").stdout
    topology = parse_topology(fabric_lab("--prefix", prefix, "topology").stdout, "lab")
    assert topology.name == "lab 2x2"
    assert fabric_lab("--prefix", prefix, "heal").stdout == "healed: 1 fault\n"
    assert fabric_lab("--prefix", prefix, "down").returncode == 0
    assert traces(prefix) == []
    assert fabric_lab("--prefix", prefix, "down").stdout == f"no lab {prefix} was up\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["fault", "--nic", "n9:r0", "--down"], 2, "no GPU 'n9:r0'; there are n0:r0 to n1:r0"),
        (["fault", "--nic", "n1:r0", "--rate", "fast"], 2, "a rate is like 100mbit or 50%, and not 'fast'"),
        (["fault", "--nic", "n1:r0", "--rate", "0%"], 2, "a rate is 10kbit to 1000gbit"),
        (["fault", "--nic", "n1:r0", "--loss", "0%"], 2, "a loss is like 1%"),
        (["fault", "--nic", "n1:r0", "--delay", "1h"], 2, "a delay is like 20ms"),
        (["fault", "--nic", "n1:r0", "--down", "--only", "send"], 2, "leave --only out"),
        (["fault", "--uplink", "leaf7", "--down"], 2, "no uplink 'leaf7'; there are leaf0:spine0"),
        (["fault", "--spine", "spine3", "--rate", "50%"], 2, "no spine 'spine3'; there are spine0"),
        (["fault", "--nvlink", "n0", "--rate", "50%"], 2, "has no rate of its own"),
        (["fault", "--node", "x", "--down"], 2, "no node 'x'; there are n0 to n1"),
        (["exec"], 2, "nothing to run"),
        (["exec", "--on", "n0:r0", "--mpi", "--", "true"], 2, "leave one out"),
    ],
)
def test_what_makes_no_sense_is_refused(
    shared: Lab, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    whole = shape_of(shared)
    ended, said = here(capsys, "--prefix", shared.prefix, *arguments)
    assert (ended, said.count("\n")) == (code, 1), said
    assert words in said
    assert shape_of(shared) == whole
    assert kernel.load(shared.prefix)[1] == [], "a fault that was refused is not on the list"


@pytest.mark.parametrize("arguments", [["heal"], ["status"], ["topology"], ["exec", "--", "true"]])
def test_there_is_a_lab_first(prefix: str, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    ended, said = here(capsys, "--prefix", prefix, *arguments)
    assert (ended, said.count("\n")) == (3, 1)
    assert f"no lab '{prefix}' is up" in said


def test_half_a_lab_is_none(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_lab: Lab) -> None:
        assert kernel.spaces_of(prefix), "something was there to be removed"
        raise KeyboardInterrupt

    monkeypatch.setattr(kernel, "shape", refuse)
    with pytest.raises(KeyboardInterrupt):
        kernel.make(Lab(prefix=prefix))
    assert traces(prefix) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_is_made_leaves_nothing(prefix: str, number: signal.Signals) -> None:
    making = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--prefix", prefix, "up", "--nodes", "40", "--rails", "4"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 30
    while len(kernel.spaces_of(prefix)) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    making.send_signal(number)
    assert making.wait(60) == 3
    assert traces(prefix) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_the_command_that_started_it(prefix: str, number: signal.Signals) -> None:
    lab = made(Lab(prefix=prefix, nodes=2, rails=2))
    running = subprocess.Popen([sys.executable, str(SCRIPT), "--prefix", prefix, "exec", "--", "sleep", "600"])
    assert eventually(lambda: len(kernel.processes_of(prefix)) == len(lab.gpus()))
    running.send_signal(number)
    running.wait(30)
    assert eventually(lambda: not kernel.processes_of(prefix))


def test_down_ends_whatever_still_runs(prefix: str) -> None:
    lab = made(Lab(prefix=prefix, nodes=2, rails=1))
    # A lab whose maker was killed, with a rank that does not listen and a relay whose parent is gone.
    faults.inject(lab, [], "nic", "n0:r0", "delay", "5ms")
    deaf = subprocess.Popen(
        execute.entering(lab, lab.gpus()[0], ["sh", "-c", "trap '' TERM INT HUP; while :; do sleep 1; done"]),
        start_new_session=True,
    )
    assert eventually(lambda: len(kernel.processes_of(prefix)) >= 2)
    assert fabric_lab("--prefix", prefix, "down").returncode == 0
    assert deaf.wait(10) == -signal.SIGKILL
    assert traces(prefix) == []


def test_down_leaves_other_labs_alone(prefix: str) -> None:
    made(Lab(prefix=prefix, nodes=1, rails=1))
    other = made(Lab(prefix=f"{prefix}x", nodes=1, rails=1))
    try:
        kernel.remove(prefix)
        assert (traces(prefix), len(kernel.spaces_of(other.prefix))) == ([], 4)
    finally:
        kernel.remove(other.prefix)


def test_the_worst_rank_is_the_exit_code(prefix: str) -> None:
    made(Lab(prefix=prefix, nodes=2, rails=2))
    line = "case $RANK in 1) exit 5;; 3) exit 4;; esac"
    assert fabric_lab("--prefix", prefix, "exec", "--", "sh", "-c", line).returncode == 4
    assert fabric_lab("--prefix", prefix, "exec", "--", "sh", "-c", "exit 7").returncode == 7


def test_machine_without_support_is_refused(tmp_path: Path) -> None:
    refused = subprocess.run(
        [sys.executable, str(SCRIPT), "status"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (refused.returncode, refused.stderr.count("\n")) == (3, 1)
    assert "apt-get install iproute2" in refused.stderr


def test_user_other_than_root_is_refused() -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from scripts.lab.kernel import unable; "
        "os.setgid(65534); os.setuid(65534); print(unable())"
    )
    asked = subprocess.run([sys.executable, "-c", code, str(SCRIPT.parent.parent)], capture_output=True, check=True)
    assert b"needs root" in asked.stdout


@pytest.mark.parametrize(
    "given",
    [
        {"prefix": "Not Good"},
        {"nodes": 0},
        {"nodes": 500},
        {"sites": 4, "nodes": 3},
        {"rails": 251},
        {"spines": 65},
        {"mtu": 100},
    ],
)
def test_a_lab_that_has_no_addresses_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(LabError) as refused:
        Lab(**given)  # type: ignore[arg-type]
    assert refused.value.code == 2


def eventually(is_so: object, seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    assert callable(is_so)
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
