"""The cores that a rank may run on: always recorded, and set with ``--bind auto``.

Ranks that migrate over each other's cores cause skew. `auto` divides the cores that the launcher allows among the ranks
of the node. If the NUMA node of a GPU is known, only its cores are used.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from ncclbench.transports.base import RankIdentity


def allowed_cores() -> list[int]:
    """The cores that this process may run on, sorted; empty if the system does not report them."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(0))


def parse_cores(text: str) -> list[int]:
    """Expand the kernel's list format: ``0-2,8`` is 0, 1, 2 and 8."""
    cores: list[int] = []
    for part in text.strip().split(","):
        if part:
            low, _, high = part.partition("-")
            cores += range(int(low), int(high or low) + 1)
    return cores


def cores_near(pci_bus_id: str, sysfs: Path = Path("/sys")) -> list[int]:
    """The cores of the NUMA node of a PCI device; empty if the kernel does not report them."""
    try:
        return parse_cores((sysfs / "bus/pci/devices" / pci_bus_id.lower() / "local_cpulist").read_text())
    except (OSError, ValueError):
        return []


def share_of(cores: Sequence[int], index: int, ranks: int) -> list[int]:
    """Share `index` of `ranks` equal, contiguous shares of `cores`; one core, round robin, if there are too few."""
    if not cores:
        return []
    if len(cores) < ranks:
        return [cores[index % len(cores)]]
    each = len(cores) // ranks
    return list(cores[index * each : (index + 1) * each])


def cores_of(identity: RankIdentity, pci_bus_id: str | None = None) -> list[int]:
    """The cores that `bind` assigns to a rank.

    Ranks near the same cores divide them by local rank. Shares may overlap if the GPUs of a node are distributed
    unevenly. They never exceed what the launcher allows.
    """
    allowed = allowed_cores()
    near = set(cores_near(pci_bus_id)) if pci_bus_id else set()
    cores = [core for core in allowed if core in near] or allowed
    return share_of(cores, identity.local_rank, identity.local_size)


def bind(identity: RankIdentity, pci_bus_id: str | None = None) -> list[int]:
    """Bind this thread to its share of the cores, near its GPU if it has one, and return them."""
    mine = cores_of(identity, pci_bus_id)
    if mine:
        os.sched_setaffinity(0, mine)
    return mine
