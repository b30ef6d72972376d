"""Which cores a rank may run on: recorded always, set with ``--bind auto``.

Ranks that wander over each other's cores show as skew. `auto` gives each rank of a node its share of the cores that
the launcher left to it: where a GPU's own cores are known (the NUMA node it hangs on), from among those.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from ncclbench.transports.base import RankIdentity


def allowed_cores() -> list[int]:
    """The cores that this process may run on, in order; empty where the system does not say."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(0))


def parse_cores(text: str) -> list[int]:
    """The kernel's short form of a list of cores, in full: ``0-2,8`` is 0, 1, 2 and 8."""
    cores: list[int] = []
    for part in text.strip().split(","):
        if part:
            low, _, high = part.partition("-")
            cores += range(int(low), int(high or low) + 1)
    return cores


def cores_near(pci_bus_id: str, sysfs: Path = Path("/sys")) -> list[int]:
    """The cores of the NUMA node that a PCI device hangs on; empty if the kernel does not say."""
    try:
        return parse_cores((sysfs / "bus/pci/devices" / pci_bus_id.lower() / "local_cpulist").read_text())
    except (OSError, ValueError):
        return []


def share_of(cores: Sequence[int], place: int, ranks: int) -> list[int]:
    """The `place`-th of `ranks` equal runs of `cores`; a single core each, in turns, if there are fewer than ranks."""
    if not cores:
        return []
    if len(cores) < ranks:
        return [cores[place % len(cores)]]
    each = len(cores) // ranks
    return list(cores[place * each : (place + 1) * each])


def cores_of(identity: RankIdentity, pci_bus_id: str | None = None) -> list[int]:
    """The cores that `bind` keeps a rank to.

    Ranks that hang on the same cores share those by their place on the node, so shares may overlap where a node's
    GPUs are spread unevenly; they never leave what the launcher allows.
    """
    allowed = allowed_cores()
    near = set(cores_near(pci_bus_id)) if pci_bus_id else set()
    cores = [core for core in allowed if core in near] or allowed
    return share_of(cores, identity.local_rank, identity.local_size)


def bind(identity: RankIdentity, pci_bus_id: str | None = None) -> list[int]:
    """Keep this thread to its share of the cores, near its GPU if it has one; returns them."""
    mine = cores_of(identity, pci_bus_id)
    if mine:
        os.sched_setaffinity(0, mine)
    return mine
