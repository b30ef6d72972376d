"""A slow simulation of the phases, one member and one row at a time, and schedules to try it on."""

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ncclbench.schedule import (
    DTYPES,
    AllToAllV,
    Collective,
    Exchange,
    Kernel,
    Local,
    Op,
    Phase,
    Redop,
    Schedule,
)
from ncclbench.schedule.input_values import Fill
from ncclbench.schedule.oracle import Oracle
from ncclbench.schedule.phases import SimplePhase, flatten

Array: TypeAlias = NDArray[Any]
# Contents of every rank's buffers; elements along the last axis.
World: TypeAlias = dict[tuple[int, str], Array]
Fold: TypeAlias = Callable[[Redop, list[Array]], Array]
# These behave as int32 at every world size, so a few world sizes suffice.
LIKE_INT32 = ("int64", "uint64", "uint32")


def worlds_of(dtype: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of world in which a type is tried: all, or two of a type that is like another."""
    return tuple(size for size in sizes if size in (2, 5)) if dtype in LIKE_INT32 else sizes


# Longer than the fill's usual period, so that all of it is looked at.
COUNT = 8194


# --- a simulation of the phases, one member and one row at a time --------------------------------------------------


def simulate(schedule: Schedule, world: World, fold: Fold, unspecified: Callable[[Array], Array]) -> None:
    """Run the phases on `world`, in place."""
    for phase in flatten(schedule.phases):
        before = {place: array.copy() for place, array in world.items()}
        for rank, start, values in written(phase, schedule, before, fold, unspecified):
            world[rank, phase.write][..., start : start + values.shape[-1]] = values


def written(
    phase: SimplePhase, schedule: Schedule, before: World, fold: Fold, unspecified: Callable[[Array], Array]
) -> Iterator[tuple[int, int, Array]]:
    """Rank, first element and values of everything that a phase writes."""
    itemsize = schedule.dtype.itemsize
    if isinstance(phase, Exchange):
        flows = (phase.src, phase.dst, phase.nbytes // itemsize, phase.send_offset, phase.recv_offset)
        for src, dst, size, send, recv in zip(*(array.tolist() for array in flows), strict=True):
            first = send // itemsize
            yield dst, recv // itemsize, before[src, phase.read][..., first : first + size]
    elif isinstance(phase, AllToAllV):
        yield from uneven_writes(phase, before, phase.row_bytes // itemsize)
    elif isinstance(phase, Collective):
        for ranks in phase.groups.tolist():
            yield from collective_writes(phase, ranks, [before[r, phase.read] for r in ranks], fold, unspecified)
    else:
        assert isinstance(phase, Local)
        for rank in range(schedule.world_size):
            yield rank, 0, local_values(phase, rank, before[rank, phase.read], fold)


def uneven_writes(phase: AllToAllV, before: World, row: int) -> Iterator[tuple[int, int, Array]]:
    for g, ranks in enumerate(phase.groups.tolist()):
        taken = dict.fromkeys(ranks, 0)  # rows of each sender that have left it
        filled = dict.fromkeys(ranks, 0)
        mail: list[tuple[int, int, Array]] = []
        for i, src in enumerate(ranks):
            for j, dst in enumerate(ranks):
                for _ in range(int(phase.rows[g, i, j])):
                    first = taken[src] * row
                    mail.append((i, dst, before[src, phase.read][..., first : first + row]))
                    taken[src] += 1
        for _, dst, values in sorted(mail, key=lambda letter: letter[0]):
            yield dst, filled[dst] * row, values
            filled[dst] += 1


def collective_writes(
    phase: Collective, ranks: list[int], sent: list[Array], fold: Fold, unspecified: Callable[[Array], Array]
) -> Iterator[tuple[int, int, Array]]:
    def shard(member: int, k: int) -> Array:
        return sent[member][..., k * phase.count : (k + 1) * phase.count]

    members, root = range(len(ranks)), phase.root
    for me, rank in enumerate(ranks):
        match phase.op:
            case Op.ALL_REDUCE:
                yield rank, 0, fold(phase.redop, [shard(j, 0) for j in members])
            case Op.REDUCE:
                total = fold(phase.redop, [shard(j, 0) for j in members])
                yield rank, 0, total if me == root else unspecified(total)
            case Op.REDUCE_SCATTER:
                yield rank, 0, fold(phase.redop, [shard(j, me) for j in members])
            case Op.BROADCAST | Op.SCATTER:
                yield rank, 0, shard(root, me if phase.op is Op.SCATTER else 0)
            case Op.ALL_GATHER | Op.ALL_TO_ALL | Op.GATHER:
                mine = me if phase.op is Op.ALL_TO_ALL else 0
                receivers = [root] if phase.op is Op.GATHER else members
                yield from ((rank, j * phase.count, shard(j, mine)) for j in members if me in receivers)


def local_values(phase: Local, rank: int, read: Array, fold: Fold) -> Array:
    pieces = [read[..., k * phase.count : (k + 1) * phase.count] for k in range(read.shape[-1] // phase.count)]
    if phase.kernel is Kernel.COPY:
        return pieces[0]
    if phase.kernel is Kernel.REDUCE_CHUNKS:
        return fold(Redop.SUM, pieces[: phase.chunks])
    return np.concatenate([pieces[row] for row in phase.rows[rank].tolist()], axis=-1)


# Arrays of labels have two rows: the label, and whether anything may stand here.
NUMPY_FOLDS: dict[Redop, Callable[[Array, Array], Array]] = {
    Redop.SUM: np.add,
    Redop.AVG: np.add,
    Redop.PROD: np.multiply,
    Redop.MIN: np.minimum,
    Redop.MAX: np.maximum,
}


def two_buffers(world_size: int, *phases: Phase, dtype: str = "float32", count: int = 24, **more: Any) -> Schedule:
    itemsize = DTYPES[dtype].itemsize
    return Schedule(
        **{
            "world_size": world_size,
            "dtype": DTYPES[dtype],
            "buffers": {"send": count * itemsize, "recv": count * itemsize},
            "inputs": ("send",),
            "phases": phases,
            "op": None,
            "size_bytes": count * itemsize,
            "count": count,
            **more,
        }
    )


# --- the fill: no reduction ever rounds ------------------------------------------------------------------------------


def all_reduce(world_size: int, dtype: str, redop: Redop, count: int = COUNT) -> Schedule:
    phase = Collective("sum", Op.ALL_REDUCE, np.arange(world_size)[None], count, redop=redop, read="d", write="d")
    nbytes = count * DTYPES[dtype].itemsize
    return two_buffers(world_size, phase, dtype=dtype, count=count, buffers={"d": nbytes}, inputs=("d",))


def inputs_of(schedule: Schedule, salt: int = 1) -> list[Array]:
    """What each rank holds at first, one period of it."""
    fill = Fill.of(schedule, salt)
    return [fill.values(rank) for rank in range(schedule.world_size)]


def fold_typed(redop: Redop, arrays: list[Array]) -> Array:
    """Fold in the type itself, one rank after the other."""
    return reduce(NUMPY_FOLDS[redop], arrays)


def average(total: Array, members: int) -> Array:
    if total.dtype.kind in "iu":
        return (total.astype(np.int64) // members).astype(total.dtype)
    return np.asarray(total / np.array(members, total.dtype))


def wrong_in(schedule: Schedule, contents: Array, salt: int = 1) -> int:
    return Oracle(schedule, 0, salt).count_wrong({"d": np.resize(contents, schedule.count)})
