"""Every rank sends its buffer to the next rank of its group and receives that of the previous rank (ring, +1).

Every link carries the buffer once in each direction, so busbw equals algbw.
"""

import numpy as np

from ncclbench.schedule import Case, Exchange, GroupParams, Schedule, shard_count
from ncclbench.topology import Topology


class Params(GroupParams, frozen=True):
    """Parameters of send_recv."""


def schedule(case: Case, topology: Topology) -> Schedule:
    """One round of flows, rank i of each group to rank i + 1."""
    groups_GN = topology.groups(case.read(Params).group)
    count = shard_count(case, 1)
    nbytes = count * case.element.itemsize
    flows = Exchange(
        label="send_recv",
        src=groups_GN.ravel(),
        dst=np.roll(groups_GN, -1, axis=1).ravel(),
        nbytes=np.array([nbytes]),
    )
    return Schedule(
        world_size=topology.world_size,
        dtype=case.element,
        buffers={"send": nbytes, "recv": nbytes},
        inputs=("send",),
        phases=(flows,),
        op="send_recv",
        size_bytes=nbytes,
        count=count,
        groups=groups_GN,
    )
