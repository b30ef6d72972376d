"""Every rank sends a different shard to every other rank.

Nothing is reduced on the way: every rank sends (n-1)/n of its buffer, and receives as much.
"""

from ncclbench.schedule import Case, CollectiveParams, Op, Schedule, collective
from ncclbench.topology import Topology


class Params(CollectiveParams, frozen=True):
    """Parameters of all_to_all."""


def schedule(case: Case, topology: Topology) -> Schedule:
    """One all_to_all in every group; each rank's buffer has n shards, one per destination."""
    params = case.read(Params)
    return collective(
        case, topology, Op.ALL_TO_ALL, group=params.group, persistent=params.persistent, overlap=params.overlap
    )
