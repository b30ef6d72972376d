"""An all_gather from exchanges: log2(n) rounds, each twice as large as the one before.

In round k each rank exchanges all shards that it has with the rank whose position differs in bit k. The volume is that
of an all_gather. The rounds show the rates of pairwise links at every distance, without a library's choice of
algorithm.
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
    member_N = np.arange(members)
    rounds = []
    for k in range(members.bit_length() - 1):
        first = member_N >> k << k  # the first of the 2**k shards that a member has before round k
        rounds.append(
            Exchange(
                label=f"bit_{k}",
                src=groups_GN.ravel(),
                dst=groups_GN[:, member_N ^ (1 << k)].ravel(),
                nbytes=np.array([shard << k]),
                send_offset=np.tile(first * shard, len(groups_GN)),
                recv_offset=np.tile(first * shard, len(groups_GN)),
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
