"""Host detection, topology files of Slurm and NCCL, and ``ncclbench topo``."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ncclbench.cli.topo import command
from ncclbench.errors import EnvironmentFault, UsageError
from ncclbench.launch.rank_session import detect_rank
from ncclbench.measure.case import run_case
from ncclbench.plan.plan import Settings
from ncclbench.schedule import Case
from ncclbench.topology import Topology
from ncclbench.topology import host_detection as detect
from ncclbench.topology.host_detection import NvlinkClique, detect_host, natural_key, nearest_nics
from ncclbench.topology.nccl_xml import nccl_xml
from ncclbench.topology.placement import RankDetection, place_detected_ranks, place_ranks, straddling
from ncclbench.topology.render import host_dot, host_lines
from ncclbench.topology.slurm import slurm_conf, slurm_yaml
from ncclbench.topology.topology_file import read_topology
from ncclbench.transports.threads import play
from tests.helpers.stored import known

GPUS = ("0000:0b:00.0", "0000:9b:00.0")


def write(file: Path, text: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


def device(sys: Path, root: str, bridge: str, address: str) -> Path:
    """A PCI device below a bridge of a root complex; returns its folder."""
    real = sys / f"devices/pci{root}/{bridge}/{address}"
    real.mkdir(parents=True)
    link = sys / "bus/pci/devices" / address
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(real)
    return real


@pytest.fixture
def sys(tmp_path: Path) -> Path:
    """A host of two GPUs, each with an RDMA port behind its own bridge, and one RDMA port of storage that is down."""
    for root, bridge, gpu, nic, name, layer in (
        ("0000:0a", "0000:0a:01.0", GPUS[0], "0000:0c:00.0", "mlx5_10", "InfiniBand"),
        ("0000:9a", "0000:9a:01.0", GPUS[1], "0000:9c:00.0", "mlx5_9", "Ethernet"),
    ):
        real = device(tmp_path, root, bridge, gpu)
        write(real / "vendor", "0x10de")
        write(real / "class", "0x030200")
        infiniband(tmp_path, device(tmp_path, root, bridge, nic), name, layer, "4: ACTIVE")
    infiniband(tmp_path, device(tmp_path, "0000:0a", "0000:0a:02.0", "0000:0d:00.0"), "mlx5_0", "InfiniBand", "1: DOWN")
    write(tmp_path / "class/net/eth0/speed", 25000)
    (tmp_path / "class/net/eth0/device").symlink_to(device(tmp_path, "0000:9a", "0000:9a:02.0", "0000:9d:00.0"))
    write(tmp_path / "class/net/eth0/operstate", "up")
    write(tmp_path / "class/net/eth0/address", "02:00:00:00:00:01")
    write(tmp_path / "class/net/lo/operstate", "unknown")
    return tmp_path


def infiniband(sys: Path, real: Path, name: str, layer: str, state: str) -> None:
    folder = sys / "class/infiniband" / name
    write(folder / "ports/1/link_layer", layer)
    write(folder / "ports/1/rate", "400 Gb/sec (4X NDR)")
    write(folder / "ports/1/state", state)
    write(folder / "node_guid", f"guid of {name}")
    (folder / "device").symlink_to(real)


def test_ports_have_kind_rate_state_and_guid(sys: Path) -> None:
    host = detect_host(sys, "n0")
    shown = [(port.device, port.kind, port.gbit_per_s, port.up, port.guid, port.pci) for port in host.ports]
    assert shown == [
        ("mlx5_0", "InfiniBand", 400.0, False, "guid of mlx5_0", "0000:0d:00.0"),
        ("mlx5_9", "RoCE", 400.0, True, "guid of mlx5_9", "0000:9c:00.0"),
        ("mlx5_10", "InfiniBand", 400.0, True, "guid of mlx5_10", "0000:0c:00.0"),
        ("eth0", "Ethernet", 25.0, True, "02:00:00:00:00:01", "0000:9d:00.0"),
    ]
    assert host.gpus == list(GPUS)


def test_gpu_uses_the_nearest_port_that_is_up(sys: Path) -> None:
    host = detect_host(sys)
    hops = {port.device: port.hops for port in host.ports}
    assert hops["mlx5_10"][0] < hops["mlx5_0"][0] < hops["mlx5_9"][0]
    assert nearest_nics(host) == ["mlx5_10", "mlx5_9"]
    write(sys / "class/infiniband/mlx5_10/ports/1/state", "1: DOWN")
    write(sys / "class/infiniband/mlx5_9/ports/1/state", "1: DOWN")
    assert nearest_nics(detect_host(sys)) == ["", ""]


def test_host_without_gpus_is_reported(tmp_path: Path) -> None:
    host = detect_host(tmp_path, "bare")
    assert (host.gpus, host.ports) == ([], [])
    assert "no GPU here" in "\n".join(host_lines(host))


def test_speed_of_a_virtual_interface_is_ignored(tmp_path: Path) -> None:
    write(tmp_path / "class/net/veth0/speed", 10000)
    assert [port.gbit_per_s for port in detect_host(tmp_path).ports] == [None]


def test_numbers_in_names_sort_numerically() -> None:
    assert sorted(["mlx5_10", "mlx5_9", "eth0", "mlx5_1", "0"], key=natural_key) == [
        "0",
        "eth0",
        "mlx5_1",
        "mlx5_9",
        "mlx5_10",
    ]


def test_nvml_domain_counts_only_when_ready() -> None:
    uuid = bytes(range(16))
    ready = detect.ready_clique(uuid, 3, 7)
    assert ready == NvlinkClique(cluster=uuid.hex(), clique=7)
    assert detect.ready_clique(uuid, 2, 7) is None
    assert detect.ready_clique(bytes(16), 3, 0) is None


def test_detected_nics_determine_the_rails() -> None:
    hosts = ["a", "a", "b", "b"]
    found = [RankDetection(nic=nic, gbit_per_s=400) for nic in ("mlx5_10", "mlx5_9", "mlx5_9", "mlx5_10")]
    topology = place_detected_ranks(hosts, found)
    assert topology.rails.tolist() == [1, 0, 0, 1]
    assert topology.sources["rail"].startswith("each rank's own NIC (nearest to its GPU")
    assert topology.wiring is not None
    assert topology.wiring.devices == ("mlx5_10", "mlx5_9", "mlx5_9", "mlx5_10")
    assert set(topology.wiring.nic_gbit_per_s) == {400.0}
    assert known(topology.as_record().wiring).leaves == [None] * 4


@pytest.mark.parametrize("nics", [("mlx5_0", ""), ("mlx5_0", "mlx5_0")])
def test_rails_are_assumed_without_a_nic_per_rank(nics: tuple[str, str]) -> None:
    topology = place_detected_ranks(["a", "a"], [RankDetection(nic=nic) for nic in nics])
    assert topology.sources["rail"] == "assumed from the place of a rank on its node"
    assert topology.wiring is None


def test_hosts_of_one_clique_are_one_domain() -> None:
    found = [RankDetection(domain="c/1"), RankDetection(domain="c/1"), RankDetection(domain="c/2"), RankDetection()]
    topology = place_detected_ranks(["a", "b", "c", "d"], found)
    assert topology.domains.tolist() == [0, 0, 1, 2]
    assert topology.sources["domain"].startswith("NVML")


@pytest.mark.parametrize(
    ("hosts", "size", "words"),
    [
        ("aabb", 2, ""),
        (
            "abab",
            2,
            "2 of 2 expert-parallel groups of 2 straddle NVLink domains (ranks 0 to 1 sit in 2 NVLink domains)",
        ),
        ("abab", 2, "place consecutive ranks in one domain"),
        ("aabb", 4, "none here holds more than 2 ranks"),
        ("aabb", 3, ""),
        ("aabb", 8, ""),
        ("abab", 1, ""),
    ],
)
def test_groups_across_domains_are_warned_about(hosts: str, size: int, words: str) -> None:
    warning = straddling(Topology.from_hosts(hosts), size)
    assert words in warning
    assert bool(words) == bool(warning)


def test_record_notes_groups_across_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    from ncclbench_patterns import all_to_all

    class Params(all_to_all.Params, frozen=True):
        ep: int = 0

    monkeypatch.setattr(all_to_all, "Params", Params)
    topology, case = Topology.from_hosts("abab"), Case(pattern="all_to_all", nbytes=64, params={"ep": 2})
    measured = play(4, lambda t: run_case(case, t, topology, Settings(iterations=6)))[0]
    assert measured is not None
    assert any("expert-parallel groups of 2 straddle" in note for note in measured.record.notes)


@pytest.mark.parametrize(
    ("gpu", "interface", "found"),
    [
        (GPUS[0].upper(), "eth0", RankDetection(nic="mlx5_10", gbit_per_s=400.0)),
        ("0000:ff:00.0", "eth0", RankDetection()),
        (None, "eth0", RankDetection(nic="eth0", gbit_per_s=25.0)),
        (None, "lo", RankDetection()),
        (None, "", RankDetection()),
    ],
)
def test_rank_detects_its_nic(
    gpu: str | None, interface: str, found: RankDetection, sys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, "SYS", sys)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    assert detect_rank(gpu) == found


# Files of Slurm and NCCL

CONF = """
# two leaves under one spine
SwitchName=s0 Nodes=n[0-1] LinkSpeed=400
SwitchName=s1 Nodes=n[2-3]
SwitchName=root Switches=s[0-1]
BlockName=b0 Nodes=n[0-3]
BlockSizes=4
"""
YAML = """
- topology: other
  tree:
    switches: [{switch: x, nodes: "m[0-9]"}]
- topology: main
  cluster_default: true
  tree:
    switches:
      - {switch: root, children: "s[0-1]"}
      - {switch: s0, nodes: "n[0-1]"}
      - {switch: s1, nodes: "n[2-3]"}
- topology: racks
  block:
    block_sizes: [4]
    blocks: [{block: b0, nodes: "n[0-3]"}]
"""


@pytest.mark.parametrize(("name", "text"), [("topology.conf", CONF), ("topology.yaml", YAML)])
def test_slurm_switches_and_blocks(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    topology = place_ranks(read_topology(tmp_path / name), [f"n{k // 2}" for k in range(8)])
    assert topology.nodes.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert topology.rails.tolist() == [0, 1] * 4
    assert topology.domains.tolist() == [0] * 8
    assert topology.wiring is not None
    assert [topology.wiring.leaf_names[leaf] for leaf in topology.wiring.leaves] == ["s0"] * 4 + ["s1"] * 4
    assert topology.wiring.uplinks.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("SwitchName=a Nodse=n1", "line 1: unknown key nodse; known: switchname, nodes"),
        ("Speed=3", "line 1: neither SwitchName="),
        ("SwitchName=a Nodes=n[0-", "line 1: nodes: not a list of nodes"),
        ("SwitchName=a Nodes=n[0-99999999999]", "names in one pair of brackets"),
        ("SwitchName=a Nodes=n0\nSwitchName=b Nodes=n0", "n0 is on a and on b"),
        ("SwitchName=a Switches=b", "a has a switch 'b', which is not in the file"),
        (
            "SwitchName=l Nodes=n0\nSwitchName=a Switches=b,l\nSwitchName=b Switches=a",
            "a cycle of switches: a -> b -> a",
        ),
        ("", "it needs SwitchName= or BlockName= with Nodes="),
        ("SwitchName=a Switches=b\nSwitchName=b Switches=a", "no switch and no block has nodes"),
    ],
)
def test_invalid_topology_conf_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "topology.conf").write_text(text)
    with pytest.raises(UsageError, match=r"topology\.conf: ") as caught:
        read_topology(tmp_path / "topology.conf")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not a YAML file"),
        ("a: 1", "a list of topologies"),
        ("- tree: {switches: [1]}", "must be a list of entries with a key 'switch'"),
        ("- tree: {switches: {switch: a}}", "must be a list of entries with a key 'switch'"),
        ("!!python/object/apply:os.system [ls]", "not a YAML file"),
    ],
)
def test_invalid_topology_yaml_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=r"^t\.yaml: ") as caught:
        slurm_yaml(text, "t.yaml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_pyyaml_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(EnvironmentFault, match="pip install pyyaml"):
        slurm_yaml(YAML, "t.yaml")


XML = """<system version="1">
 <cpu numaid="0">
  <pci busid="0000:0a:00.0">
   <pci busid="0000:0b:00.0"><gpu dev="1" sm="90" rank="1"/></pci>
   <pci busid="0000:0c:00.0"><nic><net name="mlx5_1" dev="1" speed="400000" port="1"/></nic></pci>
  </pci>
  <pci busid="0000:1a:00.0">
   <pci busid="0000:1b:00.0"><gpu dev="0" sm="90" rank="0"/></pci>
   <pci busid="0000:1c:00.0"><nic><net name="mlx5_7" dev="0" speed="200000" port="2"/></nic></pci>
  </pci>
  <nic><net name="eth0" dev="2" speed="0" port="0"/></nic>
 </cpu>
</system>
"""


def test_nccl_xml_describes_every_host(tmp_path: Path) -> None:
    (tmp_path / "nccl.xml").write_text(XML)
    topology = place_ranks(read_topology(tmp_path / "nccl.xml"), ["a", "a", "b", "b"])
    assert topology.node_names == ("a", "b")
    assert topology.rails.tolist() == [0, 1, 0, 1]
    assert topology.wiring is not None
    assert topology.wiring.devices == ("mlx5_7:2", "mlx5_1", "mlx5_7:2", "mlx5_1")
    assert topology.wiring.nic_gbit_per_s.tolist() == [200.0, 400.0] * 2


def test_host_without_gpus_has_a_rail_per_nic() -> None:
    (node,) = nccl_xml(XML.replace("<gpu", "<was"), "t.xml").node
    assert [(nic.rail, nic.device, nic.gbit_per_s) for nic in node.nic] == [
        (0, "mlx5_1", 400.0),
        (1, "mlx5_7:2", 200.0),
        (2, "eth0", None),
    ]


BOMB = '<!DOCTYPE s [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><system><net name="&b;"/></system>'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "a document type"),
        ('<!DOCTYPE s SYSTEM "file:///etc/passwd"><s/>', "a document type"),
        ("<system><cpu></system>", "not an XML file: mismatched tag"),
        ("", "not an XML file"),
        ("<system/>", "no <net> element"),
        ('<net speed="1"/>', "a <net> without a usable name"),
        ('<net name="a b" speed="1"/>', "a <net> without a usable name: 'a b'"),
        ('<net name="a" speed="fast"/>', "speed of a is no number: 'fast'"),
        ("<s>" * 200_000, "not an XML file"),
    ],
)
def test_invalid_or_hostile_xml_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=r"^t\.xml: ") as caught:
        nccl_xml(text, "t.xml")
    assert words in str(caught.value)


def test_conf_without_blocks_has_a_domain_per_node() -> None:
    assert slurm_conf("SwitchName=a Nodes=n[0-1]", "t.conf").domain == ()


# The command


def topo(*arguments: object) -> str:
    result = CliRunner().invoke(command, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    file = tmp_path / "topology.conf"
    file.write_text(CONF.replace("BlockName=b0 Nodes=n[0-3]", "BlockName=b0 Nodes=n[0-1]\nBlockName=b1 Nodes=n[2-3]"))
    return file


def test_topo_shows_this_host_and_its_sources(sys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "SYS", sys)
    text = topo()
    assert "InfiniBand mlx5_10: 400 Gbit/s, up, guid of mlx5_10, PCI 0000:0c:00.0, 2/6 steps from the GPUs" in text
    assert f"GPU {GPUS[1]}: NIC mlx5_9, NVLink domain: this host" in text
    assert f"nics: {sys}/class/infiniband: 3 ports; {sys}/class/net: 1 interfaces" in text
    assert json.loads(topo("--json"))["ports"][0]["device"] == "mlx5_0"
    dot = topo("--dot").splitlines()
    assert (dot[0], dot[-1]) == ("graph host {", "}")
    assert dot == host_dot(detect_host(sys))


def test_topo_shows_a_file_and_groups_across_domains(conf: Path) -> None:
    text = topo("--topology", conf, "--ep", 4)
    assert text.startswith("Slurm: 4 nodes, 2 NVLink domains, 1 rail, 2 leaves, 1 spine, 1 site\n")
    assert "  rank 2: n2, rail 0, domain 1, leaf s1" in text
    assert "  domain: topology file" in text
    assert "! 1 of 1 expert-parallel groups of 4 straddle NVLink domains" in text
    assert "!" not in topo("--topology", conf, "--ep", 2)
    record = json.loads(topo("--topology", conf, "--json", "--ep", 4))
    assert record["domains"] == [0, 0, 1, 1]
    assert len(record["warnings"]) == 1
    assert '  "s0" -- "root";' in topo("--topology", conf, "--dot").splitlines()


def test_nccl_xml_places_the_ranks_of_one_host(tmp_path: Path) -> None:
    (tmp_path / "t.xml").write_text(XML)
    assert "rank 1: any-host, rail 1, domain 0, NIC mlx5_1" in topo("--topology", tmp_path / "t.xml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--json", "--dot"], "exclude each other"),
        (["--ep", "2"], "need --topology"),
        (["--topology", "none.toml"], "cannot read the topology none.toml"),
        (["--topology", "CONF", "--ep", "3"], "--ep 3 does not divide 4 ranks"),
        (["--topology", "CONF", "--ranks", "9"], "fewer than 9 ranks"),
        (["--topology", "CONF", "--ranks", str(10**20)], "more than the 1048576 that can be laid out"),
    ],
)
def test_topo_refuses(arguments: list[str], words: str, conf: Path) -> None:
    result = CliRunner().invoke(command, [str(conf) if one == "CONF" else one for one in arguments])
    assert isinstance(result.exception, UsageError)
    assert words in str(result.exception)


def test_large_topology_is_cut_in_text_only(tmp_path: Path) -> None:
    (tmp_path / "topology.conf").write_text("SwitchName=a Nodes=n[000-199]")
    assert "  and 136 more ranks; --json has them all" in topo("--topology", tmp_path / "topology.conf")
    assert np.unique(json.loads(topo("--topology", tmp_path / "topology.conf", "--json"))["nodes"]).size == 200
