"""What ranks must hold: against a slow simulation of the phases, and against the arithmetic of the types themselves."""

import tracemalloc
from collections.abc import Callable, Iterator
from functools import reduce
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ncclbench.buffers import allocate
from ncclbench.measure.case import build_schedule
from ncclbench.schedule import (
    DTYPES,
    AllToAllV,
    Case,
    Collective,
    Dtype,
    Exchange,
    Kernel,
    Local,
    Op,
    Phase,
    Redop,
    Schedule,
)
from ncclbench.schedule.dtypes import finish_average
from ncclbench.schedule.fill import Fill, Spread
from ncclbench.schedule.oracle import CANARY_BYTE, Oracle, count_overwritten, count_unequal, repeats_before_overflow
from ncclbench.schedule.phases import SimplePhase, flatten
from ncclbench.schedule.trace import Given, Mark, Term, trace
from ncclbench.topology import Topology

Array: TypeAlias = NDArray[Any]
# Contents of every rank's buffers; elements along the last axis.
World: TypeAlias = dict[tuple[int, str], Array]
Fold: TypeAlias = Callable[[Redop, list[Array]], Array]

WORLD_SIZES = (1, 2, 3, 5, 8, 72, 300)
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


# --- the trace, on labels instead of data ---------------------------------------------------------------------------

UNWRITTEN = 0xC0FFEE  # the label of a canary
# Arrays of labels have two rows: the label, and whether anything may stand here.
NUMPY_FOLDS: dict[Redop, Callable[[Array, Array], Array]] = {
    Redop.SUM: np.add,
    Redop.AVG: np.add,
    Redop.PROD: np.multiply,
    Redop.MIN: np.minimum,
    Redop.MAX: np.maximum,
}


def fold_labels(redop: Redop, arrays: list[Array]) -> Array:
    """A number that tells which labels met in which reduction, whatever their order; it wraps around."""
    labels = reduce(NUMPY_FOLDS[redop], [array[0] for array in arrays])
    if redop is Redop.AVG:
        labels = labels ^ np.uint64(0xA5A5 * len(arrays))
    return np.stack([labels, np.max([array[1] for array in arrays], axis=0)])


def any_label(labels: Array) -> Array:
    return np.stack([labels[0], np.ones_like(labels[1])])


def label_world(schedule: Schedule) -> World:
    """A label of its own for every input element, and one for all that nobody filled."""
    random = np.random.default_rng(0)
    world: World = {}
    for rank, (name, nbytes) in product(range(schedule.world_size), schedule.buffers.items()):
        length = nbytes // schedule.dtype.itemsize
        labels = random.integers(1 << 63, size=length, dtype=np.uint64)
        if name not in schedule.inputs:
            labels[:] = UNWRITTEN
        world[rank, name] = np.stack([labels, np.zeros_like(labels)])
    return world


def labels_of(term: Term, length: int, start: World) -> Array:
    if term is Mark.CANARY:
        return np.stack([np.full(length, UNWRITTEN, np.uint64), np.zeros(length, np.uint64)])
    if term is Mark.UNSPECIFIED:
        return any_label(np.zeros((2, length), np.uint64))
    if isinstance(term, Given):
        return start[term.rank, term.buffer][:, term.start : term.start + length]
    assert not isinstance(term, Mark)
    return fold_labels(term.redop, [labels_of(inner, length, start) for inner in term.terms])


def check_trace(schedule: Schedule) -> None:
    start = label_world(schedule)
    world = {place: labels.copy() for place, labels in start.items()}
    simulate(schedule, world, fold_labels, any_label)
    for (rank, name), simulated in world.items():
        segments = trace(schedule, rank, name)
        edges = [0, *(segment.stop for segment in segments)]
        assert [segment.start for segment in segments] == edges[:-1], "segments leave a gap or overlap"
        assert edges[-1] == simulated.shape[1]
        traced = np.concatenate([labels_of(seg.term, seg.stop - seg.start, start) for seg in segments], axis=1)
        assert traced[1].tolist() == simulated[1].tolist()
        known = simulated[1] == 0
        assert traced[0][known].tolist() == simulated[0][known].tolist(), (rank, name)


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


@pytest.mark.parametrize("write", ["recv", "send"], ids=["out of place", "in place"])
@pytest.mark.parametrize(
    ("world_size", "groups", "root"),
    [(1, [[0]], 0), (4, [[0, 1, 2, 3]], 0), (5, [[3, 0, 4]], 2), (6, [[5, 0, 2], [1, 4, 3]], 1)],
    ids=["alone", "all in order", "some, shuffled", "two groups, shuffled"],
)
@pytest.mark.parametrize("op", Op)
def test_every_op_is_traced_as_simulated(
    op: Op, world_size: int, groups: list[list[int]], root: int, write: str
) -> None:
    phase = Collective("one", op, np.array(groups), 5, root, write=write)
    check_trace(two_buffers(world_size, phase))


@given(data=st.data())
def test_random_schedules_are_traced_as_simulated(
    any_schedule: st.SearchStrategy[Schedule], data: st.DataObject
) -> None:
    check_trace(data.draw(any_schedule))


def test_the_simulation_sees_a_trace_that_takes_shards_in_another_order() -> None:
    phase = Collective("one", Op.ALL_GATHER, np.array([[0, 1, 2]]), 4)
    turned = Collective("one", Op.ALL_GATHER, np.array([[1, 0, 2]]), 4)
    start = label_world(two_buffers(3, phase))
    world = {place: labels.copy() for place, labels in start.items()}
    simulate(two_buffers(3, phase), world, fold_labels, any_label)
    segment = trace(two_buffers(3, turned), 0, "recv")[0]
    assert labels_of(segment.term, 4, start).tolist() != world[0, "recv"][:, :4].tolist()


# --- the fill: no reduction ever rounds ------------------------------------------------------------------------------


def all_reduce(world_size: int, dtype: str, redop: Redop, count: int = COUNT) -> Schedule:
    phase = Collective("sum", Op.ALL_REDUCE, np.arange(world_size)[None], count, redop=redop, read="d", write="d")
    nbytes = count * DTYPES[dtype].itemsize
    return two_buffers(world_size, phase, dtype=dtype, count=count, buffers={"d": nbytes}, inputs=("d",))


def inputs_of(schedule: Schedule, salt: int = 1) -> list[Array]:
    """What each rank holds at first, one period of it."""
    fill = Fill.of(schedule, salt)
    return [fill.values(rank) for rank in range(schedule.world_size)]


def exact_results(redop: Redop, values_R: list[Array]) -> list[Any]:
    """The reduction in Python's integers, which never round; of an average, its sum."""
    if redop is Redop.PROD:
        exponents = np.log2(np.stack(values_R)).astype(np.int64)
        assert np.array_equal(2**exponents, np.stack(values_R))  # ones and twos only
        return [2 ** int(n) for n in exponents.sum(axis=0)]
    whole = np.stack(values_R).astype(np.int64)
    column = {Redop.MIN: whole.min(axis=0), Redop.MAX: whole.max(axis=0)}.get(redop, whole.sum(axis=0))
    results: list[Any] = column.tolist()
    return results


def fold_typed(redop: Redop, arrays: list[Array]) -> Array:
    """Fold in the type itself, one rank after the other."""
    return reduce(NUMPY_FOLDS[redop], arrays)


def average(total: Array, members: int) -> Array:
    if total.dtype.kind in "iu":
        return (total.astype(np.int64) // members).astype(total.dtype)
    return np.asarray(total / np.array(members, total.dtype))


def orders(items: list[Array]) -> Iterator[list[Array]]:
    """Forward, reverse and random."""
    yield items
    yield items[::-1]
    yield [items[k] for k in np.random.default_rng(0).permutation(len(items))]


def wrong_in(schedule: Schedule, contents: Array, salt: int = 1) -> int:
    return Oracle(schedule, 0, salt).count_wrong({"d": np.resize(contents, schedule.count)})


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("redop", [Redop.SUM, Redop.PROD, Redop.MIN, Redop.MAX])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_reduction_is_exact_in_any_order_and_is_what_the_oracle_expects(
    dtype: str, redop: Redop, world_size: int
) -> None:
    schedule, kind = all_reduce(world_size, dtype, redop), DTYPES[dtype]
    values_R = inputs_of(schedule)
    exact = exact_results(redop, values_R)
    assert max(exact) <= (2**kind.doublings if redop is Redop.PROD else kind.exact)
    for typed in orders([values.astype(kind.numpy) for values in values_R]):
        total = fold_typed(redop, typed)
        assert [int(value) for value in total.tolist()] == exact
    assert wrong_in(schedule, total) == 0
    assert Oracle(schedule, 0, 1).tolerance == 0


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_average_is_what_the_oracle_expects_however_a_library_computes_it(dtype: str, world_size: int) -> None:
    schedule, kind = all_reduce(world_size, dtype, Redop.AVG), DTYPES[dtype]
    values_R = inputs_of(schedule)
    assert max(exact_results(Redop.AVG, values_R)) <= kind.exact
    share = np.array(1 / world_size, kind.numpy)
    for typed in orders([values.astype(kind.numpy) for values in values_R]):
        assert wrong_in(schedule, average(fold_typed(Redop.SUM, typed), world_size)) == 0
        if kind.is_float:
            assert wrong_in(schedule, fold_typed(Redop.SUM, [values * share for values in typed])) == 0


LOSSES = [
    (dtype, redop, world_size)
    for dtype, redop, world_size in product(DTYPES, Redop, WORLD_SIZES)
    # The floor of an average of uint8s over more than 255 ranks, none of which overflows, is always 0.
    if world_size > 1 and (dtype, redop, world_size) != ("uint8", Redop.AVG, 300)
]


@pytest.mark.parametrize(("dtype", "redop", "world_size"), LOSSES)
def test_a_contribution_that_is_lost_or_counted_twice_is_seen(dtype: str, redop: Redop, world_size: int) -> None:
    """Also where the average has a tolerance: it must not swallow a rank."""
    schedule, kind = all_reduce(world_size, dtype, redop), DTYPES[dtype]
    typed = [values.astype(kind.numpy) for values in inputs_of(schedule)]
    repeated = [typed[0], *typed[2:], typed[0]]  # rank 0 in the place of rank 1
    for contributions in (typed[1:], repeated):
        total = fold_typed(redop, contributions)
        result = average(total, world_size) if redop is Redop.AVG else total
        assert wrong_in(schedule, result) > 0


@pytest.mark.parametrize("redop", Redop)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fill_of_8192_ranks_is_exact_too(dtype: str, redop: Redop) -> None:
    schedule, kind = all_reduce(8192, dtype, redop), DTYPES[dtype]
    fill = Fill.of(schedule, 0)
    some = np.stack([fill.values(rank) for rank in (0, 1, 4095, 8191)])
    assert np.array_equal(some, some.astype(kind.numpy).astype(np.float64))
    assert some.max() <= fill.limit
    if fill.spread is Spread.OWNED:
        assert np.count_nonzero(some != fill.neutral, axis=0).max() <= 1
    elif fill.spread is Spread.ADDED:
        assert 8192 * fill.limit <= kind.exact
    else:
        assert redop in (Redop.MIN, Redop.MAX)


@pytest.mark.parametrize(
    ("dtype", "redop"),
    [("bfloat16", Redop.SUM), ("bfloat16", Redop.AVG), ("float16", Redop.SUM), ("uint8", Redop.SUM)],
)
def test_a_value_that_meets_itself_stays_exact(dtype: str, redop: Redop) -> None:
    """The same groups twice: what 64 ranks summed is summed again over the same 64."""
    groups = np.arange(128).reshape(-1, 64)
    twice = [Collective(f"sum_{k}", Op.ALL_REDUCE, groups, COUNT, redop=redop, read="d", write="d") for k in range(2)]
    nbytes = COUNT * DTYPES[dtype].itemsize
    schedule = two_buffers(128, *twice, dtype=dtype, count=COUNT, buffers={"d": nbytes}, inputs=("d",))
    total = np.sum(inputs_of(schedule)[:64], axis=0)
    assert 64 * total.max() <= DTYPES[dtype].exact


def test_rows_of_an_uneven_all_to_all_differ_however_long_they_are() -> None:
    """Rows as long as the usual period would all be alike, and a misrouted one would pass."""
    row = 8191
    rows = np.array([[[1, 1], [1, 1]]])
    phase = AllToAllV("v", np.array([[0, 1]]), rows, row * 4)
    schedule = two_buffers(2, phase, count=2 * row)
    buffers = allocate(schedule, "cpu")
    Oracle(schedule, 0, 1).prepare(buffers)
    assert not np.array_equal(buffers["send"][:row], buffers["send"][row:])


def test_blocks_of_an_exchange_differ_however_long_they_are() -> None:
    block = 8191
    offsets = np.array([0, 4 * block])
    phase = Exchange("x", np.array([0, 0]), np.array([0, 1]), np.array([4 * block]), send_offset=offsets)
    schedule = two_buffers(2, phase, count=2 * block)
    buffers = allocate(schedule, "cpu")
    Oracle(schedule, 0, 1).prepare(buffers)
    assert not np.array_equal(buffers["send"][:block], buffers["send"][block:])


@pytest.mark.parametrize("count", [8191, 8191 * 8179, 8191 * 3])
def test_shards_of_a_rank_differ_however_long_they_are(count: int) -> None:
    phase = Collective("one", Op.ALL_TO_ALL, np.array([[0, 1]]), count)
    fill = Fill.of(two_buffers(2, phase, count=2 * count), 0)
    values = fill.values(0)
    assert not np.array_equal(values, np.roll(values, -(count % fill.period)))


def test_products_mixed_with_sums_have_no_exact_fill_and_are_refused() -> None:
    phases = [
        Collective(redop.value, Op.ALL_REDUCE, np.array([[0, 1]]), 8, redop=redop) for redop in (Redop.SUM, Redop.PROD)
    ]
    with pytest.raises(ValueError, match="mixes products"):
        Fill.of(two_buffers(2, *phases), 0)


@given(one=st.integers(0, 1000), other=st.integers(0, 1000), rank=st.integers(0, 7))
def test_another_salt_gives_other_values(one: int, other: int, rank: int) -> None:
    schedule = all_reduce(8, "float32", Redop.SUM, count=64)
    same = np.array_equal(Fill.of(schedule, one).values(rank), Fill.of(schedule, other).values(rank))
    assert same == (one == other)


@pytest.mark.parametrize("members", [1, 3, 72, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_average_is_divided_once_and_floors_for_integers(dtype: str, members: int) -> None:
    total = np.array([0, 7, 250], DTYPES[dtype].numpy)
    divided = finish_average(total, members).astype(np.float64)
    if DTYPES[dtype].is_float:
        assert divided == pytest.approx([0, 7 / members, 250 / members], rel=DTYPES[dtype].epsilon)
    else:
        assert divided.tolist() == [0, 7 // members, 250 // members]


# --- tolerance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [*range(1, 18), 72])
@pytest.mark.parametrize("redop", Redop)
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_a_float_average_over_no_power_of_two_has_a_tolerance(dtype: str, redop: Redop, world_size: int) -> None:
    oracle = Oracle(all_reduce(world_size, dtype, redop), 0, 0)
    rounds = redop is Redop.AVG and DTYPES[dtype].is_float and world_size not in (1, 2, 4, 8, 16)
    assert (oracle.tolerance > 0) == rounds
    if rounds:
        assert oracle.why == f"an average over {world_size} ranks, not a power of two, rounds in {dtype}"
    else:
        assert oracle.why is None


def test_the_reason_for_a_tolerance_names_the_group_that_rounds() -> None:
    phases = [
        Collective("of_3", Op.ALL_REDUCE, np.array([[0, 1, 2]]), 8, redop=Redop.AVG),
        Collective("of_4", Op.ALL_REDUCE, np.array([[0, 1, 2, 3]]), 8, redop=Redop.AVG),
    ]
    why = Oracle(two_buffers(4, *phases), 0, 0).why
    assert why is not None
    assert "average over 3 ranks" in why


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_data_that_were_only_moved_have_no_tolerance_beside_an_average(dtype: str) -> None:
    """The input of a reduce_scatter may not change by one bit, though its output may."""
    phase = Collective("rs", Op.REDUCE_SCATTER, np.array([[0, 1, 2]]), 8, redop=Redop.AVG)
    schedule = two_buffers(3, phase, dtype=dtype)
    oracle = Oracle(schedule, 0, 1)
    buffers = correct_buffers(schedule, 1)[0]
    assert oracle.count_wrong(buffers) == 0
    largest = int(np.argmax(buffers["send"].astype(np.float64)))
    buffers["send"].view(schedule.dtype.bits)[largest] ^= 1
    assert oracle.count_wrong(buffers) == 1


def test_not_a_number_is_never_within_a_tolerance() -> None:
    schedule = all_reduce(3, "float32", Redop.AVG, count=16)
    assert wrong_in(schedule, np.full(16, np.nan, np.float32)) == 16


def test_a_sum_of_averages_is_within_its_tolerance() -> None:
    """Sums round too, once an average has left the whole numbers."""
    phases = [
        Collective("avg", Op.ALL_REDUCE, np.arange(24).reshape(8, 3), 1000, redop=Redop.AVG),
        Collective("sum", Op.ALL_REDUCE, np.arange(24).reshape(8, 3).T, 1000, read="recv", write="recv"),
    ]
    schedule = two_buffers(24, *phases, dtype="bfloat16", count=1000)
    oracle = Oracle(schedule, 0, 1)
    assert oracle.count_wrong(correct_buffers(schedule, 1)[0]) == 0


# --- counting what is wrong ------------------------------------------------------------------------------------------


def fold_and_average(redop: Redop, arrays: list[Array]) -> Array:
    total = fold_typed(redop, arrays)
    return average(total, len(arrays)) if redop is Redop.AVG else total


def correct_buffers(schedule: Schedule, salt: int) -> list[dict[str, Array]]:
    """Every rank's buffers, filled by its oracle, after a simulated run."""
    buffers = [dict(allocate(schedule, "cpu")) for _ in range(schedule.world_size)]
    for rank, mine in enumerate(buffers):
        Oracle(schedule, rank, salt).prepare(mine)
    world = {(rank, name): array for rank, mine in enumerate(buffers) for name, array in mine.items()}
    simulate(schedule, world, fold_and_average, np.zeros_like)
    return buffers


@given(data=st.data())
def test_exactly_the_changed_elements_are_counted(
    exact_schedule: st.SearchStrategy[Schedule], data: st.DataObject
) -> None:
    schedule = data.draw(exact_schedule)
    salt = data.draw(st.integers(0, 100))
    for rank, buffers in enumerate(correct_buffers(schedule, salt)):
        oracle = Oracle(schedule, rank, salt)
        assert oracle.count_wrong(buffers) == 0
        places = [
            (name, k)
            for name, segments in oracle.expected.items()
            for segment in segments
            if segment.term is not Mark.UNSPECIFIED
            for k in range(segment.start, segment.stop)
        ]
        for name, k in data.draw(st.lists(st.sampled_from(places), unique=True)) if places else []:
            before = oracle.count_wrong(buffers)
            # The highest bit but the sign: no tolerance is that wide.
            buffers[name].view(schedule.dtype.bits)[k] ^= 1 << (8 * schedule.dtype.itemsize - 2)
            assert oracle.count_wrong(buffers) == before + 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 8190, 8191, COUNT - 1], ids=["first", "end of period", "next period", "last"])
def test_one_bit_of_one_element_is_wrong(dtype: str, place: int) -> None:
    schedule = all_reduce(3, dtype, Redop.SUM)
    buffers = correct_buffers(schedule, 1)[2]
    oracle = Oracle(schedule, 2, 1)
    for bit in range(8 * schedule.dtype.itemsize):
        buffers["d"].view(schedule.dtype.bits)[place] ^= 1 << bit
        assert oracle.count_wrong(buffers) == 1
        buffers["d"].view(schedule.dtype.bits)[place] ^= 1 << bit
    assert oracle.count_wrong(buffers) == 0


def test_what_a_reduce_leaves_on_other_ranks_does_not_count() -> None:
    phase = Collective("r", Op.REDUCE, np.array([[0, 1, 2]]), 8, root=1)
    schedule = two_buffers(3, phase)
    buffers = correct_buffers(schedule, 0)
    for rank, counted in ((0, 0), (1, 8), (2, 0)):
        buffers[rank]["recv"][:8] += 1
        assert Oracle(schedule, rank, 0).count_wrong(buffers[rank]) == counted


@pytest.mark.parametrize("dtype", DTYPES)
def test_canaries_stand_where_nothing_may_be_written_and_each_byte_counts(dtype: str) -> None:
    phase = Collective("g", Op.GATHER, np.array([[0, 1]]), 4)
    schedule = two_buffers(3, phase, dtype=dtype)  # 8 of 24 elements are written, and on rank 0 only
    for rank, unwritten in ((0, 16), (1, 24), (2, 24)):
        oracle = Oracle(schedule, rank, 0)
        buffers = correct_buffers(schedule, 0)[rank]
        canaries = buffers["recv"].view(np.uint8)[-unwritten * schedule.dtype.itemsize :]
        assert set(canaries.tolist()) == {CANARY_BYTE}
        canaries[-1] ^= 1
        assert oracle.count_wrong(buffers) == 1
        canaries[:] = 0
        assert oracle.count_wrong(buffers) == unwritten


def test_a_canary_is_no_value_of_a_fill() -> None:
    for name, dtype in DTYPES.items():
        canary = np.full(dtype.itemsize, CANARY_BYTE, np.uint8).view(dtype.numpy)
        held = np.concatenate([inputs_of(all_reduce(8, name, Redop.SUM), salt)[3] for salt in range(3)])
        assert name == "uint8" or canary[0] not in held.astype(dtype.numpy)


# --- how long in-place data stay in range ----------------------------------------------------------------------------


def in_place(dtype: str, redop: Redop, *groups: Array) -> Schedule:
    """All_reduces over one grouping after the other, all in one buffer."""
    count = 16
    phases = [
        Collective(f"step_{k}", Op.ALL_REDUCE, ranks, count, redop=redop, read="d", write="d")
        for k, ranks in enumerate(groups)
    ]
    nbytes = count * DTYPES[dtype].itemsize
    return two_buffers(groups[0].size, *phases, dtype=dtype, count=count, buffers={"d": nbytes}, inputs=("d",))


def largest_value(dtype: Dtype) -> int:
    if dtype.is_float:
        return 65504 if dtype.name == "float16" else 2**dtype.doublings
    return int(np.iinfo(dtype.numpy).max)


def runs_in_range(schedule: Schedule, at_most: int) -> int:
    """How often the schedule runs on its own results before they leave the type's range, in Python's integers."""
    fill = Fill.of(schedule, 0)
    held: World = {
        (rank, "d"): np.array([int(v) for v in fill.values(rank)[: schedule.count]], dtype=object)
        for rank in range(schedule.world_size)
    }

    def fold_integers(redop: Redop, arrays: list[Array]) -> Array:
        total = reduce(NUMPY_FOLDS[redop], arrays)
        return total // len(arrays) if redop is Redop.AVG else total

    for run in range(at_most):
        simulate(schedule, held, fold_integers, np.zeros_like)
        if max(array.max() for array in held.values()) > largest_value(schedule.dtype):
            return run
    return at_most


def grid(nodes: int, per_node: int) -> tuple[Array, Array]:
    """Groups by node, then by rail."""
    ranks = np.arange(nodes * per_node).reshape(nodes, per_node)
    return ranks, ranks.T


GROUPINGS = {
    "1": (np.array([[0]]),),
    "2": (np.arange(2)[None],),
    "3": (np.arange(3)[None],),
    "8": (np.arange(8)[None],),
    "72": (np.arange(72)[None],),
    "node and rail of 2x2": grid(2, 2),
    "node and rail of 4x2": grid(4, 2),
    "twice the same 4": (np.arange(4)[None], np.arange(4)[None]),
}


@pytest.mark.parametrize("groups", GROUPINGS.values(), ids=GROUPINGS)
@pytest.mark.parametrize("redop", Redop)
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_data_stay_in_range_as_often_as_it_says(dtype: str, redop: Redop, groups: tuple[Array, ...]) -> None:
    schedule = in_place(dtype, redop, *groups)
    repeats = min(repeats_before_overflow(schedule), 12)
    assert repeats >= 1
    assert runs_in_range(schedule, repeats) == repeats


@pytest.mark.parametrize("members", [2, 8, 72])
@pytest.mark.parametrize("redop", [Redop.SUM, Redop.PROD])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_limit_is_near_the_true_one(dtype: str, redop: Redop, members: int) -> None:
    """So that refilling is rare: at least half of what the values themselves would allow."""
    schedule = in_place(dtype, redop, np.arange(members)[None])
    repeats = repeats_before_overflow(schedule)
    assert runs_in_range(schedule, 2 * repeats + 3) <= 2 * repeats + 2


def test_a_sum_over_8_ranks_in_float32_runs_37_times() -> None:
    """2^16 and 37 doublings of 3 bits make 2^127."""
    assert repeats_before_overflow(in_place("float32", Redop.SUM, np.arange(8)[None])) == 37


@pytest.mark.parametrize("pattern", ["all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv"])
def test_schedules_that_do_not_grow_their_own_input_are_never_refilled(pattern: str) -> None:
    schedule = build_schedule(Case(pattern=pattern, nbytes=1024), Topology.single_node(4))
    assert repeats_before_overflow(schedule) >= 1 << 20


@pytest.mark.parametrize("redop", [Redop.MIN, Redop.MAX, Redop.AVG])
def test_reductions_that_do_not_grow_are_never_refilled(redop: Redop) -> None:
    assert repeats_before_overflow(in_place("float16", redop, np.arange(8)[None])) >= 1 << 20


@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
def test_a_comparison_needs_no_memory_that_grows_with_the_buffer(tolerance: float) -> None:
    """What a case too large is refused by counts the buffers alone."""
    dtype = DTYPES["float32"]
    period = np.arange(1, 998, dtype=np.float32).view(np.uint32)
    actual = np.resize(period, 1 << 24)
    tracemalloc.start()
    try:
        assert count_unequal(actual, period, tolerance, dtype) == 0
        assert count_overwritten(actual) == len(actual)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < actual.nbytes


@pytest.mark.parametrize("length", [996, 997, 5 * 997, 7 * 997 + 13])
def test_every_element_is_compared_wherever_the_blocks_end(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncclbench.schedule.oracle._BLOCK", 2 * 997)
    dtype = DTYPES["int32"]
    period = np.arange(997, dtype=np.uint32)
    actual = np.resize(period, length)
    assert count_unequal(actual, period, 0.0, dtype) == 0
    assert count_unequal(actual ^ np.uint32(1 << 31), period, 0.0, dtype) == length
    canary = np.full(length, 0xA5A5A5A5, np.uint32)
    assert count_overwritten(canary) == 0
    for place in {0, 995, length // 2, length - 1}:
        spoilt = canary.copy()
        spoilt[place] ^= 1 << 24
        assert count_overwritten(spoilt) == 1
        wrong = actual.copy()
        wrong[place] ^= 1
        assert count_unequal(wrong, period, 0.0, dtype) == 1
