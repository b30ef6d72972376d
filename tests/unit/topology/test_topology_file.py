"""Topology files: valid and invalid content, and the placement of ranks."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ncclbench.cli.run import command as run_command
from ncclbench.errors import UsageError
from ncclbench.store.run_directory import read_run
from ncclbench.topology import Link, Topology
from ncclbench.topology.placement import place_ranks, plan_placement
from ncclbench.topology.topology_file import parse_topology, read_topology
from tests.helpers.stored import known

LAB = """
schema = 1
name = "lab 2x2"
[[node]]
name = "n0"
site = "a"
[[node.nic]]
rail = 0
device = "rail0"
leaf = "leaf0"
gbit_per_s = 0.1
[[node.nic]]
rail = 1
device = "rail1"
leaf = "leaf1"
gbit_per_s = 0.1
[[node]]
name = "n1.cluster"
site = "b"
[[node.nic]]
rail = 0
device = "rail0"
leaf = "leaf0"
gbit_per_s = 0.1
[[node.nic]]
rail = 1
device = "rail1"
leaf = "leaf1"
[[leaf]]
name = "leaf0"
spines = ["spine0", "spine1"]
uplink_gbit_per_s = 0.4
[[leaf]]
name = "leaf1"
spines = ["spine0"]
uplink_gbit_per_s = 0.4
[[spine]]
name = "spine0"
gbit_per_s = 0.3
[[spine]]
name = "spine1"
"""
HOSTS = ["n0", "n0", "n1", "n1"]
RANKS = """
[[rank]]
rank = 0
node = "n1.cluster"
rail = 1
[[rank]]
rank = 1
node = "n0"
"""


def refusal(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_topology(text, "lab.toml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(("lab.toml: ", "lab.toml has schema "))
    return str(caught.value)


def test_ranks_are_placed_by_host_name() -> None:
    topology = place_ranks(parse_topology(LAB, "lab.toml"), HOSTS)
    assert topology.nodes.tolist() == [0, 0, 1, 1]
    assert topology.node_names == ("n0", "n1.cluster")
    assert topology.domains.tolist() == [0, 0, 1, 1]
    assert topology.rails.tolist() == [0, 1, 0, 1]
    assert topology.sites.tolist() == [0, 0, 1, 1]
    assert topology.link_classes(0, 2) == Link.CROSS_SITE
    assert topology.wiring is not None
    assert topology.wiring.devices == ("rail0", "rail1", "rail0", "rail1")
    assert topology.wiring.leaves.tolist() == [0, 1, 0, 1]
    np.testing.assert_array_equal(topology.wiring.nic_gbit_per_s, [0.1, 0.1, 0.1, np.nan])
    # Leaf 0 has an uplink of 0.4 into a port of 0.3, and one of 0.4 into a port of unknown speed.
    assert topology.wiring.uplink_gbit_per_s.tolist() == pytest.approx([0.7, 0.3])


def test_assumptions_are_in_the_sources() -> None:
    sources = place_ranks(parse_topology(LAB, "lab.toml"), HOSTS).sources
    assert sources["node"] == "host name of each rank, looked up in topology file lab.toml"
    assert sources["rail"].startswith("assumed: ranks take the rails")
    assert sources["domain"].endswith("names none: one NVLink domain per node")
    assert sources["site"] == "topology file lab.toml"


def test_ranks_of_the_file_are_placed_without_host_names() -> None:
    topology = place_ranks(parse_topology(LAB + RANKS, "lab.toml"), ["elsewhere", "n0"])
    assert [topology.node_names[node] for node in topology.nodes] == ["n1.cluster", "n0"]
    assert topology.rails.tolist() == [1, 0]
    assert topology.sources["node"].endswith("[[rank]]; 1 rank reports another host name than the file gives them")


def test_ranks_without_a_rail_get_free_rails() -> None:
    topology = place_ranks(parse_topology(LAB + RANKS, "lab.toml"), ["x", "n0", "n1", "n0"])
    assert topology.rails.tolist() == [1, 0, 0, 1]


def test_planes_of_a_rail_add_up() -> None:
    text = LAB.replace("rail = 1\ndevice", "rail = 0\nplane = 1\ndevice")
    topology = place_ranks(parse_topology(text, "lab.toml"), ["n0", "n1"])
    assert topology.wiring is not None
    assert topology.wiring.devices == ("rail0,rail1", "rail0,rail1")
    assert topology.wiring.nic_gbit_per_s[0] == pytest.approx(0.2)


def test_several_nodes_in_a_domain() -> None:
    text = LAB.replace('site = "a"', 'domain = "rack"').replace('site = "b"', 'domain = "rack"')
    text += '[[domain]]\nname = "rack"\ngbit_per_s = 7200\n'
    topology = place_ranks(parse_topology(text, "lab.toml"), HOSTS)
    assert topology.domains.tolist() == [0, 0, 0, 0]
    assert topology.link_classes(0, 2) == Link.DOMAIN
    assert topology.wiring is not None
    assert topology.wiring.domain_gbit_per_s.tolist() == [7200.0] * 4


def test_manifest_has_wiring_and_file_hash(tmp_path: Path) -> None:
    file = tmp_path / "lab.toml"
    file.write_text(LAB)
    record = place_ranks(read_topology(file), HOSTS).as_record()
    assert known(record.wiring).nic_gbit_per_s == [0.1, 0.1, 0.1, None]
    assert known(record.wiring).leaf_names == ["leaf0", "leaf1"]
    assert record.sources["file"] == f"{file} sha256:{hashlib.sha256(LAB.encode()).hexdigest()}"


def test_planned_ranks_follow_the_files_order() -> None:
    found = parse_topology(LAB, "lab.toml")
    assert plan_placement(found, 3).nodes.tolist() == [0, 0, 1]
    with pytest.raises(UsageError, match="4 rails on all its nodes, fewer than 5 ranks"):
        plan_placement(found, 5)
    assert plan_placement(parse_topology(LAB + RANKS, "lab.toml"), 2).rails.tolist() == [1, 0]


def test_8192_ranks_are_placed_and_stay_small() -> None:
    lines = ["schema = 1"]
    for node in range(1024):
        lines += ["[[node]]", f'name = "n{node}"']
        for rail in range(8):
            lines += ["[[node.nic]]", f"rail = {rail}", f'leaf = "l{rail}"', "gbit_per_s = 400"]
    for rail in range(8):
        lines += ["[[leaf]]", f'name = "l{rail}"']
    topology = place_ranks(parse_topology("\n".join(lines), "big.toml"), [f"n{r // 8}" for r in range(8192)])
    assert isinstance(topology, Topology)
    assert topology.grid().shape == (1024, 1, 8)
    assert topology.nodes.nbytes == 8192 * 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("schema = 1\nnode = 3", "node must be a list: write [[node]], not [node]"),
        ("[[node]]\nnam = 'x'", "unknown key node[0].nam; did you mean 'name'? known: name, domain, site, leaf, nic"),
        ("[[node]]\nname = 'x'\n[[node.nic]]\nrial = 0", "unknown key node[0].nic[0].rial; did you mean 'rail'?"),
        ("nodes = []", "unknown key nodes; did you mean 'node'?"),
        ("schema = 2\n[[host]]\nname = 'x'", "has schema 2; this ncclbench reads up to 1"),
        ('schema = 1\n[[node]]\nname = "a\\u001b[31m"', "'a\\x1b[31m' has characters that steer a terminal"),
        (LAB + f"[[rank]]\nrank = 0\nnode = 'n0'\nrail = {10**20}", "Expected `int` <= 1048575 - at `$.rank[0].rail`"),
        (f"schema = 1\n[[node]]\nname = 'a'\n[[node.nic]]\nrail = {10**20}", "Expected `int` <= 1048575"),
        ("schema = 1\nnode = []", "at least one [[node]]"),
        ("schema = 1", "missing required field `node`"),
        ("sha256 = 'x'\n[[node]]\nname = 'x'", "unknown key sha256"),
        ("a = = 1", "not a TOML file"),
        ("[[node]]\nname = 'x'\n[[node]]\nname = 'x'", "node x stands twice"),
        ("[[node]]\nname = ''", "a node has an empty name"),
        ("[[node]]\nname = 'x'\n[[node.nic]]\nrail = -1", "x: rail and plane count from 0"),
        ("[[node]]\nname = 'x'\n[[node.nic]]\nrail = '0'", "Expected `int`, got `str`"),
        ("[[node]]\nname = 'x'\n[[node.nic]]\nrail = 0\ngbit_per_s = 0", "x rail 0: gbit_per_s must be above 0"),
        ("[[node]]\nname = 'x'\n[[node.nic]]\nrail = 0\ngbit_per_s = nan", "x rail 0: gbit_per_s must be above 0"),
        (LAB.replace("rail = 1", "rail = 0"), "n0 has 2 NICs on rail 0, plane 0"),
        (LAB.replace('"rail1"', '"rail0"'), "n0 has rail0 on two rails or planes"),
        (
            LAB.replace('leaf = "leaf1"', 'leaf = "laef1"'),
            "n0 rail 1 is on leaf 'laef1', which is not in the file; did",
        ),
        (LAB.replace('["spine0"]', '["spine7"]'), "leaf1 has an uplink to spine 'spine7', which is not in the file"),
        (LAB + 'spines = ["spine1"]', "a cycle of switches: spine1 -> spine1"),
        (
            LAB.replace('"spine0"\ngbit', '"spine0"\nspines = ["spine1"]\ngbit') + 'spines = ["spine0"]',
            "a cycle of switches: spine0 -> spine1 -> spine0; a spine cannot be above itself",
        ),
        (
            LAB + '[[rank]]\nrank = 0\nnode = "n9"',
            "rank 0 is on node 'n9', which is not in the file; did you",
        ),
        (LAB + '[[rank]]\nrank = -1\nnode = "n0"', "ranks count from 0"),
        (LAB + '[[rank]]\nrank = 0\nnode = "n0"\nrail = 2', "rank 0 is on rail 2 of n0, whose NICs are on rails 0, 1"),
        (LAB + 2 * '[[rank]]\nrank = 0\nnode = "n0"\n', "rank 0 stands twice"),
        (
            LAB + "".join(f'[[rank]]\nrank = {k}\nnode = "n0"\nrail = 1\n' for k in (0, 3)),
            "ranks 0 and 3 are both on rail 1 of n0: one NIC cannot serve two ranks here",
        ),
        (LAB + '[[domain]]\nname = "rack"', "n0 is in domain 'n0', which is not in the file"),
    ],
)
def test_invalid_topology_file_is_refused_in_one_line(text: str, words: str) -> None:
    assert words in refusal(text)


@pytest.mark.parametrize(
    ("text", "hosts", "words"),
    [
        (LAB, ["n0", "n7"], "rank 1 reports the host name 'n7', and no node is called so; there are: n0, n1.cluster"),
        (LAB, ["n0", "n0", "n0"], "n0 has rails 0, 1, and ranks 0, 1, 2 are on it: two ranks would share one NIC"),
        (LAB + RANKS, ["n0"], "unknown rank 1: this job has ranks 0 to 0"),
    ],
)
def test_job_that_does_not_match_the_file_is_refused(text: str, hosts: list[str], words: str) -> None:
    found = parse_topology(text, "lab.toml")
    with pytest.raises(UsageError, match=r"^lab\.toml: ") as caught:
        place_ranks(found, hosts)
    assert words in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the topology"):
        read_topology(tmp_path / "none.toml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot read the topology"):
        read_topology(tmp_path / "binary")


def run_threads(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(run_command, [str(one) for one in arguments])
    return result.exit_code, f"{result.output}{result.exception or ''}"


def test_run_places_threads_by_the_file(tmp_path: Path) -> None:
    file, out = tmp_path / "lab.toml", tmp_path / "run"
    places = [f'[[rank]]\nrank = {r}\nnode = "{("n0", "n1.cluster")[r // 2]}"\nrail = {r % 2}\n' for r in range(4)]
    file.write_text(LAB + "".join(places))
    arguments = ["cross_rail", "-b", "4K", "-e", "4K", "-n", 6, "--transport", "threads", "--nproc", 4]
    code, text = run_threads(*arguments, "--topology", file, "-o", out)
    assert code == 0, text
    run = read_run(out)
    assert known(run.manifest.topology).node_names == ["n0", "n1.cluster"]
    assert known(run.manifest.topology).sources["rail"] == f"topology file {file}, [[rank]]"
    assert [record.status for record in run.records] == ["ok"]
    code, text = run_threads(*arguments, "--topology", file, "--dry-run")
    assert code == 0
    assert "skipped" not in text
    code, text = run_threads(*arguments, "--dry-run")
    assert "would be skipped: cross_rail needs 2 nodes" in text


def test_run_refuses_an_invalid_file_before_start(tmp_path: Path) -> None:
    file, out = tmp_path / "lab.toml", tmp_path / "run"
    file.write_text(LAB.replace("rail = 1", "rial = 1"))
    code, text = run_threads("ring", "--transport", "threads", "--nproc", 2, "--topology", file, "-o", out)
    assert code == 1  # click's test runner maps any exception to 1
    assert "unknown key node[0].nic[1].rial; did you mean 'rail'?" in text
    assert not out.exists()
