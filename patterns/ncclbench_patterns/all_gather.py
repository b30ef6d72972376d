"""Every rank ends with the shards of all ranks, in rank order.

This is the second half of an all_reduce: (n-1)/n of the gathered buffer over every link of a ring.
"""

from ncclbench.schedule import Case, CollectiveParams, Op, Schedule, collective
from ncclbench.topology import Topology


class Params(CollectiveParams, frozen=True):
    """Parameters of all_gather."""


def schedule(case: Case, topology: Topology) -> Schedule:
    """One all_gather in every group; the gathered buffer has n shards."""
    params = case.read(Params)
    return collective(
        case, topology, Op.ALL_GATHER, group=params.group, persistent=params.persistent, overlap=params.overlap
    )
