"""A collective on each rail's GPUs: one rail at a time, then all rails at once.

On separate leaves the rails should not affect each other. The interference is the time of a rail with all rails busy
over its time alone. Its causes are a shared host bridge, a shared leaf, or a CPU that is too slow.
"""

from typing import Literal

from ncclbench.schedule import Case, Collective, Ints, Op, Schedule, grid_of, shard_count
from ncclbench.schedule import Params as BaseParams
from ncclbench.topology import Topology


class Params(BaseParams, frozen=True, kw_only=True):
    """Parameters of rail_groups."""

    op: Literal["all_reduce", "all_to_all"] = "all_reduce"
    """all_reduce or all_to_all."""


def variants(case: Case, topology: Topology) -> list[Schedule]:
    """Phases ``rail=R``, one group alone, and ``all``, all groups side by side; S is the whole buffer of a group.

    Raises:
        Unable: with fewer than 2 nodes or 2 rails, or with uneven nodes.
    """
    op = Op(case.read(Params).op)
    shard_count(case, 1)
    grid_DTR = grid_of(topology, "rail_groups", rails=2)
    groups_RN = grid_DTR.reshape(-1, grid_DTR.shape[2]).T
    groups_RN.sort(axis=1)
    alone = [_one(case, topology, op, f"rail={r}", groups_RN[r : r + 1]) for r in range(len(groups_RN))]
    return [*alone, _one(case, topology, op, "all", groups_RN)]


def _one(case: Case, topology: Topology, op: Op, label: str, groups_GN: Ints) -> Schedule:
    members, in_place = groups_GN.shape[1], op is Op.ALL_REDUCE
    count = shard_count(case, 1 if in_place else members)
    shards = 1 if in_place else members
    nbytes = count * shards * case.element.itemsize
    names = ("data",) if in_place else ("send", "recv")
    phase = Collective(label=label, op=op, groups=groups_GN, count=count, read=names[0], write=names[-1])
    return Schedule(
        world_size=topology.world_size,
        dtype=case.element,
        buffers=dict.fromkeys(names, nbytes),
        inputs=names[:1],
        phases=(phase,),
        op=op.value,
        size_bytes=nbytes,
        count=count,
        groups=groups_GN,
    )
