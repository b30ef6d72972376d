"""The same rail inside a leaf against the same rail across leaves: the effect of the uplinks on a flow.

Both kinds of round move the same bytes between the same NICs; only the second crosses the spines. The ratio of their
rates is one over the oversubscription. A leaf that lost one of its U uplinks has (U - 1) / U of the rate of the others.
"""

import itertools

import numpy as np

from ncclbench.schedule import Case, Direction, Ints, Round, Schedule, Unable, grid_of, offsets, rounds_of, shard_count
from ncclbench.schedule import Params as BaseParams
from ncclbench.topology import Topology


class Params(BaseParams, frozen=True, kw_only=True):
    """Parameters of leaf_contrast."""

    rounds: int = 3
    """number of rounds of each kind; at most all that exist."""
    direction: Direction = "both"
    """both; or apart: no rank sends and receives at once."""
    seed: int = 0


def variants(case: Case, topology: Topology) -> list[Schedule]:
    """Rounds ``near,offset=S`` under each leaf, and ``far,leaf=+L,offset=S`` from leaf to leaf, rail by rail.

    Raises:
        Unable: without a topology file that names leaves, with one leaf per rail, or with uneven leaves.
    """
    params = case.read(Params)
    shard_count(case, 1)
    by_leaf_MLK = _by_leaf(topology, grid_of(topology, "leaf_contrast"))
    _, leaves, nodes = by_leaf_MLK.shape
    near = [
        Round(f"near,offset={s}", by_leaf_MLK, np.roll(by_leaf_MLK, -s, axis=2))
        for s in offsets(nodes, params.rounds, params.seed)
    ]
    far = [
        Round(f"far,leaf=+{up},offset={s}", by_leaf_MLK, np.roll(by_leaf_MLK, (-up, -s), axis=(1, 2)))
        for s, up in itertools.islice(itertools.product(range(nodes), range(1, leaves)), params.rounds)
    ]
    return rounds_of(case, topology, near + far, seed=params.seed, direction=params.direction)


def _by_leaf(topology: Topology, grid_DTR: Ints) -> Ints:
    """The ranks by member of a domain, leaf and node under the leaf: shape (M, L, K)."""
    if topology.wiring is None or np.any(topology.wiring.leaves < 0):
        raise Unable("leaf_contrast needs the leaf of every NIC, which only a topology file tells: --topology FILE")
    columns = []
    for ranks_D in grid_DTR.reshape(len(grid_DTR), -1).T:
        leaves_D = topology.wiring.leaves[ranks_D]
        columns.append([ranks_D[leaves_D == leaf] for leaf in np.unique(leaves_D)])
    shapes = {tuple(len(ranks) for ranks in column) for column in columns}
    if len(shapes) > 1 or len(set(next(iter(shapes)))) > 1:
        raise Unable("leaf_contrast needs leaves that serve as many nodes each; here they are uneven")
    leaves, nodes = len(columns[0]), len(columns[0][0])
    if leaves < 2 or nodes < 2:
        raise Unable(f"leaf_contrast needs 2 leaves a rail and 2 nodes a leaf; here are {leaves} and {nodes}")
    return np.array(columns)
