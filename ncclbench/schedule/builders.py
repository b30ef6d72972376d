"""Builders that patterns of standard collectives share."""

from ncclbench.errors import Unable, UsageError
from ncclbench.schedule.case import Case
from ncclbench.schedule.dtypes import Redop
from ncclbench.schedule.phases import READS_ALL_SHARDS, WRITES_ALL_SHARDS, Collective, Op
from ncclbench.schedule.schedule import Schedule
from ncclbench.topology import Topology

# These run in place, in one buffer, as in torch and in the in-place column of nccl-tests.
IN_PLACE = frozenset({Op.ALL_REDUCE, Op.BROADCAST, Op.REDUCE})


def shard_count(case: Case, shards: int) -> int:
    """Elements per shard if the case's bytes are split over `shards`; the remainder is not sent.

    Raises:
        Unable: if a shard is less than one element. A size is refused, never silently made larger.
    """
    count = case.nbytes // (case.element.itemsize * shards)
    if count < 1:
        share = f" for each of {shards} ranks" if shards > 1 else ""
        raise Unable(f"{case.nbytes} bytes is less than one {case.dtype}{share}")
    return count


def collective(
    case: Case,
    topology: Topology,
    op: Op,
    *,
    group: str = "world",
    redop: Redop | None = None,
    root: int | None = None,
    persistent: bool = False,
    overlap: bool = False,
) -> Schedule:
    """The schedule of one collective over all groups at once, labelled with its own name.

    Args:
        case: S is the whole buffer: N x count for the ops that shard it.
        topology: node, domain and rail of every rank.
        op: the operation of every group.
        group: see `Topology.groups`.
        redop: reduction, for the reducing ops.
        root: position of the root in its group, for the rooted ops.
        persistent: see `Collective`.
        overlap: see `Collective`.

    Raises:
        Unable: if the size, the root or the groups do not fit this job.
        UsageError: if the root or the groups fit no job.
    """
    groups_GN = topology.groups(group)
    members = groups_GN.shape[1]
    if root is not None and root < 0:  # in no job at all
        raise UsageError(f"root must be a position in its group, from 0 on, got {root}")
    if root is not None and root >= members:
        raise Unable(f"root {root} is not in a group of {members}")
    sharded = op in READS_ALL_SHARDS | WRITES_ALL_SHARDS
    count = shard_count(case, members if sharded else 1)
    in_place = op in IN_PLACE
    phase = Collective(
        label=op.value,
        op=op,
        groups=groups_GN,
        count=count,
        root=root or 0,
        redop=redop or Redop.SUM,
        read="data" if in_place else "send",
        write="data" if in_place else "recv",
        persistent=persistent,
        overlap=overlap,
    )
    itemsize = case.element.itemsize
    buffers = {phase.read: phase.read_count * itemsize}
    buffers[phase.write] = max(buffers.get(phase.write, 0), phase.write_count * itemsize)
    return Schedule(
        world_size=topology.world_size,
        dtype=case.element,
        buffers=buffers,
        inputs=(phase.read,),
        phases=(phase,),
        op=op.value,
        size_bytes=count * itemsize * (members if sharded else 1),
        count=count,
        groups=groups_GN,
        redop=redop,
        root=root,
    )
