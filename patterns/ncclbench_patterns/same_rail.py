"""Every GPU to the GPU on the same rail of another node, all rails at once, at several distances.

Traffic stays under one leaf, so each flow is limited by its two NICs only. A NIC whose flows are slow in all rounds is
slow itself. With ``direction=apart`` no rank sends and receives at once, which separates slow senders from slow
receivers.
"""

import numpy as np

from ncclbench.schedule import Case, Direction, Round, Schedule, grid_of, offsets, rounds_of, shard_count
from ncclbench.schedule import Params as BaseParams
from ncclbench.topology import Topology


class Params(BaseParams, frozen=True, kw_only=True):
    """Parameters of same_rail."""

    offsets: int = 7
    """number of distances between nodes; at most all that exist."""
    direction: Direction = "both"
    """both; or apart: no rank sends and receives at once, in twice or three times as many rounds."""
    seed: int = 0


def variants(case: Case, topology: Topology) -> list[Schedule]:
    """Rounds ``offset=S``: (d, r) to (d + S, r).

    Raises:
        Unable: with fewer than 2 nodes, or with uneven ones.
    """
    params = case.read(Params)
    shard_count(case, 1)
    grid_DTR = grid_of(topology, "same_rail")
    rounds = [
        Round(f"offset={s}", grid_DTR, np.roll(grid_DTR, -s, axis=0))
        for s in offsets(len(grid_DTR), params.offsets, params.seed)
    ]
    return rounds_of(case, topology, rounds, seed=params.seed, direction=params.direction)
