"""The parts of the lab: namespaces, NICs, leaves, spines, addresses and rates. Pure data; no system calls.

Node d and rail r have one GPU, with its own network namespace::

    GPU n1:r0 ──rail0── leaf0 ──┬── spine0        leaf = a bridge, spine = a namespace that routes
        │                       └── spine1
        ├──nvl── the node's NVLink switch          unshaped
        └──ctl── control network, with the head    unshaped; stores, watchdogs and mpiexec's daemons

Addresses are from 198.18.0.0/15, which RFC 2544 reserves for tests of networks. The NIC of node d in leaf L is
198.18.L.(d+1), spine s in leaf L is 198.18.L.(254-s), and GPU (d, r) on the control network is 198.19.d.(r+1).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Limits of the addresses: one octet for the leaf, one for the node; spines use the upper end of the latter.
MOST_LEAVES, MOST_NODES, MOST_SPINES = 250, 120, 64
CONTROL_NET = "198.19.0.0/17"
RAIL_NET = "198.18.0.0/16"
HEAD_ADDRESS = "198.19.127.254"

_RATE = re.compile(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit|bit)")
_UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_PREFIX = re.compile(r"[a-z][a-z0-9]{0,11}")


class LabError(Exception):
    """An error of the lab, with one line for the user.

    Attributes:
        code: the exit code: 2 for a usage error, 3 for the environment.
    """

    def __init__(self, message: str, code: int = 3) -> None:
        """Store the message and the exit code."""
        super().__init__(message)
        self.code = code


def usage(message: str) -> LabError:
    """A usage error."""
    return LabError(message, 2)


def bits_per_s(text: str, base: float | None = None) -> float:
    """A rate as tc writes it (``100mbit``), in bit/s; or ``50%`` of `base`.

    Raises:
        LabError: if it is neither, or out of range.
    """
    low = text.strip().lower()
    if low.endswith("%") and base is not None:
        try:
            rate = base * float(low[:-1]) / 100
        except ValueError:
            raise usage(f"a rate is like 100mbit or 50%, and not {text!r}") from None
    else:
        found = _RATE.fullmatch(low)
        if not found:
            raise usage(f"a rate is like 100mbit{' or 50%' if base is not None else ''}, and not {text!r}")
        rate = float(found[1]) * _UNITS[found[2]]
    # Below a few kbit/s a single packet takes seconds, and not even TCP's control traffic passes.
    if not 1e4 <= rate <= 1e12:
        raise usage(f"a rate is 10kbit to 1000gbit, and {text!r} is {rate:g} bit/s")
    return rate


@dataclass(frozen=True)
class Leaf:
    """One leaf: the switch of a rail and plane at a site."""

    index: int
    site: int
    rail: int
    plane: int
    name: str

    def gateway(self, spine: int) -> str:
        """The address of the site's spine number `spine` in this leaf."""
        return f"198.18.{self.index}.{254 - spine}"

    @property
    def subnet(self) -> str:
        """Subnet of all NICs of this leaf."""
        return f"198.18.{self.index}.0/24"


@dataclass(frozen=True)
class Gpu:
    """One GPU; rank `node` x rails + `rail` runs on it."""

    node: int
    rail: int
    site: int

    @property
    def name(self) -> str:
        """Name as in ``--nic n1:r0``, without the colon."""
        return f"n{self.node}r{self.rail}"

    @property
    def control_address(self) -> str:
        """Address on the control network."""
        return f"198.19.{self.node}.{self.rail + 1}"


@dataclass(frozen=True)
class Nic:
    """One port of a GPU's NIC.

    Attributes:
        device: its name inside the GPU's namespace.
        port: the name of the leaf's end of its cable.
    """

    gpu: Gpu
    leaf: Leaf
    device: str
    port: str

    @property
    def address(self) -> str:
        """Address on its leaf."""
        return f"198.18.{self.leaf.index}.{self.gpu.node + 1}"


@dataclass(frozen=True)
class Uplink:
    """The cable between a leaf and a spine; `port` is the leaf's end of it, `far` the spine's."""

    leaf: Leaf
    spine: int
    port: str
    far: str


@dataclass(frozen=True)
class SiteCable:
    """The cable between a spine and the network of the sites; `port` is its end at `switch`, which is in between."""

    site: int
    spine: int
    port: str
    switch: str


@dataclass(frozen=True, kw_only=True)
class Lab:
    """The configuration of a lab; rates in bit/s.

    Attributes:
        prefix: of the names of all its namespaces.
        spines: spines at each site.
        nic_rate: of every NIC, each direction.
        spine_rate: of every port between a leaf and a spine, each direction.
        site_rate: of every cable between a spine and the network of the sites; None if not shaped.
        mtu: IP bytes per packet. Large packets reduce the work of a software switch.
    """

    prefix: str = "ncclab"
    nodes: int = 3
    rails: int = 2
    planes: int = 1
    sites: int = 1
    spines: int = 1
    nic_rate: float = 1e8
    spine_rate: float = 3e8
    site_rate: float | None = None
    mtu: int = 9000

    def __post_init__(self) -> None:
        """Refuse values that are invalid, or that exceed the addresses."""
        if not _PREFIX.fullmatch(self.prefix):
            raise usage(f"--prefix is up to 12 small letters and digits, a letter first, and not {self.prefix!r}")
        for name in ("nodes", "rails", "planes", "sites", "spines"):
            if getattr(self, name) < 1:
                raise usage(f"--{name} must be at least 1, got {getattr(self, name)}")
        for number, most, what in (
            (self.nodes, MOST_NODES, "--nodes"),
            (self.sites, self.nodes, "--sites"),
            (self.sites * self.rails * self.planes, MOST_LEAVES, "sites x rails x planes"),
            (self.sites * self.spines, MOST_SPINES, "sites x spines"),
        ):
            if number > most:
                raise usage(f"{what} is at most {most} here, got {number}")
        if not 1280 <= self.mtu <= 65000:
            raise usage(f"--mtu is 1280 to 65000, got {self.mtu}")

    # Parts.

    def site_of(self, node: int) -> int:
        """The site of a node: sites are blocks of consecutive nodes, as even as possible."""
        return node * self.sites // self.nodes

    def gpus(self) -> list[Gpu]:
        """All GPUs in rank order: node by node, rail by rail."""
        return [Gpu(d, r, self.site_of(d)) for d in range(self.nodes) for r in range(self.rails)]

    def leaves(self) -> list[Leaf]:
        """All leaves: site by site, rail by rail, plane by plane."""
        places = [(s, r, p) for s in range(self.sites) for r in range(self.rails) for p in range(self.planes)]
        return [Leaf(k, *place, self._leaf_name(*place)) for k, place in enumerate(places)]

    def _leaf_name(self, site: int, rail: int, plane: int) -> str:
        head = f"{site_name(site)}-" if self.sites > 1 else ""
        return f"{head}leaf{rail}" + (f"p{plane}" if self.planes > 1 else "")

    def nics(self) -> list[Nic]:
        """All NIC ports in rank order, plane by plane."""
        leaves = self.leaves()
        found = []
        for gpu in self.gpus():
            for plane in range(self.planes):
                leaf = leaves[(gpu.site * self.rails + gpu.rail) * self.planes + plane]
                device = f"rail{gpu.rail}" + (f"p{plane}" if self.planes > 1 else "")
                found.append(Nic(gpu, leaf, device, f"{gpu.name}p{plane}"))
        return found

    def uplinks(self) -> list[Uplink]:
        """One uplink per leaf and spine of its site."""
        found = []
        for leaf in self.leaves():
            for number in range(self.spines):
                spine = leaf.site * self.spines + number
                found.append(Uplink(leaf, spine, f"l{leaf.index}s{spine}", f"l{leaf.index}"))
        return found

    def site_cables(self) -> list[SiteCable]:
        """One cable per spine, if there are several sites."""
        spines = range(self.sites * self.spines if self.sites > 1 else 0)
        return [SiteCable(spine // self.spines, spine, f"s{spine}", f"x{spine}") for spine in spines]

    def spine_names(self) -> list[str]:
        """Names of the spines of all sites."""
        return [f"spine{k}" for k in range(self.sites * self.spines)]

    # Namespaces.

    def gpu_space(self, gpu: Gpu) -> str:
        """The namespace of a GPU."""
        return f"{self.prefix}-{gpu.name}"

    @property
    def switches(self) -> str:
        """The namespace of all bridges: leaves, NVLink switches, and the control network."""
        return f"{self.prefix}-switches"

    @property
    def head(self) -> str:
        """The namespace from which mpiexec starts; only on the control network."""
        return f"{self.prefix}-head"

    def spine_space(self, spine: int) -> str:
        """The namespace of a spine."""
        return f"{self.prefix}-spine{spine}"

    @property
    def wan(self) -> str:
        """The namespace that routes between sites."""
        return f"{self.prefix}-wan"

    def spaces(self) -> Iterator[str]:
        """All namespaces."""
        yield self.switches
        yield self.head
        for gpu in self.gpus():
            yield self.gpu_space(gpu)
        for spine in range(self.sites * self.spines):
            yield self.spine_space(spine)
        if self.sites > 1:
            yield self.wan

    # Look-up by the names that a user writes.

    def gpu(self, name: str) -> Gpu:
        """``n1:r0``.

        Raises:
            LabError: if there is no such GPU.
        """
        for gpu in self.gpus():
            if name in (gpu.name, f"n{gpu.node}:r{gpu.rail}"):
                return gpu
        raise usage(f"no GPU {name!r}; there are n0:r0 to n{self.nodes - 1}:r{self.rails - 1}")

    def nics_named(self, name: str) -> list[Nic]:
        """``n1:r0`` for all planes of a NIC, ``n1:r0:p1`` for one of them."""
        head, _, plane = name.partition(":p")
        gpu = self.gpu(head)
        found = [nic for nic in self.nics() if nic.gpu == gpu and plane in ("", str(nic.leaf.plane))]
        if not found:
            raise usage(f"no NIC {name!r}; {head} has planes p0 to p{self.planes - 1}")
        return found

    def node(self, name: str) -> int:
        """``n1``."""
        if re.fullmatch(r"n\d+", name) and int(name[1:]) < self.nodes:
            return int(name[1:])
        raise usage(f"no node {name!r}; there are n0 to n{self.nodes - 1}")

    def uplinks_named(self, name: str) -> list[Uplink]:
        """``leaf0`` for all uplinks of a leaf, ``leaf0:spine1`` for one."""
        leaf, _, spine = name.partition(":")
        found = [up for up in self.uplinks() if up.leaf.name == leaf and spine in ("", f"spine{up.spine}")]
        if not found:
            known = ", ".join(f"{up.leaf.name}:spine{up.spine}" for up in self.uplinks())
            raise usage(f"no uplink {name!r}; there are {known}")
        return found

    def site_cables_named(self, name: str) -> list[SiteCable]:
        """``a`` for all cables of a site, ``a:spine0`` for one."""
        site, _, spine = name.partition(":")
        found = [c for c in self.site_cables() if site_name(c.site) == site and spine in ("", f"spine{c.spine}")]
        if not found:
            known = ", ".join(f"{site_name(c.site)}:spine{c.spine}" for c in self.site_cables())
            raise usage(f"no site {name!r}; there are {known}" if known else "this lab has one site: make it --sites 2")
        return found

    def uplinks_of_spine(self, name: str) -> list[Uplink]:
        """All uplinks of a spine."""
        found = [up for up in self.uplinks() if name == f"spine{up.spine}"]
        if not found:
            raise usage(f"no spine {name!r}; there are {', '.join(self.spine_names())}")
        return found

    # Files.

    def as_json(self) -> str:
        """JSON of the configuration, for the stored state."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Lab:
        """Read the output of `as_json`."""
        return cls(**json.loads(text))

    def renamed(self, prefix: str) -> Lab:
        """The same lab under another prefix."""
        return replace(self, prefix=prefix)

    def topology(self) -> str:
        """The topology file of this lab, TOML."""
        shape = f"{self.nodes}x{self.rails}" + (f"x{self.planes}" if self.planes > 1 else "")
        lines = ["schema = 1", f'name = "lab {shape}"']
        for node in range(self.nodes):
            lines += ["", "[[node]]", f'name = "n{node}"', f'domain = "n{node}"']
            lines += [f'site = "{site_name(self.site_of(node))}"']
            for nic in self.nics():
                if nic.gpu.node == node:
                    lines += ["[[node.nic]]", f"rail = {nic.gpu.rail}", f"plane = {nic.leaf.plane}"]
                    lines += [f'device = "{nic.device}"', f'leaf = "{nic.leaf.name}"']
                    lines += [f"gbit_per_s = {self.nic_rate / 1e9:g}"]
        for leaf in self.leaves():
            spines = ", ".join(f'"spine{up.spine}"' for up in self.uplinks() if up.leaf == leaf)
            lines += ["", "[[leaf]]", f'name = "{leaf.name}"', f"spines = [{spines}]"]
            lines += [f"uplink_gbit_per_s = {self.spine_rate / 1e9:g}"]
        for name in self.spine_names():
            lines += ["", "[[spine]]", f'name = "{name}"', f"gbit_per_s = {self.spine_rate / 1e9:g}"]
        for rank, gpu in enumerate(self.gpus()):
            lines += ["", "[[rank]]", f"rank = {rank}", f'node = "n{gpu.node}"', f"rail = {gpu.rail}"]
        return "\n".join(lines) + "\n"


def site_name(site: int) -> str:
    """``a``, ``b``, and so on; numbers after the last letter."""
    return chr(ord("a") + site) if site < 26 else f"s{site}"


def wan_cable(spine: int) -> tuple[str, str]:
    """The two addresses of the cable between a spine and the network of the sites: the spine's first."""
    base = f"198.19.{128 + spine // 64}"
    return f"{base}.{spine % 64 * 4 + 2}", f"{base}.{spine % 64 * 4 + 1}"
