"""Every pair of nodes exactly once, rail by rail, both ways: the whole matrix, for a small number of nodes.

The circle method pairs N nodes in N - 1 rounds (N rounds if N is odd, with one node idle in each). All pairs of a round
are busy at once. The number of rounds grows with N, so `same_rail` samples distances instead.
"""

import numpy as np

from ncclbench.schedule import Case, Direction, Round, Schedule, grid_of, round_robin, rounds_of, shard_count
from ncclbench.schedule import Params as BaseParams
from ncclbench.topology import Topology


class Params(BaseParams, frozen=True, kw_only=True):
    """Parameters of pairs."""

    direction: Direction = "both"
    """both; or apart: first one of a pair sends, then the other."""
    seed: int = 0


def variants(case: Case, topology: Topology) -> list[Schedule]:
    """Rounds ``round=K``: every GPU with its counterpart on the paired node.

    Raises:
        Unable: with fewer than 2 nodes, or with uneven ones.
    """
    params = case.read(Params)
    shard_count(case, 1)
    grid_DTR = grid_of(topology, "pairs")
    rounds = []
    for k, node_pairs in enumerate(round_robin(len(grid_DTR))):
        a, b = np.array(node_pairs).T
        rounds.append(Round(f"round={k + 1}", grid_DTR[np.append(a, b)], grid_DTR[np.append(b, a)]))
    return rounds_of(case, topology, rounds, seed=params.seed, direction=params.direction)
