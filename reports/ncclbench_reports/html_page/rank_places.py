"""Where each rank sits, in names: for hovers, heat maps and tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncclbench.store.run_directory import Run

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Places:
    """Where the R ranks of a run sit.

    Attributes:
        nodes_R: index of each rank's node.
        rails_R: rail of each rank.
        leaves_R: index of each rank's leaf, or None where no topology file named leaves.
        node_names: name of each node.
        leaf_names: name of each leaf.
        devices_R: name of each rank's NIC, "" where it is not known.
    """

    nodes_R: Ints
    rails_R: Ints
    leaves_R: Ints | None
    node_names: Sequence[str]
    leaf_names: Sequence[str]
    devices_R: Sequence[str]

    @classmethod
    def of(cls, run: Run) -> "Places":
        """From the manifest; what it does not say is node 0 and rail 0."""
        topology = run.manifest.get("topology")
        topology = topology if isinstance(topology, Mapping) else {}
        world = int(run.manifest.get("world_size") or 1)
        nodes_R, rails_R = (_indices(topology, key, world) for key in ("nodes", "rails"))
        names = [str(name) for name in topology.get("node_names") or []]
        names += [f"node {index}" for index in range(len(names), int(nodes_R.max(initial=0)) + 1)]
        wiring = topology.get("wiring")
        wiring = wiring if isinstance(wiring, Mapping) else {}
        leaves = [-1 if leaf is None else leaf for leaf in wiring.get("leaves") or []]
        leaves_R = _indices({"leaves": leaves}, "leaves", world) if len(leaves) == world else None
        leaf_names = [str(name) for name in wiring.get("leaf_names") or []]
        if leaves_R is not None:
            leaf_names += [f"leaf {index}" for index in range(len(leaf_names), int(leaves_R.max(initial=0)) + 1)]
        devices = [str(device) for device in wiring.get("devices") or []]
        return cls(nodes_R, rails_R, leaves_R, names, leaf_names, devices if len(devices) == world else [""] * world)

    def rank(self, rank: int) -> str:
        """``n0 rail 1 (rank 1)``."""
        if not 0 <= rank < len(self.nodes_R):
            return f"rank {rank}"
        return f"{self.nic(rank)} (rank {rank})"

    def nic(self, rank: int) -> str:
        """``n0 rail 1 mlx5_1``: a NIC is a node's port on a rail."""
        device = f" {self.devices_R[rank]}" if self.devices_R[rank] else ""
        return f"{self.node_names[self.nodes_R[rank]]} rail {self.rails_R[rank]}{device}"

    def leaf(self, rank: int) -> str | None:
        """The leaf of the rank's NIC."""
        if self.leaves_R is None or self.leaves_R[rank] < 0:
            return None
        return self.leaf_names[int(self.leaves_R[rank])]


def _indices(topology: Mapping[str, Any], key: str, world: int) -> Ints:
    stated = topology.get(key)
    try:
        values = np.asarray(stated, dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        return np.zeros(world, np.int64)
    if values.shape != (world,) or (key != "leaves" and world and values.min() < 0):
        return np.zeros(world, np.int64)
    return values
