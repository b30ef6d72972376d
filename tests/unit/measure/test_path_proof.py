"""Port counters against the ledger: proven, contradicted and unverified paths."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ncclbench.buffers.arrays import Buffers
from ncclbench.config.plugins import load
from ncclbench.measure.case import run_case
from ncclbench.measure.network import port_watch
from ncclbench.measure.network.counters import Port, driver_counters, moved, own_ports, read_ports
from ncclbench.measure.network.expected_traffic import ExpectedTraffic, expected_traffic
from ncclbench.measure.network.lossy_nics import retransmits_by_pair
from ncclbench.measure.network.path_proof import proof_notes, reconcile
from ncclbench.measure.network.port_watch import Counted, count
from ncclbench.measure.telemetry import Telemetry
from ncclbench.plan.plan import Settings
from ncclbench.schedule import Case, Schedule, Timing
from ncclbench.schedule.flow_rounds import Round, flow_schedule
from ncclbench.schedule.ledger import flows
from ncclbench.schedule.pattern import build_variants
from ncclbench.schedule.phases import flatten
from ncclbench.store.records import CounterMove, PathRecord, Record, Retransmits
from ncclbench.topology import Topology, Wiring
from ncclbench.transports.base import Evidence, Program, Step
from ncclbench.transports.capabilities import Capabilities, capabilities_of
from ncclbench.transports.threads import ThreadTransport, play
from tests.helpers.stored import known

NODES, RAILS = 3, 2
MEGABYTE = 1 << 20


def fabric(devices: bool = True) -> Topology:
    ranks = np.arange(NODES * RAILS)
    wiring = Wiring(
        devices=tuple(f"nic{rank}" for rank in ranks),
        nic_gbit_per_s=np.full(len(ranks), np.nan),
        leaves=ranks % RAILS,
        leaf_names=("leaf0", "leaf1"),
        uplinks=np.ones(RAILS, np.int64),
        uplink_gbit_per_s=np.full(RAILS, np.nan),
        domain_gbit_per_s=np.full(len(ranks), np.nan),
    )
    return Topology(
        nodes=ranks // RAILS,
        domains=ranks // RAILS,
        rails=ranks % RAILS,
        sites=0 * ranks,
        node_names=("n0", "n1", "n2"),
        wiring=wiring if devices else None,
    )


class Wire:
    """Plays NICs: every launch of a schedule adds its bytes, and what headers add, to the counters of some NICs."""

    def __init__(self, topology: Topology, carrier: Any, factor: float = 1.045) -> None:
        """`carrier` says for a rank whose NIC its bytes really take."""
        self.topology, self.carrier, self.factor = topology, carrier, factor
        self.bytes_2R = np.zeros((2, topology.world_size))

    def read(self, *_: Any) -> dict[str, Port]:
        sent, received = self.bytes_2R.astype(int).tolist()
        return {f"nic{r}": Port(1, sent[r], received[r]) for r in range(self.topology.world_size)}

    def wrap(self, transport: ThreadTransport) -> ThreadTransport:
        compiled = transport.compile

        def compile_(schedule: Schedule, buffers: Buffers) -> Program:
            program = compiled(schedule, buffers)
            return Program(tuple(Step(s.label, self._launching(s, schedule, transport.rank)) for s in program.steps))

        transport.name, transport.capabilities = "wire", Capabilities(name="wire")
        transport.compile = compile_  # type: ignore[method-assign]
        return transport

    def _launching(self, step: Step, schedule: Schedule, rank: int) -> Any:
        (phase,) = [phase for phase in flatten(schedule.phases) if phase.label == step.label]
        mine = np.zeros(2)
        for src, dst, nbytes in flows(phase, schedule.dtype.itemsize):
            outside = self.topology.domains[src] != self.topology.domains[dst]
            mine += [nbytes[outside & (src == rank)].sum(), nbytes[outside & (dst == rank)].sum()]

        def launch() -> None:
            step.launch()
            self.bytes_2R[:, self.carrier(rank)] += mine * self.factor

        return launch


def measured(wire: Wire, monkeypatch: pytest.MonkeyPatch, pattern: str, nbytes: int = MEGABYTE, **case: Any) -> Record:
    monkeypatch.setattr(port_watch, "read_ports", wire.read)
    settings = Settings(iterations=6, warmup=3)
    made = Case(pattern=pattern, nbytes=nbytes, **case)
    topology = wire.topology
    found = play(topology.world_size, lambda t: run_case(made, wire.wrap(t), topology, settings))[0]
    assert found is not None
    assert (found.record.status, found.record.wrong) == ("ok", 0)
    return found.record


@pytest.mark.parametrize("timing", [Timing.ISOLATED, Timing.PIPELINED])
@pytest.mark.parametrize("pattern", ["same_rail", "cross_rail", "pairs", "rail_hot"])
def test_nic_with_its_bytes_is_proven(pattern: str, timing: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks, warm-up and timing all count: one launch forgotten and the bytes would not agree."""
    record = measured(Wire(fabric(), lambda rank: rank), monkeypatch, pattern, timing=timing)
    assert record.path is not None
    assert record.path.proof == "proven", record.path
    assert record.notes == []
    for rail in known(known(record.path.counters).rails):
        assert rail.sent == pytest.approx(1.045 * known(rail.expected_sent), abs=8)
        assert rail.received == pytest.approx(1.045 * known(rail.expected_received), abs=8)


def test_lossless_wire_carries_the_expected_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    record = measured(Wire(fabric(), lambda rank: rank, factor=1.0), monkeypatch, "cross_rail")
    assert record.path is not None
    for rail in known(known(record.path.counters).rails):
        assert (rail.sent, rail.received) == (rail.expected_sent, rail.expected_received)


@pytest.mark.parametrize("pattern", ["same_rail", "cross_rail"])
def test_traffic_that_takes_another_rail_contradicts(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 3's bytes go over its neighbour's NIC, as with a wrong route or a hop over NVLink."""
    record = measured(Wire(fabric(), lambda rank: 2 if rank == 3 else rank), monkeypatch, pattern)
    assert record.path is not None
    assert record.path.proof == "contradicted"
    assert known(record.path.reason).startswith("nic3 of n1 (rank 3, rail 1) sent 0 B where ")
    off = {(one.rank, one.direction): one.counted_bytes for one in known(known(record.path.counters).off)}
    assert set(off) == {(2, "sent"), (2, "received"), (3, "sent"), (3, "received")}
    assert off[3, "sent"] == 0
    assert record.notes == [f"path contradicted: {record.path.reason}"]


@pytest.mark.parametrize("mode", ["spine", "pxn", "crossnic0"])
@pytest.mark.parametrize("seen", [True, False, None])
def test_only_the_log_shows_a_pxn_hop(mode: str, seen: bool | None) -> None:
    """With all rails busy PXN puts as many bytes on every NIC as going straight."""
    topology, case = fabric(), Case(pattern="cross_rail", nbytes=100 * MEGABYTE, params={"mode": mode})
    needs = load("patterns", "cross_rail").needs(case)
    asked = expected_traffic(build_variants(case, topology), [1, 0], topology, capabilities_of("nccl"), needs)
    assert set(asked.bytes_2R.ravel()) == {100 * MEGABYTE}
    log = PathRecord(pxn=seen)
    path = reconcile(asked, all_but(0, Counted(sent=100 * MEGABYTE, received=100 * MEGABYTE)), topology, log)
    right = "proven" if seen == (mode == "pxn") else "contradicted"
    assert path.proof == ("unverified" if seen is None else right)
    assert ("PXN" in (path.reason or "")) == (path.proof != "proven")


def test_pxn_bytes_are_expected_on_the_aligned_nic() -> None:
    """Only rank 0 sends, to rail 1 of the next node: straight by its own NIC, aligned by that of rank 1."""
    topology, case = fabric(), Case(pattern="x", nbytes=64)
    for aligned, carrier in ((False, 0), (True, 1)):
        one = flow_schedule(case, topology, Round("r", np.array([0]), np.array([3])), aligned=aligned)
        bytes_2R = expected_traffic([one], [2], topology, capabilities_of("threads")).bytes_2R
        assert np.flatnonzero(bytes_2R[0]).tolist() == [carrier]
        assert np.flatnonzero(bytes_2R[1]).tolist() == [3]
        assert bytes_2R[0, carrier] == 128


def test_too_little_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    record = measured(Wire(fabric(), lambda rank: rank), monkeypatch, "same_rail", nbytes=1024)
    assert record.path is not None
    assert record.path.proof == "unverified"
    assert known(record.path.reason).endswith("is too little to distinguish from control messages")


def test_all_reduce_route_is_unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    record = measured(Wire(fabric(), lambda rank: rank), monkeypatch, "all_reduce")
    assert record.path is not None
    assert (record.path.proof, record.path.reason) == (
        "unverified",
        "the library chooses the route of all_reduce",
    )


def test_one_node_has_no_path_record() -> None:
    made, topology = Case(pattern="all_reduce", nbytes=64), Topology.single_node(2)
    found = play(2, lambda t: run_case(made, t, topology, Settings(iterations=6)))[0]
    assert found is not None
    assert found.record.path is None


def test_threads_prove_nothing() -> None:
    made, topology = Case(pattern="same_rail", nbytes=64), fabric()
    found = play(6, lambda t: run_case(made, t, topology, Settings(iterations=6)))[0]
    assert found is not None
    assert found.record.notes == ["path unverified: rank 0: threads sends nothing over a wire"]


def test_without_topology_file_the_nic_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    record = measured(Wire(fabric(devices=False), lambda rank: rank), monkeypatch, "same_rail")
    assert record.path is not None
    assert record.path.reason == "rank 0: no topology file says which NIC is whose"


SOCKETS = PathRecord(links=["NET/Socket", "P2P/CUMEM"], network="Socket")
TWO_NODES = Topology.from_hosts(["n0", "n0", "n1", "n1"])


@pytest.mark.parametrize(
    ("topology", "group", "before", "accused"),
    [
        (TWO_NODES, "world", None, True),
        (TWO_NODES, "world", SOCKETS, True),
        (TWO_NODES, "rail", SOCKETS, True),
        (TWO_NODES, "node", SOCKETS, False),
        (TWO_NODES, "node", PathRecord(links=["P2P/CUMEM"]), True),
        (TWO_NODES, "node", None, True),
        (Topology.single_node(4), "world", SOCKETS, True),
    ],
)
def test_socket_note_is_for_the_cases_own_sockets(
    topology: Topology, group: str, before: PathRecord | None, accused: bool
) -> None:
    """NCCL's log names what every case of the process so far took."""

    class Played(Telemetry):
        """Speaks for all ranks; no thread has a library to ask."""

        def before(self) -> list[Evidence]:
            return [Evidence(path=before)] * 4

        def after(self) -> list[Evidence]:
            return [Evidence(path=SOCKETS)] * 4

    def main(transport: ThreadTransport) -> Any:
        case = Case(pattern="all_reduce", nbytes=4096, params={"group": group})
        return run_case(case, transport, topology, Settings(iterations=6), telemetry=Played(transport))

    found = play(4, main)[0]
    assert found is not None
    assert found.record.path is not None
    assert found.record.path.links == SOCKETS.links
    assert ("NCCL used sockets (NET/Socket): this is not the fabric's speed" in found.record.notes) is accused


# By hand


def wanted(nbytes: int, launches: int = 1) -> ExpectedTraffic:
    return ExpectedTraffic(bytes_2R=np.full((2, 6), nbytes, np.int64), launches=launches)


def all_but(rank: int, one: Counted, nbytes: int = 100 * MEGABYTE) -> list[Counted]:
    found = [Counted(device=f"nic{r}", sent=nbytes, received=nbytes) for r in range(6)]
    found[rank] = one
    return found


@pytest.mark.parametrize(
    ("share", "proof_"),
    [(0.94, "contradicted"), (0.96, "proven"), (1.0, "proven"), (1.12, "proven"), (1.2, "unverified")],
)
def test_five_percent_and_protocols_are_allowed(share: float, proof_: str) -> None:
    one = Counted(device="nic4", sent=int(share * 100 * MEGABYTE), received=100 * MEGABYTE)
    path = reconcile(wanted(100 * MEGABYTE), all_but(4, one), fabric())
    assert path.proof == proof_
    assert (path.reason is not None) == (proof_ != "proven")
    if proof_ != "proven":
        assert "nic4 of n2 (rank 4, rail 0) sent" in known(path.reason)


def test_control_messages_of_many_launches_are_allowed() -> None:
    one = Counted(device="nic4", sent=140 * MEGABYTE, received=100 * MEGABYTE)
    assert reconcile(wanted(100 * MEGABYTE, 1), all_but(4, one), fabric()).proof == "unverified"
    assert reconcile(wanted(400 * MEGABYTE, 5000), all_but(4, one), fabric()).proof == "contradicted"


def test_contradiction_outweighs_an_unreadable_nic() -> None:
    blind = Counted(device="nic4", reason="the counters of nic4 cannot be read")
    found = all_but(4, blind)
    path = reconcile(wanted(100 * MEGABYTE), found, fabric())
    assert (path.proof, path.reason) == ("unverified", "rank 4: the counters of nic4 cannot be read")
    assert [rail.sent is None for rail in known(known(path.counters).rails)] == [True, False]
    found[1] = Counted(device="nic1", sent=0, received=0)
    assert reconcile(wanted(100 * MEGABYTE), found, fabric()).proof == "contradicted"


def test_a_narrow_counter_that_may_have_wrapped_twice_proves_nothing() -> None:
    huge = 1 << 33
    one = Counted(device="nic4", sent=huge, received=huge, narrow=True)
    path = reconcile(wanted(huge), all_but(4, one, huge), fabric())
    assert path.reason == "a counter of 32 bits of rank 4 wrapped, perhaps more than once"
    once = Counted(device="nic4", sent=100 * MEGABYTE, received=100 * MEGABYTE, narrow=True)
    assert reconcile(wanted(100 * MEGABYTE), all_but(4, once), fabric()).proof == "proven"


def test_risen_counters_are_recorded_and_noted() -> None:
    sick = Counted(device="nic4", sent=100 * MEGABYTE, received=100 * MEGABYTE, health={"nic4": {"symbol_error": 7}})
    path = reconcile(wanted(100 * MEGABYTE), all_but(4, sick), fabric())
    assert known(path.counters).moved == [CounterMove(rank=4, port="nic4", counter="symbol_error", by=7)]
    assert proof_notes(path) == ["symbol_error of nic4 (rank 4) rose by 7"]
    assert proof_notes(None) == proof_notes(PathRecord(version="2.27")) == []


def test_pxn_choice_of_nccl_is_not_guessed() -> None:
    """Where PXN would put other bytes on a NIC, nothing is proven unless the process was started one way."""
    topology = fabric()
    hot = flow_schedule(Case(pattern="x", nbytes=64), topology, Round("r", np.array([0]), np.array([3])))
    assert "PXN" in expected_traffic([hot], [1], topology, capabilities_of("nccl")).reason
    straight = build_variants(Case(pattern="same_rail", nbytes=MEGABYTE), topology)
    assert expected_traffic(straight, [1, 1], topology, capabilities_of("nccl")).reason == ""


# Reading


def write(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name).write_text(f"{value}\n")


@pytest.fixture
def sys(tmp_path: Path) -> Path:
    """A host with one InfiniBand port and one Ethernet interface."""
    port = tmp_path / "class/infiniband/mlx5_0/ports/1"
    write(port / "counters", port_xmit_data=1000, port_rcv_data=500, symbol_error=3, port_xmit_packets=9)
    write(port / "hw_counters", out_of_sequence=2, np_cnp_sent=5, np_ecn_marked_roce_packets=4, rx_read_requests=8)
    (tmp_path / "class/infiniband/mlx5_0/device/net/ib0").mkdir(parents=True)
    write(tmp_path / "class/net/eth0/statistics", tx_bytes=70, rx_bytes=80, rx_dropped=1, tx_packets=6)
    write(tmp_path / "class/net/eth0", carrier_changes=2)
    return tmp_path


def pauses(interface: str) -> dict[str, int]:
    return {f"rx_prio3_pause_of_{interface}": 11, "rx_packets": 5}


def test_infiniband_counts_words_and_ethernet_counts_bytes(sys: Path) -> None:
    ports = read_ports(["mlx5_0", "eth0"], sys, pauses)
    assert ports["mlx5_0:1"] == Port(
        4,
        1000,
        500,
        {
            "symbol_error": 3,
            "out_of_sequence": 2,
            "np_cnp_sent": 5,
            "np_ecn_marked_roce_packets": 4,
            "rx_prio3_pause_of_ib0": 11,
        },
    )
    assert ports["eth0"] == Port(1, 70, 80, {"rx_dropped": 1, "carrier_changes": 2, "rx_prio3_pause_of_eth0": 11})
    assert read_ports([], sys, pauses)["eth0"].health == {}
    assert read_ports([], sys / "nowhere") == {}


def test_a_case_is_the_difference_of_two_readings(sys: Path) -> None:
    before = read_ports(["mlx5_0"], sys, pauses)
    write(sys / "class/infiniband/mlx5_0/ports/1/counters", port_xmit_data=1100, port_rcv_data=700, symbol_error=5)
    write(sys / "class/net/eth0/statistics", tx_bytes=71)
    found = count(before, read_ports(["mlx5_0"], sys, pauses), "mlx5_0")
    assert (found.sent, found.received, found.narrow, found.reason) == (400, 800, False, "")
    assert found.health == {"mlx5_0:1": {"symbol_error": 2}}
    assert found.others == {"eth0": (1, 0)}


def test_wrapped_32_bit_counter_is_counted(sys: Path) -> None:
    counters = sys / "class/infiniband/mlx5_0/ports/1/counters"
    write(counters, port_xmit_data=(1 << 32) - 100)
    before = read_ports([], sys)
    write(counters, port_xmit_data=50)
    found = count(before, read_ports([], sys), "mlx5_0:1")
    assert (found.sent, found.narrow) == (4 * 150, True)


@pytest.mark.parametrize(
    ("before", "after", "steps"),
    [
        (5, 9, 4),
        (9, 9, 0),
        ((1 << 32) - 1, 3, 4),
        (1 << 32, 3, None),
        (7, (1 << 32) - 1, None),
        (1 << 40, 1 << 41, 1 << 40),
    ],
)
def test_how_far_a_counter_moved(before: int, after: int, steps: int | None) -> None:
    assert moved(before, after) == steps


def test_reset_error_counter_did_not_rise() -> None:
    assert count({"a": Port(1, 0, 0, {"err": 5})}, {"a": Port(1, 9, 9, {"err": 0})}, "a").health == {}


def test_falling_counter_gives_no_bytes() -> None:
    found = count({"a": Port(1, 1 << 40, 0)}, {"a": Port(1, 5, 0)}, "a")
    assert (found.sent, found.reason) == (None, "a counter of a went backwards or stands at its end")


def test_missing_or_unreadable_port_is_named(sys: Path) -> None:
    ports = read_ports([], sys)
    assert own_ports(ports, "eth7") == ([], "this host has no port eth7; it has mlx5_0:1, eth0")
    (sys / "class/net/eth0/statistics/tx_bytes").unlink()
    assert own_ports(read_ports([], sys), "eth0") == (["eth0"], "the counters of eth0 cannot be read")
    write(sys / "class/net/eth0/statistics", tx_bytes="denied")
    assert own_ports(read_ports([], sys), "eth0")[1] == "the counters of eth0 cannot be read"
    assert count(read_ports([], sys), read_ports([], sys), "eth0").sent is None
    assert own_ports({}, "eth0")[1] == "this host has no port eth0; it has none that can be read"


def test_planes_of_a_nic_add_up() -> None:
    before = {"a": Port(1, 0, 0), "b": Port(4, 0, 0)}
    found = count(before, {"a": Port(1, 10, 20), "b": Port(4, 1, 2)}, "a,b")
    assert (found.device, found.sent, found.received) == ("a,b", 14, 28)


def test_a_driver_without_counters_says_nothing() -> None:
    assert driver_counters("no-such-interface") == {}
    assert all(isinstance(value, int) for value in driver_counters("lo").values())


# Segments that TCP sent again


def linked(
    lost: dict[tuple[int, int], int], segments: int = 1000, peers: Sequence[tuple[int, int]] = ()
) -> list[Counted]:
    """Six ranks, all connected (or `peers` alone), of whose segments those of `lost` were sent again."""
    pairs = peers or [(a, b) for a in range(6) for b in range(6) if a != b]
    connections: list[dict[str, tuple[int, int]]] = [{} for _ in range(6)]
    for a, b in pairs:
        connections[a][f"10.0.0.{a}:{min(a, b)} 10.0.0.{b}:{max(a, b)}"] = (segments, lost.get((a, b), 0))
        connections[b].setdefault(f"10.0.0.{b}:{max(a, b)} 10.0.0.{a}:{min(a, b)}", (0, 0))
    return [
        Counted(device=f"nic{r}", sent=100 * MEGABYTE, received=100 * MEGABYTE, connections=connections[r])
        for r in range(6)
    ]


def keyed(lost: dict[tuple[int, int], int], **more: Any) -> list[tuple[int, str]]:
    path = reconcile(wanted(100 * MEGABYTE), linked(lost, **more), fabric())
    return [(known(one.rank), known(one.counter)) for one in known(known(path.counters).moved)]


SENDING = {(2, b): 10 for b in (0, 1, 3, 4, 5)}
RECEIVING = {(a, 2): 10 for a in (0, 1, 3, 4, 5)}


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ({}, []),
        (SENDING, [(2, "tcp_lost_sending")]),
        (RECEIVING, [(2, "tcp_lost_receiving")]),
        ({**SENDING, **RECEIVING}, [(2, "tcp_lost_sending"), (2, "tcp_lost_receiving")]),
        ({(2, 0): 50}, []),  # one pair that loses is a path, and no NIC
        (dict.fromkeys(SENDING, 1), []),  # one in a thousand is what a busy machine does
        ({**SENDING, (0, 1): 2, (4, 3): 1}, [(2, "tcp_lost_sending")]),
    ],
)
def test_losing_nic_is_named_without_its_peers(lost: dict[tuple[int, int], int], named: list[Any]) -> None:
    assert keyed(lost) == named


def test_ends_without_other_peers_are_both_named() -> None:
    pairs = [(0, 2), (2, 0), (1, 3), (3, 1)]
    assert sorted(keyed({(0, 2): 9}, peers=pairs)) == [(0, "tcp_lost_sending"), (2, "tcp_lost_receiving")]


def test_retransmits_are_recorded_per_pair_if_any() -> None:
    path = reconcile(wanted(100 * MEGABYTE), linked({(2, 0): 5}, peers=[(2, 0), (1, 3)]), fabric())
    assert known(path.counters).repeats == Retransmits(src=[1, 2], dst=[3, 0], segments=[1000, 1000], again=[0, 5])
    assert known(reconcile(wanted(100 * MEGABYTE), linked({}), fabric()).counters).repeats is None
    strangers = [Counted(connections={"10.0.0.1:1 10.9.9.9:9": (100, 50)}), Counted()]
    assert retransmits_by_pair(strangers) is None, "no rank here is its far end"
