"""The topology of one host that NCCL writes with NCCL_TOPO_DUMP_FILE.

NCCL knows the GPUs and NICs of a host, but no switch; the file stands for every host of the job.
"""

import re
from xml.etree.ElementTree import Element, ParseError

import defusedxml
from defusedxml.ElementTree import fromstring

from ncclbench.errors import UsageError
from ncclbench.topology.file_model import Nic, Node, TopologyFile


def nccl_xml(text: str, source: str) -> TopologyFile:
    """The host in an NCCL topology XML, as a pattern for all hosts: each GPU's rail is that of its nearest NIC.

    Raises:
        UsageError: if it names no network device, or a speed is no number.
    """
    root = _parse(text, source)
    nets = [net for net in root.iter("net") if net.get("keep", "1") != "0"]
    if not nets:
        raise UsageError(f"{source}: no <net> element: this is no topology of a host with NICs")
    parents = {child: parent for parent in root.iter() for child in parent}
    gpus = sorted(root.iter("gpu"), key=lambda gpu: gpu.get("dev", "").rjust(4))  # as numbers
    chosen: list[Element] = []
    for gpu in gpus:
        free = [net for net in nets if net not in chosen]
        if free:
            above = _ancestors(gpu, parents)
            chosen.append(min(free, key=lambda net: _hops(above, _ancestors(net, parents))))
    nics = [
        Nic(rail=rail, device=_device(net, source), gbit_per_s=_gbit_per_s(net, source))
        for rail, net in enumerate(chosen or nets)
    ]
    return TopologyFile(name="NCCL", node=(Node(name="*", nic=tuple(nics)),), source=source)


def _parse(text: str, source: str) -> Element:
    """The root element; a document type, through which entities could be defined, is refused."""
    try:
        root: Element = fromstring(text, forbid_dtd=True)
    except defusedxml.DefusedXmlException:
        raise UsageError(f"{source}: a document type (<!DOCTYPE>) is not allowed in a topology file") from None
    except ParseError as error:
        raise UsageError(f"{source}: not an XML file: {error}") from None
    return root


def _ancestors(element: Element, parents: dict[Element, Element]) -> list[Element]:
    """From the root down to the parent."""
    found: list[Element] = []
    while (parent := parents.get(element)) is not None:
        found.append(parent)
        element = parent
    return found[::-1]


def _hops(one: list[Element], other: list[Element]) -> int:
    """The number of steps between two elements, up and down the tree; both are given by their ancestors."""
    shared = sum(x is y for x, y in zip(one, other, strict=False))
    return len(one) + len(other) - 2 * shared


def _device(net: Element, source: str) -> str:
    name = net.get("name", "")
    if not re.fullmatch(r"[\w.-]{1,64}", name):
        raise UsageError(f"{source}: a <net> without a usable name: {name[:64]!r}")
    port = net.get("port", "1")
    return name if port in ("", "0", "1") else f"{name}:{port}"


def _gbit_per_s(net: Element, source: str) -> float | None:
    """NCCL writes megabits per second, and 0 or nothing if it does not know."""
    speed = net.get("speed", "0")
    try:
        return float(speed) / 1000 or None
    except ValueError:
        raise UsageError(f"{source}: speed of {net.get('name')} is no number: {speed[:40]!r}") from None
