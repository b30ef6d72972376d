"""Every rank ends with the shards of all ranks, in rank order.

The other half of an all_reduce: (n-1)/n of the gathered buffer over every link of a ring.
"""

from ncclbench.schedule import Case, GroupParams, Op, Schedule, collective
from ncclbench.topology import Topology


class Params(GroupParams, frozen=True):
    """Parameters of all_gather."""


def schedule(case: Case, topology: Topology) -> Schedule:
    """One all_gather in every group; the gathered buffer is n shards."""
    return collective(case, topology, Op.ALL_GATHER, group=case.read(Params).group)
