"""An all-to-all in which one rail receives more than the others, as if a few experts were chosen most often.

An even all-to-all is limited by all NICs together, a hot one by the NICs of one rail: the time grows with the largest
load, not with the sum. Time beyond that is lost by the library to waiting.
"""

import numpy as np

from ncclbench.schedule import AllToAllV, Case, Schedule, Unable, grid_of, shard_count
from ncclbench.schedule import Params as BaseParams
from ncclbench.topology import Topology

_FACTORS = (1, 2, 4)
# The rows of an uneven all-to-all are one number per pair of ranks: 128 MiB per round for this many ranks.
_MOST_RANKS = 4096


class Params(BaseParams, frozen=True, kw_only=True):
    """Parameters of rail_hot."""

    rail: int = 0
    """the rail that receives more."""


def variants(case: Case, topology: Topology) -> list[Schedule]:
    """Phases ``factor=F``: ranks on the hot rail receive F times as much as others; S is an even buffer.

    Raises:
        Unable: with fewer than 2 nodes or 2 rails, or without the given rail.
    """
    rail = case.read(Params).rail
    ranks = topology.world_size
    count = shard_count(case, ranks)
    if ranks > _MOST_RANKS:
        raise Unable(f"rail_hot holds a number for each pair of ranks: {ranks} are more than {_MOST_RANKS}")
    grid_of(topology, "rail_hot", rails=2)
    if rail not in topology.rails:
        raise Unable(f"rail_hot: no rank is on rail {rail}; there are: {np.unique(topology.rails).tolist()}")
    shard = count * case.element.itemsize
    schedules = []
    for factor in _FACTORS:
        rows_N = np.where(topology.rails == rail, factor, 1)
        phase = AllToAllV(
            label=f"factor={factor}",
            groups=np.arange(ranks)[None],
            rows=np.tile(rows_N, (1, ranks, 1)),
            row_bytes=shard,
        )
        sent = int(rows_N.sum()) * shard
        schedules.append(
            Schedule(
                world_size=ranks,
                dtype=case.element,
                buffers={"send": sent, "recv": ranks * factor * shard},
                inputs=("send",),
                phases=(phase,),
                op=None,
                size_bytes=ranks * shard,
                count=count,
            )
        )
    return schedules
