"""Random permutations of all GPUs, none to its own node: how well the fabric distributes flows over its uplinks.

Each GPU sends to one GPU and receives from one, so no NIC has more than one flow per direction. A flow that is slower
than a NIC therefore shares a link. With flows hashed onto links (ECMP) the slowest flow has about the rate of a link
over its largest load; with adaptive routing it has nearly the full rate. `ncclbench.analysis.flows` compares the two.
"""

from typing import Literal

import numpy as np

from ncclbench.schedule import (
    Case,
    Direction,
    Ints,
    Round,
    Schedule,
    derangement,
    grid_of,
    rounds_of,
    shard_count,
)
from ncclbench.schedule import Params as BaseParams
from ncclbench.topology import Topology


class Params(BaseParams, frozen=True, kw_only=True):
    """Parameters of permutation."""

    rounds: int = 20
    """number of permutations."""
    rail: Literal["any", "same"] = "any"
    """any: to any rail of the other node; same: rails are kept."""
    direction: Direction = "both"
    """both; or apart: no rank sends and receives at once."""
    seed: int = 0


def variants(case: Case, topology: Topology) -> list[Schedule]:
    """Rounds ``permutation=K``.

    Raises:
        Unable: with fewer than 2 nodes, or with uneven ones.
    """
    params = case.read(Params)
    shard_count(case, 1)
    grid_DTR = grid_of(topology, "permutation")
    rng = np.random.default_rng(params.seed)
    grid_DM = grid_DTR.reshape(len(grid_DTR), -1)
    rounds = [
        Round(f"permutation={k + 1}", grid_DM, _elsewhere(grid_DM, rng, mix=params.rail == "any"))
        for k in range(max(1, params.rounds))
    ]
    return rounds_of(case, topology, rounds, seed=params.seed, direction=params.direction)


def _elsewhere(grid_DM: Ints, rng: np.random.Generator, *, mix: bool) -> Ints:
    """For each rank a target in another domain, each exactly once; shape (D, M).

    For each position in a domain, a derangement of the domains selects the target domain. Then the targets are shuffled
    inside each domain. Both are permutations, and only the first one changes the domain.
    """
    domains, members = grid_DM.shape
    targets = np.stack([derangement(domains, rng) for _ in range(members)], axis=1)
    shuffled = np.stack([rng.permutation(row) for row in grid_DM]) if mix else grid_DM
    return np.asarray(shuffled[targets, np.arange(members)])
