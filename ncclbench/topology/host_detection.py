"""Detection of this host's NICs, their speed and distance from each GPU, and the NVLink domain of each GPU.

Everything is read from /sys and, where it is installed, from NVML. A property that is not there is left out.
"""

import re
import socket
from collections.abc import Sequence
from pathlib import Path

import msgspec

SYS = Path("/sys")

_NVIDIA = "0x10de"
_DISPLAY = "0x03"  # PCI classes 0300 and 0302: the GPUs
_FABRIC_READY = 3  # NVML_GPU_FABRIC_STATE_COMPLETED


class NetworkPort(msgspec.Struct, frozen=True, kw_only=True):
    """One network port.

    Attributes:
        device: ``mlx5_0`` (``mlx5_0:2`` for a second port), or ``eth0``.
        kind: ``InfiniBand``, ``RoCE`` (RDMA over Ethernet) or ``Ethernet``.
        gbit_per_s: None where the driver does not say.
        up: whether the link is.
        guid: of the device; the hardware address of an Ethernet interface.
        pci: its PCI address; "" for a virtual one.
        hops: for each GPU of the host in order, steps through the PCI tree.
    """

    device: str
    kind: str
    gbit_per_s: float | None
    up: bool
    guid: str
    pci: str
    hops: list[int]


class NvlinkClique(msgspec.Struct, frozen=True, kw_only=True):
    """The NVLink domain of a GPU that spans hosts: NVML's cluster and clique."""

    cluster: str
    clique: int


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """The GPUs, NICs and NVLink domains of one host; `how` names the source of each part."""

    name: str
    gpus: list[str]
    ports: list[NetworkPort]
    domains: list[NvlinkClique | None]
    how: dict[str, str]


def detect_host(root: Path | None = None, name: str | None = None) -> Host:
    """This host; `root` stands for /sys, `name` for the host name."""
    sys = root or SYS
    gpus = _gpus(sys)
    rdma, ethernet = _rdma(sys, gpus), _ethernet(sys, gpus)
    domains = [_domain(gpu) for gpu in gpus]
    how = {
        "host": "gethostname",
        "gpus": f"{sys}/bus/pci/devices: {len(gpus)} found",
        "nics": f"{sys}/class/infiniband: {len(rdma)} ports; {sys}/class/net: {len(ethernet)} interfaces",
        "domain": _domain_source(gpus, domains),
    }
    return Host(name=name or socket.gethostname(), gpus=gpus, ports=[*rdma, *ethernet], domains=domains, how=how)


def boot_id() -> str:
    """The running kernel's own id, which all containers of a machine share; "" where it has none."""
    return _text(Path("/proc/sys/kernel/random/boot_id"))


def nearest_nics(host: Host) -> list[str]:
    """The NIC of each GPU: the nearest RDMA port that no other GPU has; "" where there is none left."""
    chosen: list[str] = []
    for index in range(len(host.gpus)):
        free = [port for port in host.ports if port.kind != "Ethernet" and port.up and port.device not in chosen]
        chosen.append(min(free, key=lambda port: port.hops[index]).device if free else "")
    return chosen


def _gpus(sys: Path) -> list[str]:
    found = []
    for device in _entries(sys / "bus/pci/devices"):
        if _text(device / "vendor") == _NVIDIA and _text(device / "class").startswith(_DISPLAY):
            found.append(device.name)
    return found


def _rdma(sys: Path, gpus: Sequence[str]) -> list[NetworkPort]:
    found = []
    for device in _entries(sys / "class/infiniband"):
        for port in _entries(device / "ports"):
            name = device.name if port.name == "1" else f"{device.name}:{port.name}"
            rate = re.match(r"([\d.]+) Gb/sec", _text(port / "rate"))
            found.append(
                NetworkPort(
                    device=name,
                    kind="InfiniBand" if _text(port / "link_layer") == "InfiniBand" else "RoCE",
                    gbit_per_s=float(rate[1]) if rate else None,
                    up="ACTIVE" in _text(port / "state"),
                    guid=_text(device / "node_guid"),
                    pci=_pci(device / "device"),
                    hops=[_hops(sys, gpu, device / "device") for gpu in gpus],
                )
            )
    return found


def _ethernet(sys: Path, gpus: Sequence[str]) -> list[NetworkPort]:
    """Interfaces of /sys/class/net, without the loopback."""
    found = []
    for interface in _entries(sys / "class/net"):
        if interface.name == "lo":
            continue
        megabits, pci = _text(interface / "speed"), _pci(interface / "device")
        found.append(
            NetworkPort(
                device=interface.name,
                kind="Ethernet",
                # The speed of a virtual interface means nothing.
                gbit_per_s=int(megabits) / 1000 if pci and megabits.isdecimal() and int(megabits) else None,
                up=_text(interface / "operstate") == "up",
                guid=_text(interface / "address"),
                pci=pci,
                hops=[_hops(sys, gpu, interface / "device") for gpu in gpus],
            )
        )
    return found


def _pci(link: Path) -> str:
    """The PCI address at the end of a device link."""
    try:
        name = link.resolve(strict=True).name
    except OSError:
        return ""
    return name if re.fullmatch(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", name) else ""


def _hops(sys: Path, gpu: str, device: Path) -> int:
    """Steps from one device to another through the tree of PCI bridges."""
    one, other = ((sys / "bus/pci/devices" / gpu).resolve().parts, device.resolve().parts)
    shared = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return len(one) + len(other) - 2 * shared


def _domain(gpu: str) -> NvlinkClique | None:
    """NVML's fabric information; None if NVML has none, or it is not ready."""
    try:
        import pynvml

        pynvml.nvmlInit()
        info = pynvml.c_nvmlGpuFabricInfoV_t()
        pynvml.nvmlDeviceGetGpuFabricInfoV(pynvml.nvmlDeviceGetHandleByPciBusId(gpu.encode()), pynvml.byref(info))
    except Exception:  # no wheel, no driver, an older one, or no permission
        return None
    return ready_clique(bytes(info.clusterUuid), info.state, int(info.cliqueId))


def ready_clique(cluster_uuid: bytes, state: int, clique: int) -> NvlinkClique | None:
    """The clique in NVML's fabric information; None if it is not complete or names no cluster."""
    cluster = cluster_uuid.hex()
    if state != _FABRIC_READY or not cluster.strip("0"):
        return None
    return NvlinkClique(cluster=cluster, clique=clique)


def _domain_source(gpus: Sequence[str], domains: Sequence[NvlinkClique | None]) -> str:
    if any(domains):
        return "NVML's fabric information"
    if not gpus:
        return "no GPU here"
    return "NVML names no domain beyond this host; the host is taken as one"


def _entries(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir(), key=lambda entry: natural_key(entry.name))
    except OSError:
        return []


def natural_key(name: str) -> list[str | int]:
    """A sort key under which mlx5_10 comes after mlx5_9: text and numbers alternate, text first."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""
