"""What a topology file says: nodes, NICs, leaves, spines, NVLink domains and ranks, whatever the file's format.

`check_topology` refuses a file that contradicts itself, and names the two things that do not go together.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated

import msgspec

from ncclbench.config.refusals import unresolved
from ncclbench.errors import UsageError

# More than any job has; a larger number is a typing error.
MOST_RANKS = 1 << 20
SCHEMA = 1
Index = Annotated[int, msgspec.Meta(lt=MOST_RANKS)]


class Nic(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One port: a rail and a plane of a node."""

    rail: Index
    plane: Index = 0
    device: str = ""
    leaf: str | None = None
    gbit_per_s: float | None = None


class Node(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A host or tray, the NVLink domain it is in (itself by default), and its NICs.

    The name ``*`` stands for every host that is not named. `leaf` is for a node whose NICs are
    not known, only the switch above it.
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


class RankPlacement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The node, and if the file gives it the rail, of one rank."""

    rank: Index
    node: str
    rail: Index | None = None


class TopologyFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A fabric, and optionally the node and rail of each rank.

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
    rank: tuple[RankPlacement, ...] = ()
    source: str = ""
    sha256: str = ""


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
        ("rank", [str(entry.rank) for entry in found.rank]),
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
    _check_ranks(found)


def _names(found: TopologyFile) -> Iterator[str]:
    """Every text in a topology."""
    yield found.name
    for node in found.node:
        yield from (node.name, node.domain or "", node.site, node.leaf or "")
        yield from (text for nic in node.nic for text in (nic.device, nic.leaf or ""))
    for switch in (*found.leaf, *found.spine):
        yield from (switch.name, *switch.spines)
    yield from (domain.name for domain in found.domain)
    yield from (entry.node for entry in found.rank)


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
    """The path from a switch up to itself; empty if there is none. All calls together visit each switch once."""
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


def _check_ranks(found: TopologyFile) -> None:
    nodes = {node.name: node for node in found.node}
    taken: dict[tuple[str, int], int] = {}
    for entry in found.rank:
        if entry.rank < 0:
            raise UsageError(f"{found.source}: ranks count from 0, got {entry.rank}")
        if entry.node not in nodes:
            raise UsageError(f"{found.source}: rank {entry.rank} is on {unresolved('node', entry.node, [*nodes])}")
        rails = nodes[entry.node].rails
        if entry.rail is None:
            continue
        if rails and entry.rail not in rails:
            raise UsageError(
                f"{found.source}: rank {entry.rank} is on rail {entry.rail} of {entry.node}, whose NICs are on "
                f"rails {', '.join(map(str, rails))}"
            )
        other = taken.setdefault((entry.node, entry.rail), entry.rank)
        if other != entry.rank:
            raise UsageError(
                f"{found.source}: ranks {other} and {entry.rank} are both on rail {entry.rail} of {entry.node}: "
                "one NIC cannot serve two ranks here"
            )
