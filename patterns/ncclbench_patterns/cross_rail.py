"""Every GPU to a GPU on another rail of another node: traffic from leaf to leaf, over the spines.

By default NCCL turns a cross-rail test into a same-rail one: it hops over NVLink to the GPU on the receiver's rail
(PXN). So the path is a parameter. Each path needs a process start of its own, because NCCL reads its settings once:

- ``spine``: from the sender's own NIC over leaf and spine to the receiver's NIC;
- ``pxn``: over NVLink to the GPU on the receiver's rail, then along that rail;
- ``crossnic0``: from the same NIC as with pxn, but without NVLink.

Transports other than NCCL always use the path ``spine``.
"""

from typing import Literal

import numpy as np

from ncclbench.schedule import (
    Case,
    Direction,
    Needs,
    Round,
    Schedule,
    grid_of,
    offsets,
    rounds_of,
    shard_count,
)
from ncclbench.schedule import (
    Params as BaseParams,
)
from ncclbench.topology import Topology

_VARIABLES = {
    "spine": {"NCCL_PXN_DISABLE": "1", "NCCL_CROSS_NIC": "1"},
    "pxn": {"NCCL_PXN_DISABLE": "0", "NCCL_P2P_PXN_LEVEL": "2"},
    "crossnic0": {"NCCL_PXN_DISABLE": "1", "NCCL_CROSS_NIC": "0"},
}


class Params(BaseParams, frozen=True, kw_only=True):
    """Parameters of cross_rail."""

    mode: Literal["spine", "pxn", "crossnic0"] = "spine"
    """the path: spine, pxn or crossnic0; each needs a process start of its own."""
    offsets: int = 3
    """number of distances between nodes; at most all that exist."""
    direction: Direction = "both"
    """both; or apart: no rank sends and receives at once."""
    seed: int = 0


def needs(case: Case) -> Needs:
    """The settings of NCCL for the case's mode."""
    mode = case.read(Params).mode
    only_nccl = "" if mode == "spine" else f"mode={mode}"
    return Needs(variables=_VARIABLES[mode], only_nccl=only_nccl, pxn=mode == "pxn")


def variants(case: Case, topology: Topology) -> list[Schedule]:
    """Rounds ``offset=S,rail=+Q``: (d, r) to (d + S, r + Q).

    Raises:
        Unable: with fewer than 2 nodes or 2 rails, or with uneven nodes.
    """
    params = case.read(Params)
    shard_count(case, 1)
    grid_DTR = grid_of(topology, "cross_rail", rails=2)
    rounds = [
        Round(f"offset={s},rail=+{q}", grid_DTR, np.roll(grid_DTR, (-s, -q), axis=(0, 2)))
        for s in offsets(len(grid_DTR), params.offsets, params.seed)
        for q in range(1, grid_DTR.shape[2])
    ]
    aligned = params.mode != "spine"
    return rounds_of(case, topology, rounds, seed=params.seed, direction=params.direction, aligned=aligned)
