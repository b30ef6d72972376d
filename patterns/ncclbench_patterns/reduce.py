"""The root ends with the element-wise reduction of all ranks' buffers.

A pipelined chain or tree passes the whole buffer over every link once, so busbw equals algbw.
"""

from ncclbench.schedule import Case, CollectiveParams, Op, Redop, Schedule, collective
from ncclbench.topology import Topology


class Params(CollectiveParams, frozen=True):
    """Parameters of reduce; `root` is a position in its group."""

    redop: Redop = Redop.SUM
    root: int = 0


def schedule(case: Case, topology: Topology) -> Schedule:
    """One in-place reduce in every group."""
    params = case.read(Params)
    return collective(
        case,
        topology,
        Op.REDUCE,
        group=params.group,
        redop=params.redop,
        root=params.root,
        persistent=params.persistent,
        overlap=params.overlap,
    )
