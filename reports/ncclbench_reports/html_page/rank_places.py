"""Where each rank sits, in names: for hovers, heat maps and tables."""

from collections.abc import Sequence
from dataclasses import dataclass

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
        """From the run's topology; without one, every rank is on node 0 and rail 0."""
        world = run.manifest.world_size or 1
        topology = run.topology
        if topology is None:
            nowhere = np.zeros(world, np.int64)
            named = run.manifest.topology.node_names if run.manifest.topology else []
            return cls(nowhere, nowhere, None, named or ["node 0"], [], [""] * world)
        wiring = topology.wiring
        if wiring is None:
            return cls(topology.nodes, topology.rails, None, topology.node_names, [], [""] * world)
        leaves = wiring.leaves if (wiring.leaves >= 0).any() else None
        return cls(topology.nodes, topology.rails, leaves, topology.node_names, wiring.leaf_names, wiring.devices)

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
