"""Every rank ends with the root's buffer.

A pipelined chain or tree passes the whole buffer over every link once, so busbw equals algbw.
"""

from ncclbench.schedule import Case, CollectiveParams, Op, Schedule, collective
from ncclbench.topology import Topology


class Params(CollectiveParams, frozen=True):
    """Parameters of broadcast; `root` is a position in its group."""

    root: int = 0


def schedule(case: Case, topology: Topology) -> Schedule:
    """One in-place broadcast in every group."""
    params = case.read(Params)
    return collective(
        case,
        topology,
        Op.BROADCAST,
        group=params.group,
        root=params.root,
        persistent=params.persistent,
        overlap=params.overlap,
    )
