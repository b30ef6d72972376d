"""Input values: no reduction rounds them, in any order, and every lost value is detected."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncclbench.buffers.arrays import allocate
from ncclbench.errors import Unable
from ncclbench.schedule import (
    DTYPES,
    AllToAllV,
    Collective,
    Exchange,
    Op,
    Redop,
)
from ncclbench.schedule.dtypes import finish_average
from ncclbench.schedule.input_values import Fill, Spread
from ncclbench.schedule.oracle import Oracle, refuse_unverifiable
from tests.helpers.exhaustive import exhaustive_if
from tests.helpers.simulated import (
    COUNT,
    Array,
    all_reduce,
    average,
    fold_typed,
    inputs_of,
    two_buffers,
    worlds_of,
    wrong_in,
)

WORLD_SIZES = (1, 2, 3, 5, 8, 72, 300)
TRIED = [(dtype, world_size) for dtype in DTYPES for world_size in worlds_of(dtype, WORLD_SIZES)]


def is_large(values: tuple[Any, ...]) -> bool:
    """Whether the world size, the last of the values, takes as long as all others together."""
    return int(values[-1]) == max(WORLD_SIZES)


def exact_results(redop: Redop, values_R: list[Array]) -> list[Any]:
    """The reduction in Python's integers, which never round; for an average, its sum."""
    if redop is Redop.PROD:
        exponents = np.log2(np.stack(values_R)).astype(np.int64)
        assert np.array_equal(2**exponents, np.stack(values_R))  # ones and twos only
        return [2 ** int(n) for n in exponents.sum(axis=0)]
    whole = np.stack(values_R).astype(np.int64)
    column = {Redop.MIN: whole.min(axis=0), Redop.MAX: whole.max(axis=0)}.get(redop, whole.sum(axis=0))
    results: list[Any] = column.tolist()
    return results


def orders(items: list[Array]) -> Iterator[list[Array]]:
    """Forward, reverse and random."""
    yield items
    yield items[::-1]
    yield [items[k] for k in np.random.default_rng(0).permutation(len(items))]


@pytest.mark.parametrize(("dtype", "world_size"), exhaustive_if(is_large, TRIED))
@pytest.mark.parametrize("redop", [Redop.SUM, Redop.PROD, Redop.MIN, Redop.MAX])
def test_reduction_is_exact_in_any_order(dtype: str, redop: Redop, world_size: int) -> None:
    schedule, kind = all_reduce(world_size, dtype, redop), DTYPES[dtype]
    values_R = inputs_of(schedule)
    exact = exact_results(redop, values_R)
    assert max(exact) <= (2**kind.doublings if redop is Redop.PROD else kind.exact)
    for typed in orders([values.astype(kind.numpy) for values in values_R]):
        total = fold_typed(redop, typed)
        assert [int(value) for value in total.tolist()] == exact
    assert wrong_in(schedule, total) == 0
    assert Oracle(schedule, 0, 1).tolerance == 0


# No values can check these: the floor of such an average is always 0, or the share of one rank is.
BLIND = [("uint8", 300), ("int8", 300), ("float8_e4m3fn", 72), ("float8_e4m3fn", 300)]
AVERAGES = [pair for pair in TRIED if pair not in BLIND]


@pytest.mark.parametrize(("dtype", "world_size"), BLIND)
def test_uncheckable_average_is_refused(dtype: str, world_size: int) -> None:
    with pytest.raises(Unable, match=f"no values of {dtype} show whether an average over {world_size} ranks is right"):
        refuse_unverifiable([all_reduce(world_size, dtype, Redop.AVG)])
    refuse_unverifiable([all_reduce(world_size, dtype, redop) for redop in Redop if redop is not Redop.AVG])


@pytest.mark.parametrize(("dtype", "world_size"), exhaustive_if(is_large, AVERAGES))
def test_average_matches_either_library_method(dtype: str, world_size: int) -> None:
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
    for (dtype, world_size), redop in product(TRIED, Redop)
    if world_size > 1 and not (redop is Redop.AVG and (dtype, world_size) in BLIND)
]


@pytest.mark.parametrize(("dtype", "redop", "world_size"), exhaustive_if(is_large, LOSSES))
def test_lost_or_repeated_contribution_is_detected(dtype: str, redop: Redop, world_size: int) -> None:
    """This holds for averages with a tolerance too: it must be smaller than one rank's contribution."""
    schedule, kind = all_reduce(world_size, dtype, redop), DTYPES[dtype]
    typed = [values.astype(kind.numpy) for values in inputs_of(schedule)]
    repeated = [typed[0], *typed[2:], typed[0]]  # rank 0 instead of rank 1
    for contributions in (typed[1:], repeated):
        total = fold_typed(redop, contributions)
        result = average(total, world_size) if redop is Redop.AVG else total
        assert wrong_in(schedule, result) > 0


@pytest.mark.parametrize("redop", Redop)
@pytest.mark.parametrize("dtype", DTYPES)
def test_input_values_of_8192_ranks_are_exact(dtype: str, redop: Redop) -> None:
    schedule, kind = all_reduce(8192, dtype, redop), DTYPES[dtype]
    if redop is Redop.AVG and dtype in ("uint8", "int8", "float8_e4m3fn"):
        with pytest.raises(Unable, match="over 8192 ranks"):
            refuse_unverifiable([schedule])
    fill = Fill.of(schedule, 0)  # buffers are filled even if nothing is checked
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
def test_value_that_meets_itself_stays_exact(dtype: str, redop: Redop) -> None:
    """The same groups twice: the sums of 64 ranks are summed again over the same 64."""
    groups = np.arange(128).reshape(-1, 64)
    twice = [Collective(f"sum_{k}", Op.ALL_REDUCE, groups, COUNT, redop=redop, read="d", write="d") for k in range(2)]
    nbytes = COUNT * DTYPES[dtype].itemsize
    schedule = two_buffers(128, *twice, dtype=dtype, count=COUNT, buffers={"d": nbytes}, inputs=("d",))
    total = np.sum(inputs_of(schedule)[:64], axis=0)
    assert 64 * total.max() <= DTYPES[dtype].exact


def test_rows_of_an_uneven_all_to_all_differ() -> None:
    """Rows as long as the usual period would be equal, and a misrouted row would not be detected."""
    row = 8191
    rows = np.array([[[1, 1], [1, 1]]])
    phase = AllToAllV("v", np.array([[0, 1]]), rows, row * 4)
    schedule = two_buffers(2, phase, count=2 * row)
    buffers = allocate(schedule, "cpu")
    Oracle(schedule, 0, 1).prepare(buffers)
    assert not np.array_equal(buffers["send"][:row], buffers["send"][row:])


def test_blocks_of_an_exchange_differ() -> None:
    block = 8191
    offsets = np.array([0, 4 * block])
    phase = Exchange("x", np.array([0, 0]), np.array([0, 1]), np.array([4 * block]), send_offset=offsets)
    schedule = two_buffers(2, phase, count=2 * block)
    buffers = allocate(schedule, "cpu")
    Oracle(schedule, 0, 1).prepare(buffers)
    assert not np.array_equal(buffers["send"][:block], buffers["send"][block:])


@pytest.mark.parametrize("count", [8191, 8191 * 8179, 8191 * 3])
def test_shards_of_one_rank_differ(count: int) -> None:
    phase = Collective("one", Op.ALL_TO_ALL, np.array([[0, 1]]), count)
    fill = Fill.of(two_buffers(2, phase, count=2 * count), 0)
    values = fill.values(0)
    assert not np.array_equal(values, np.roll(values, -(count % fill.period)))


def test_products_mixed_with_sums_are_refused() -> None:
    phases = [
        Collective(redop.value, Op.ALL_REDUCE, np.array([[0, 1]]), 8, redop=redop) for redop in (Redop.SUM, Redop.PROD)
    ]
    with pytest.raises(ValueError, match="mixes products"):
        Fill.of(two_buffers(2, *phases), 0)


@given(one=st.integers(0, 1000), other=st.integers(0, 1000), rank=st.integers(0, 7))
def test_salt_changes_the_values(one: int, other: int, rank: int) -> None:
    schedule = all_reduce(8, "float32", Redop.SUM, count=64)
    same = np.array_equal(Fill.of(schedule, one).values(rank), Fill.of(schedule, other).values(rank))
    assert same == (one == other)


@pytest.mark.parametrize("members", [1, 3, 72, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_average_divides_once_and_floors_integers(dtype: str, members: int) -> None:
    numbers = [0, 7, 120 if dtype == "int8" else 250]
    total = np.array(numbers, DTYPES[dtype].numpy)
    divided = finish_average(total, members).astype(np.float64)
    if DTYPES[dtype].is_float:
        assert divided == pytest.approx([number / members for number in numbers], rel=DTYPES[dtype].epsilon)
    else:
        assert divided.tolist() == [number // members for number in numbers]
