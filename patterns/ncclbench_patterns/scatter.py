"""Every rank ends with its own shard of the root's buffer.

All n-1 shards leave over the root's own link, which is the bottleneck.
"""

from ncclbench.schedule import Case, CollectiveParams, Op, Schedule, collective
from ncclbench.topology import Topology


class Params(CollectiveParams, frozen=True):
    """Parameters of scatter; `root` is a position in its group."""

    root: int = 0


def schedule(case: Case, topology: Topology) -> Schedule:
    """One scatter in every group; the root's buffer has n shards."""
    params = case.read(Params)
    return collective(
        case,
        topology,
        Op.SCATTER,
        group=params.group,
        root=params.root,
        persistent=params.persistent,
        overlap=params.overlap,
    )
