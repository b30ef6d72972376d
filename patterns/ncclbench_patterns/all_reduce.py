"""Every rank ends with the element-wise reduction of all ranks' buffers.

A ring moves 2(n-1)/n of the buffer over every link: once around to reduce, and once more to distribute the result.
"""

from ncclbench.schedule import Case, CollectiveParams, Op, Redop, Schedule, collective
from ncclbench.topology import Topology


class Params(CollectiveParams, frozen=True):
    """Parameters of all_reduce."""

    redop: Redop = Redop.SUM


def schedule(case: Case, topology: Topology) -> Schedule:
    """One in-place all_reduce of the whole buffer in every group."""
    params = case.read(Params)
    return collective(
        case,
        topology,
        Op.ALL_REDUCE,
        group=params.group,
        redop=params.redop,
        persistent=params.persistent,
        overlap=params.overlap,
    )
