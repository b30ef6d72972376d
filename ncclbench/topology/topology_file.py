"""Topology files: TOML in, checked, and the ranks of a job placed on it.

    schema = 1
    name = "lab 3x2"
    [[node]]
    name = "n0"                # the host name that its ranks report, whole or up to the first dot
    [[node.nic]]
    rail = 0
    device = "rail0"
    leaf = "leaf0"
    gbit_per_s = 0.1
    [[leaf]]
    name = "leaf0"
    spines = ["spine0"]
    uplink_gbit_per_s = 0.1    # each of its uplinks
    [[spine]]
    name = "spine0"
    gbit_per_s = 0.1           # each of its ports

`docs/formats.md` has every key. Whatever is misspelt or contradicts itself is refused with the name of the thing.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from ncclbench.config.refusals import unresolved
from ncclbench.config.toml_files import decode_toml
from ncclbench.errors import UsageError

T = TypeVar("T")

# More than any job has ever had; a larger number is a slip.
MOST_RANKS = 1 << 20
SCHEMA = 1
Place = Annotated[int, msgspec.Meta(lt=MOST_RANKS)]


class Nic(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One port: a rail and a plane of a node."""

    rail: Place
    plane: Place = 0
    device: str = ""
    leaf: str | None = None
    gbit_per_s: float | None = None


class Node(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A host or tray, the NVLink domain it is in (itself by default), and its NICs.

    The name ``*`` stands for every host that is not named. `leaf` is for a node of which no more is known than the
    switch above it.
    """

    name: str
    domain: str | None = None
    site: str = ""
    leaf: str | None = None
    nic: tuple[Nic, ...] = ()

    @property
    def rails(self) -> list[int]:
        """Its rails, in order, each once."""
        return sorted({nic.rail for nic in self.nic})

    def ports(self, rail: int) -> list[Nic]:
        """The planes of one rail, in order."""
        return sorted((nic for nic in self.nic if nic.rail == rail), key=lambda nic: nic.plane)


class Switch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A leaf, or a spine that has spines of its own."""

    name: str
    spines: tuple[str, ...] = ()
    uplink_gbit_per_s: float | None = None
    gbit_per_s: float | None = None


class Domain(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An NVLink domain, and what one GPU sends inside it."""

    name: str
    gbit_per_s: float | None = None


class Seat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where one rank is, said outright."""

    rank: Place
    node: str
    rail: Place | None = None


class TopologyFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A fabric, and if it says so, which rank sits where.

    Attributes:
        source: what messages and the manifest call it.
        sha256: of the file's bytes.
    """

    node: tuple[Node, ...]
    name: str = ""
    schema: Annotated[int, msgspec.Meta(ge=1)] = SCHEMA
    leaf: tuple[Switch, ...] = ()
    spine: tuple[Switch, ...] = ()
    domain: tuple[Domain, ...] = ()
    rank: tuple[Seat, ...] = ()
    source: str = ""
    sha256: str = ""


def read_topology(path: Path | str) -> TopologyFile:
    """The topology in a file: TOML, Slurm's topology.conf or topology.yaml, or an NCCL topology XML.

    Raises:
        UsageError: naming the file, the key, and what was meant.
    """
    from ncclbench.topology.foreign_formats import nccl_xml, slurm_conf, slurm_yaml

    file = Path(path)
    try:
        raw = file.read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the topology {file}: {error}") from None
    parsers = {".xml": nccl_xml, ".conf": slurm_conf, ".yaml": slurm_yaml, ".yml": slurm_yaml}
    found = parsers.get(file.suffix, parse_topology)(text, str(file))
    check_topology(found)
    return msgspec.structs.replace(found, sha256=hashlib.sha256(raw).hexdigest())


def parse_topology(text: str, source: str) -> TopologyFile:
    """The topology in TOML text; `source` is what errors call it. See `read_topology`."""
    found = decode_toml(text, TopologyFile, source, newest=SCHEMA, hidden=("source", "sha256"))
    found = msgspec.structs.replace(found, source=source)
    check_topology(found)
    return found


def check_topology(found: TopologyFile) -> None:
    """Refuse what contradicts itself, whatever format it came from.

    Raises:
        UsageError: naming the two things that do not go together.
    """
    source = found.source
    if strange := [name for name in _names(found) if not name.isprintable()]:
        raise UsageError(f"{source}: {strange[0]!r} has characters that steer a terminal; name things in letters")
    if not found.node:
        raise UsageError(f"{source}: a topology needs at least one [[node]]")
    for kind, names in (
        ("node", [node.name for node in found.node]),
        ("switch", [switch.name for switch in (*found.leaf, *found.spine)]),
        ("domain", [domain.name for domain in found.domain]),
        ("rank", [str(seat.rank) for seat in found.rank]),
    ):
        twice = [name for name, n in Counter(names).items() if n > 1]
        if twice:
            raise UsageError(f"{source}: {kind} {twice[0]} stands twice")
        if "" in names:
            raise UsageError(f"{source}: a {kind} has an empty name")
    for node in found.node:
        _check_node(node, found)
    _check_switches(found)
    _check_rates(found)
    _check_seats(found)


def _names(found: TopologyFile) -> Iterator[str]:
    """Every text in a topology."""
    yield found.name
    for node in found.node:
        yield from (node.name, node.domain or "", node.site, node.leaf or "")
        yield from (text for nic in node.nic for text in (nic.device, nic.leaf or ""))
    for switch in (*found.leaf, *found.spine):
        yield from (switch.name, *switch.spines)
    yield from (domain.name for domain in found.domain)
    yield from (seat.node for seat in found.rank)


def _check_node(node: Node, found: TopologyFile) -> None:
    places = Counter((nic.rail, nic.plane) for nic in node.nic)
    for (rail, plane), n in places.items():
        if n > 1:
            raise UsageError(f"{found.source}: {node.name} has {n} NICs on rail {rail}, plane {plane}")
        if rail < 0 or plane < 0:
            raise UsageError(f"{found.source}: {node.name}: rail and plane count from 0, got {rail} and {plane}")
    devices = Counter(nic.device for nic in node.nic if nic.device)
    twice = [device for device, n in devices.items() if n > 1]
    if twice:
        raise UsageError(f"{found.source}: {node.name} has {twice[0]} on two rails or planes")
    _check_leaves(node, found)
    domains = [domain.name for domain in found.domain]
    if domains and node.name != "*" and (node.domain or node.name) not in domains:
        raise UsageError(f"{found.source}: {node.name} is in {unresolved('domain', node.domain or node.name, domains)}")


def _check_leaves(node: Node, found: TopologyFile) -> None:
    leaves = [leaf.name for leaf in found.leaf]
    named = [(node.name, node.leaf), *((f"{node.name} rail {nic.rail}", nic.leaf) for nic in node.nic)]
    for what, leaf in named:
        if leaf is not None and leaf not in leaves:
            raise UsageError(f"{found.source}: {what} is on {unresolved('leaf', leaf, leaves)}")


def _check_switches(found: TopologyFile) -> None:
    """Every spine named is there, and no switch is above itself."""
    spines = {spine.name: spine for spine in found.spine}
    for switch in (*found.leaf, *found.spine):
        for name in switch.spines:
            if name not in spines:
                raise UsageError(
                    f"{found.source}: {switch.name} has an uplink to {unresolved('spine', name, [*spines])}"
                )
    done: set[str] = set()
    for start in spines:
        path = _cycle_from(start, spines, done)
        if path:
            raise UsageError(
                f"{found.source}: a cycle of switches: {' -> '.join(path)}; a spine cannot be above itself"
            )


def _cycle_from(start: str, spines: Mapping[str, Switch], done: set[str]) -> list[str]:
    """A way from a switch up to itself; empty if there is none. Every switch is entered once over all calls."""
    path: list[str] = []
    stack: list[tuple[str, bool]] = [(start, False)]
    while stack:
        name, leaving = stack.pop()
        if leaving:
            done.add(path.pop())
        elif name in path:
            return [*path[path.index(name) :], name]
        elif name not in done:
            path.append(name)
            stack.append((name, True))
            stack += [(above, False) for above in spines[name].spines]
    return []


def _check_rates(found: TopologyFile) -> None:
    rated: list[tuple[str, str, float | None]] = [
        (f"{node.name} rail {nic.rail}", "gbit_per_s", nic.gbit_per_s) for node in found.node for nic in node.nic
    ]
    for switch in (*found.leaf, *found.spine):
        rated.append((switch.name, "uplink_gbit_per_s", switch.uplink_gbit_per_s))
        rated.append((switch.name, "gbit_per_s", switch.gbit_per_s))
    rated += [(domain.name, "gbit_per_s", domain.gbit_per_s) for domain in found.domain]
    for what, key, rate in rated:
        if rate is not None and not 0 < rate < math.inf:
            raise UsageError(f"{found.source}: {what}: {key} must be above 0 and finite, got {rate}")


def _check_seats(found: TopologyFile) -> None:
    nodes = {node.name: node for node in found.node}
    taken: dict[tuple[str, int], int] = {}
    for seat in found.rank:
        if seat.rank < 0:
            raise UsageError(f"{found.source}: ranks count from 0, got {seat.rank}")
        if seat.node not in nodes:
            raise UsageError(f"{found.source}: rank {seat.rank} is on {unresolved('node', seat.node, [*nodes])}")
        rails = nodes[seat.node].rails
        if seat.rail is None:
            continue
        if rails and seat.rail not in rails:
            raise UsageError(
                f"{found.source}: rank {seat.rank} is on rail {seat.rail} of {seat.node}, whose NICs are on "
                f"rails {', '.join(map(str, rails))}"
            )
        other = taken.setdefault((seat.node, seat.rail), seat.rank)
        if other != seat.rank:
            raise UsageError(
                f"{found.source}: ranks {other} and {seat.rank} are both on rail {seat.rail} of {seat.node}: "
                "one NIC cannot serve two ranks here"
            )
