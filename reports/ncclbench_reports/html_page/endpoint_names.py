"""What ranks, NICs and leaves are called in hovers, heat maps and tables."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ncclbench.store.run_directory import Run
from ncclbench.topology import Topology

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class EndpointNames:
    """Names of the R ranks of a topology."""

    topology: Topology

    @classmethod
    def of(cls, run: Run) -> "EndpointNames":
        """The names of a run's ranks; without a topology every rank is on node 0 and rail 0."""
        if run.topology is not None:
            return cls(run.topology)
        zeros_R = np.zeros(run.manifest.world_size or 1, np.int64)
        stored = run.manifest.topology.node_names[:1] if run.manifest.topology else []
        return cls(
            Topology(
                nodes=zeros_R,
                domains=zeros_R,
                rails=zeros_R,
                sites=zeros_R,
                node_names=tuple(stored) or ("node 0",),
            )
        )

    @property
    def nodes_R(self) -> Ints:
        """Index of each rank's node."""
        return self.topology.nodes

    @property
    def rails_R(self) -> Ints:
        """Rail of each rank."""
        return self.topology.rails

    @property
    def leaves_R(self) -> Ints | None:
        """Index of each rank's leaf, -1 where it is unknown; None if no leaf is known."""
        wiring = self.topology.wiring
        return wiring.leaves if wiring is not None and (wiring.leaves >= 0).any() else None

    def rank(self, rank: int) -> str:
        """``n0 rail 1 mlx5_1 (rank 1)``."""
        if not 0 <= rank < self.topology.world_size:
            return f"rank {rank}"
        return f"{self.nic(rank)} (rank {rank})"

    def node(self, rank: int) -> str:
        """The name of the rank's node."""
        return self.topology.node_names[int(self.nodes_R[rank])]

    def nic(self, rank: int) -> str:
        """``n0 rail 1 mlx5_1``: a NIC is the port of a node on a rail."""
        wiring = self.topology.wiring
        device = f" {wiring.devices[rank]}" if wiring is not None and wiring.devices[rank] else ""
        return f"{self.node(rank)} rail {self.rails_R[rank]}{device}"

    def leaf(self, rank: int) -> str:
        """The leaf of the rank's NIC; "" where it is unknown."""
        leaves_R = self.leaves_R
        return "" if leaves_R is None or leaves_R[rank] < 0 else self.leaf_name(int(leaves_R[rank]))

    def leaf_name(self, leaf: int) -> str:
        """The name of a leaf by its index."""
        wiring = self.topology.wiring
        return "no leaf" if wiring is None or leaf < 0 else wiring.leaf_names[leaf]
