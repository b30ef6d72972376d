"""Halves of the machine against each other: neighboring nodes first, then nodes that are half the machine apart.

In every round each node exchanges data with exactly one other, both ways and on all rails. ``near`` pairs node i with i
^ 1, ``far`` with i + D/2, and the cuts between them pair halves of blocks of increasing size. The ratio of far to near
is the fraction of the bandwidth that the spines, or the links between pods, provide.
"""

import numpy as np

from ncclbench.schedule import Case, Direction, Round, Schedule, Unable, grid_of, rounds_of, shard_count
from ncclbench.schedule import Params as BaseParams
from ncclbench.topology import Topology


class Params(BaseParams, frozen=True, kw_only=True):
    """Parameters of bisection."""

    cuts: int = 4
    """number of cuts, from 2 on, of those that the number of nodes allows; near and far are always included."""
    direction: Direction = "both"
    """both; or apart: first one half sends, then the other."""
    seed: int = 0


def variants(case: Case, topology: Topology) -> list[Schedule]:
    """Rounds ``near``, ``cut=H`` and ``far``: node i with the node at distance H in its block of 2H.

    Raises:
        Unable: with fewer than 4 nodes, where near and far are the same, or with an odd number.
    """
    params = case.read(Params)
    shard_count(case, 1)
    grid_DTR = grid_of(topology, "bisection", domains=4)
    domains = len(grid_DTR)
    if domains % 2:
        raise Unable(f"bisection needs an even number of nodes; this job has {domains}")
    middle = [h for h in range(2, domains // 2) if domains % (2 * h) == 0]
    cuts = {1: "near", **{h: f"cut={h}" for h in middle[: max(0, params.cuts - 2)]}, domains // 2: "far"}
    nodes = np.arange(domains)
    first = {h: nodes - nodes % (2 * h) for h in cuts}
    rounds = [Round(label, grid_DTR, grid_DTR[first[h] + (nodes + h) % (2 * h)]) for h, label in cuts.items()]
    return rounds_of(case, topology, rounds, seed=params.seed, direction=params.direction)
