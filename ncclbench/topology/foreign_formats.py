"""Other people's topology files: Slurm's topology.conf and topology.yaml, and what NCCL dumps with NCCL_TOPO_DUMP_FILE.

Slurm knows switches and nodes, but neither rails nor rates; a block is an NVLink domain. NCCL knows one host, its
GPUs and NICs, but no switch: its file stands for every host of the job.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.parsers import expat

from ncclbench.errors import EnvironmentFault, UsageError
from ncclbench.topology.slurm_hostlist import expand_nodes
from ncclbench.topology.topology_file import Domain, Nic, Node, Switch, TopologyFile


def slurm_conf(text: str, source: str) -> TopologyFile:
    """The topology in a topology.conf: ``SwitchName=s0 Nodes=n[0-7]``, ``Switches=``, ``BlockName=``.

    Raises:
        UsageError: naming the line that cannot be read.
    """
    switches: list[Mapping[str, Any]] = []
    blocks: list[Mapping[str, Any]] = []
    for number, line in enumerate(text.replace("\\\n", " ").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        values = dict(map(_pair, words))
        where = f"{source}: line {number}"
        if "switchname" in values:
            _refuse_others(values, ("switchname", "nodes", "switches", "linkspeed"), where)
            switches.append({"switch": values["switchname"], **_lists(values, "nodes", "switches", where)})
        elif "blockname" in values:
            _refuse_others(values, ("blockname", "nodes"), where)
            blocks.append({"block": values["blockname"], **_lists(values, "nodes", "switches", where)})
        elif "blocksizes" not in values:
            raise UsageError(f"{where}: neither SwitchName= nor BlockName= nor BlockSizes=: {line.strip()[:60]!r}")
    return _from_slurm(switches, blocks, source)


def _pair(word: str) -> tuple[str, str]:
    key, _, value = word.partition("=")
    return key.lower(), value


def _refuse_others(values: Mapping[str, str], known: tuple[str, ...], where: str) -> None:
    for key in values:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key}; known: {', '.join(known)}")


def _lists(values: Mapping[str, Any], nodes: str, children: str, where: str) -> dict[str, list[str]]:
    found = {}
    for name, key in (("nodes", nodes), ("children", children)):
        try:
            found[name] = expand_nodes(str(values[key])) if values.get(key) else []
        except ValueError as error:
            raise UsageError(f"{where}: {key}: {error}") from None
    return found


def slurm_yaml(text: str, source: str) -> TopologyFile:
    """The topology in a topology.yaml: the default one's tree, and the blocks of any.

    Raises:
        UsageError: naming the entry that cannot be read.
        EnvironmentFault: without PyYAML.
    """
    try:
        import yaml
    except ImportError:
        raise EnvironmentFault(f"reading {source} needs PyYAML, which is not installed: pip install pyyaml") from None
    try:
        entries = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{source}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(f"{source}: a topology.yaml is a list of topologies")
    entries.sort(key=lambda entry: not entry.get("cluster_default"))
    switches = next(_yaml_entries(entries, "tree", "switches", "switch", source), [])
    blocks = next(_yaml_entries(entries, "block", "blocks", "block", source), [])
    return _from_slurm(switches, blocks, source)


def _yaml_entries(
    topologies: list[Any], kind: str, plural: str, name: str, source: str
) -> Iterator[list[Mapping[str, Any]]]:
    for topology in topologies:
        listed = (topology.get(kind) or {}).get(plural) if isinstance(topology.get(kind), dict) else None
        if not listed:
            continue
        where = f"{source}: {kind}.{plural}"
        if not isinstance(listed, list) or not all(isinstance(one, dict) and one.get(name) for one in listed):
            raise UsageError(f"{where} must be a list of entries with a key {name!r}")
        yield [{name: str(one[name]), **_lists(one, "nodes", "children", where)} for one in listed]


def _from_slurm(switches: list[Mapping[str, Any]], blocks: list[Mapping[str, Any]], source: str) -> TopologyFile:
    above: dict[str, list[str]] = {}
    for switch in switches:
        for child in switch["children"]:
            above.setdefault(child, []).append(switch["switch"])
    leaf_of: dict[str, str] = {}
    for switch in switches:
        for node in switch["nodes"]:
            if node in leaf_of:
                raise UsageError(f"{source}: {node} is on {leaf_of[node]} and on {switch['switch']}")
            leaf_of[node] = switch["switch"]
    block_of = {node: block["block"] for block in blocks for node in block["nodes"]}
    known = [switch["switch"] for switch in switches]
    unknown = [child for child in above if child not in known]
    if unknown:
        raise UsageError(f"{source}: {above[unknown[0]][0]} has a switch {unknown[0]!r}, which is not in the file")
    made = {name: Switch(name=name, spines=tuple(above.get(name, ()))) for name in known}
    leaves = {switch["switch"] for switch in switches if switch["nodes"]}
    names = list(dict.fromkeys([*leaf_of, *block_of]))
    if not names:
        raise UsageError(f"{source}: no switch and no block has nodes: it needs SwitchName= or BlockName= with Nodes=")
    return TopologyFile(
        name="Slurm",
        node=tuple(Node(name=name, domain=block_of.get(name), leaf=leaf_of.get(name)) for name in names),
        leaf=tuple(switch for name, switch in made.items() if name in leaves),
        spine=tuple(switch for name, switch in made.items() if name not in leaves),
        domain=tuple(Domain(name=block["block"]) for block in blocks) if len(block_of) == len(names) else (),
        source=source,
    )


@dataclass
class _Element:
    """An element of an XML file."""

    name: str
    attributes: dict[str, str]
    parent: "_Element | None" = None
    children: list["_Element"] = field(default_factory=list)

    def every(self, name: str) -> Iterator["_Element"]:
        """All elements of a name at any depth, in the order of the file."""
        stack = [self]
        while stack:
            one = stack.pop()
            if one.name == name:
                yield one
            stack += reversed(one.children)

    @property
    def ancestors(self) -> list["_Element"]:
        """From the root down to the parent."""
        found: list[_Element] = []
        above = self.parent
        while above is not None:
            found.append(above)
            above = above.parent
        return found[::-1]


def _parse_xml(text: str, source: str) -> _Element:
    """The root element; a document type, through which entities could be defined, is refused."""
    root = _Element("", {})
    open_now = [root]

    def start(name: str, attributes: dict[str, str]) -> None:
        element = _Element(name, attributes, open_now[-1])
        open_now[-1].children.append(element)
        open_now.append(element)

    def refuse(*_: object) -> None:
        raise UsageError(f"{source}: a document type (<!DOCTYPE>) has no place in a topology file")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _name: open_now.pop()
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        raise UsageError(f"{source}: not an XML file: {error}") from None
    return root


def nccl_xml(text: str, source: str) -> TopologyFile:
    """The host in an NCCL topology XML, as a pattern for all hosts: each GPU's rail is that of its nearest NIC.

    Raises:
        UsageError: if it names no network device, or a speed is no number.
    """
    root = _parse_xml(text, source)
    nets = [net for net in root.every("net") if net.attributes.get("keep", "1") != "0"]
    if not nets:
        raise UsageError(f"{source}: no <net> element: this is no topology of a host with NICs")
    gpus = sorted(root.every("gpu"), key=lambda gpu: gpu.attributes.get("dev", "").rjust(4))  # as numbers
    chosen: list[_Element] = []
    for gpu in gpus:
        free = [net for net in nets if net not in chosen]
        if free:
            chosen.append(min(free, key=lambda net: _steps(gpu, net)))
    nics = [
        Nic(rail=rail, device=_device(net, source), gbit_per_s=_gbit(net, source))
        for rail, net in enumerate(chosen or nets)
    ]
    return TopologyFile(name="NCCL", node=(Node(name="*", nic=tuple(nics)),), source=source)


def _steps(one: _Element, other: _Element) -> int:
    """How far it is from one element to another, up and down the tree."""
    a, b = one.ancestors, other.ancestors
    shared = sum(x is y for x, y in zip(a, b, strict=False))
    return len(a) + len(b) - 2 * shared


def _device(net: _Element, source: str) -> str:
    name = net.attributes.get("name", "")
    if not re.fullmatch(r"[\w.-]{1,64}", name):
        raise UsageError(f"{source}: a <net> without a usable name: {name[:64]!r}")
    port = net.attributes.get("port", "1")
    return name if port in ("", "0", "1") else f"{name}:{port}"


def _gbit(net: _Element, source: str) -> float | None:
    """NCCL writes megabits; 0 or nothing where it does not know."""
    speed = net.attributes.get("speed", "0")
    try:
        return float(speed) / 1000 or None
    except ValueError:
        raise UsageError(f"{source}: speed of {net.attributes.get('name')} is no number: {speed[:40]!r}") from None
