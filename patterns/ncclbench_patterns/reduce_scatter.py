"""Every rank ends with its own shard of the element-wise reduction of all ranks' buffers.

This is the first half of an all_reduce: (n-1)/n of the buffer over every link of a ring.
"""

from ncclbench.schedule import Case, CollectiveParams, Op, Redop, Schedule, collective
from ncclbench.topology import Topology


class Params(CollectiveParams, frozen=True):
    """Parameters of reduce_scatter."""

    redop: Redop = Redop.SUM


def schedule(case: Case, topology: Topology) -> Schedule:
    """One reduce_scatter in every group; the buffer has n shards."""
    params = case.read(Params)
    return collective(
        case,
        topology,
        Op.REDUCE_SCATTER,
        group=params.group,
        redop=params.redop,
        persistent=params.persistent,
        overlap=params.overlap,
    )
