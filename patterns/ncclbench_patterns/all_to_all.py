"""Every rank sends a different shard to every other rank.

No link is spared and nothing is reduced on the way: (n-1)/n of a rank's buffer leaves it, and as much arrives.
"""

from ncclbench.schedule import Case, CollectiveParams, Op, Schedule, collective
from ncclbench.topology import Topology


class Params(CollectiveParams, frozen=True):
    """Parameters of all_to_all."""


def schedule(case: Case, topology: Topology) -> Schedule:
    """One all_to_all in every group; each rank's buffer is n shards, one a destination."""
    params = case.read(Params)
    return collective(
        case, topology, Op.ALL_TO_ALL, group=params.group, persistent=params.persistent, overlap=params.overlap
    )
