"""Slurm's files: topology.conf, topology.yaml, and the short form of a list of nodes.

Slurm knows switches and nodes, but neither rails nor rates; a block is an NVLink domain.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from ncclbench.errors import EnvironmentFault, UsageError
from ncclbench.topology.file_model import Domain, Node, Switch, TopologyFile

_MOST_NAMES = 1_000_000


def expand_nodes(text: str) -> list[str]:
    """The names in Slurm's short form of a list of nodes: ``n[01-03,7],login`` is n01, n02, n03, n7 and login.

    Raises:
        ValueError: if it is empty or its brackets do not close.
    """
    # A comma outside brackets parts two names.
    names = [name for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text) for name in _expand(part)]
    if not names or text.count("[") != text.count("]"):
        raise ValueError(f"not a list of nodes: {text!r}")
    return names


def _expand(name: str) -> list[str]:
    """One name; each of its brackets stands for several."""
    head, bracket, rest = name.partition("[")
    if not bracket:
        return [name]
    inside, _, tail = rest.partition("]")
    numbers: list[str] = []
    for item in inside.split(","):
        low, _, high = item.partition("-")
        span = range(int(low), int(high or low) + 1)
        if len(span) > _MOST_NAMES:
            raise ValueError(f"{len(span)} names in one pair of brackets")
        numbers += [f"{k:0{len(low)}d}" for k in span]
    return [head + number + end for number in numbers for end in _expand(tail)]


@dataclass(frozen=True)
class _Group:
    """A switch or a block: its name, its nodes, and the switches below it."""

    name: str
    nodes: list[str]
    children: list[str]


def _group(name: str | int, nodes: str | int | None, children: str | int | None, where: str) -> _Group:
    expanded = {}
    for key, value in (("nodes", nodes), ("children", children)):
        try:
            expanded[key] = expand_nodes(str(value)) if value else []
        except ValueError as error:
            raise UsageError(f"{where}: {key}: {error}") from None
    return _Group(str(name), expanded["nodes"], expanded["children"])


def slurm_conf(text: str, source: str) -> TopologyFile:
    """The topology in a topology.conf: ``SwitchName=s0 Nodes=n[0-7]``, ``Switches=``, ``BlockName=``.

    Raises:
        UsageError: naming the line that cannot be read.
    """
    switches: list[_Group] = []
    blocks: list[_Group] = []
    for number, line in enumerate(text.replace("\\\n", " ").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        values = dict(map(_pair, words))
        where = f"{source}: line {number}"
        if "switchname" in values:
            _refuse_others(values, ("switchname", "nodes", "switches", "linkspeed"), where)
            switches.append(_group(values["switchname"], values.get("nodes"), values.get("switches"), where))
        elif "blockname" in values:
            _refuse_others(values, ("blockname", "nodes"), where)
            blocks.append(_group(values["blockname"], values.get("nodes"), None, where))
        elif "blocksizes" not in values:
            raise UsageError(f"{where}: neither SwitchName= nor BlockName= nor BlockSizes=: {line.strip()[:60]!r}")
    return _from_groups(switches, blocks, source)


def _pair(word: str) -> tuple[str, str]:
    key, _, value = word.partition("=")
    return key.lower(), value


def _refuse_others(values: Mapping[str, str], known: tuple[str, ...], where: str) -> None:
    for key in values:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key}; known: {', '.join(known)}")


class _YamlSwitch(msgspec.Struct):
    switch: str | int
    nodes: str | int | None = None
    children: str | int | None = None


class _YamlBlock(msgspec.Struct):
    block: str | int
    nodes: str | int | None = None


class _YamlTree(msgspec.Struct):
    switches: list[_YamlSwitch] = []


class _YamlBlocks(msgspec.Struct):
    blocks: list[_YamlBlock] = []


class _YamlTopology(msgspec.Struct):
    cluster_default: bool = False
    tree: _YamlTree | None = None
    block: _YamlBlocks | None = None


def slurm_yaml(text: str, source: str) -> TopologyFile:
    """The topology in a topology.yaml: the tree of the default topology if it has one, and the blocks of any.

    Raises:
        UsageError: naming the entry that cannot be read.
        EnvironmentFault: without PyYAML.
    """
    try:
        import yaml
    except ImportError:
        raise EnvironmentFault(f"reading {source} needs PyYAML, which is not installed: pip install pyyaml") from None
    try:
        topologies = msgspec.convert(yaml.safe_load(text), list[_YamlTopology])
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{source}: not a YAML file: {' '.join(str(error).split())}") from None
    except msgspec.ValidationError as error:
        raise UsageError(f"{source}: {_expected_in_yaml(str(error))} ({error})") from None
    topologies.sort(key=lambda topology: not topology.cluster_default)
    switches: Iterable[_YamlSwitch] = next((t.tree.switches for t in topologies if t.tree and t.tree.switches), ())
    blocks: Iterable[_YamlBlock] = next((t.block.blocks for t in topologies if t.block and t.block.blocks), ())
    return _from_groups(
        [_group(one.switch, one.nodes, one.children, f"{source}: tree.switches") for one in switches],
        [_group(one.block, one.nodes, None, f"{source}: block.blocks") for one in blocks],
        source,
    )


def _expected_in_yaml(error: str) -> str:
    for place, key in (("tree.switches", "switch"), ("block.blocks", "block")):
        if f".{place}" in error:
            return f"{place} must be a list of entries with a key {key!r}"
    return "a topology.yaml is a list of topologies"


def _from_groups(switches: list[_Group], blocks: list[_Group], source: str) -> TopologyFile:
    above: dict[str, list[str]] = {}
    leaf_of: dict[str, str] = {}
    for switch in switches:
        for child in switch.children:
            above.setdefault(child, []).append(switch.name)
        for node in switch.nodes:
            if node in leaf_of:
                raise UsageError(f"{source}: {node} is on {leaf_of[node]} and on {switch.name}")
            leaf_of[node] = switch.name
    block_of = {node: block.name for block in blocks for node in block.nodes}
    known = [switch.name for switch in switches]
    missing = [child for child in above if child not in known]
    if missing:
        raise UsageError(f"{source}: {above[missing[0]][0]} has a switch {missing[0]!r}, which is not in the file")
    made = {name: Switch(name=name, spines=tuple(above.get(name, ()))) for name in known}
    leaves = {switch.name for switch in switches if switch.nodes}
    names = list(dict.fromkeys([*leaf_of, *block_of]))
    if not names:
        raise UsageError(f"{source}: no switch and no block has nodes: it needs SwitchName= or BlockName= with Nodes=")
    return TopologyFile(
        name="Slurm",
        node=tuple(Node(name=name, domain=block_of.get(name), leaf=leaf_of.get(name)) for name in names),
        leaf=tuple(switch for name, switch in made.items() if name in leaves),
        spine=tuple(switch for name, switch in made.items() if name not in leaves),
        domain=tuple(Domain(name=block.name) for block in blocks) if len(block_of) == len(names) else (),
        source=source,
    )
