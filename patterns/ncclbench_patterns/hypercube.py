"""An all_gather by hand: log2(n) rounds of exchanges, each twice as large as the one before.

In round k a rank trades all it has so far with the rank whose number differs in bit k. The volume is that of an
all_gather; the rounds show what pairwise links at every distance do, without a library's choice of algorithm.
"""

import numpy as np

from ncclbench.schedule import Case, Exchange, GroupParams, Schedule, Unable, shard_count
from ncclbench.topology import Topology


class Params(GroupParams, frozen=True):
    """Parameters of hypercube."""


def schedule(case: Case, topology: Topology) -> Schedule:
    """Rounds ``bit_0``, ``bit_1``, ... over a buffer of n shards, in place.

    Raises:
        Unable: unless the groups' size is a power of two above one.
    """
    groups_GN = topology.groups(case.read(Params).group)
    members = groups_GN.shape[1]
    if members < 2 or members & (members - 1):
        raise Unable(f"hypercube needs a power of two of ranks, and at least 2; groups here have {members}")
    count = shard_count(case, members)
    shard = count * case.element.itemsize
    place = np.arange(members)
    rounds = []
    for k in range(members.bit_length() - 1):
        held = place >> k << k  # the first of the 2**k shards that a member has before round k
        rounds.append(
            Exchange(
                label=f"bit_{k}",
                src=groups_GN.ravel(),
                dst=groups_GN[:, place ^ (1 << k)].ravel(),
                nbytes=np.array([shard << k]),
                send_offset=np.tile(held * shard, len(groups_GN)),
                recv_offset=np.tile(held * shard, len(groups_GN)),
                read="data",
                write="data",
            )
        )
    return Schedule(
        world_size=topology.world_size,
        dtype=case.element,
        buffers={"data": shard * members},
        inputs=("data",),
        phases=tuple(rounds),
        op="all_gather",
        size_bytes=shard * members,
        count=count,
        groups=groups_GN,
    )
