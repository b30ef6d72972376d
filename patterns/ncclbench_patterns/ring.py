"""Every GPU to the same rail of the next node, then leaving on one rail and arriving on the next: a ring's edges.

This is the traffic of NCCL's rings between nodes. The second round crosses leaves. Together they show a slow edge.
"""

import numpy as np

from ncclbench.schedule import Case, Direction, Round, Schedule, grid_of, rounds_of, shard_count
from ncclbench.schedule import Params as BaseParams
from ncclbench.topology import Topology


class Params(BaseParams, frozen=True, kw_only=True):
    """Parameters of ring."""

    direction: Direction = "both"
    """both; or apart: no rank sends and receives at once."""
    seed: int = 0


def variants(case: Case, topology: Topology) -> list[Schedule]:
    """Rounds ``rail=+0``, (d, r) to (d + 1, r), and, with 2 rails, ``rail=+1``, (d, r) to (d + 1, r + 1).

    Raises:
        Unable: with fewer than 2 nodes, or with uneven ones.
    """
    params = case.read(Params)
    shard_count(case, 1)
    grid_DTR = grid_of(topology, "ring")
    rounds = [
        Round(f"rail=+{q}", grid_DTR, np.roll(grid_DTR, (-1, -q), axis=(0, 2)))
        for q in range(min(2, grid_DTR.shape[2]))
    ]
    return rounds_of(case, topology, rounds, seed=params.seed, direction=params.direction)
