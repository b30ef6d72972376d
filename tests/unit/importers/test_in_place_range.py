"""How long data that are reduced in place stay in the range of their type."""

from functools import reduce
from itertools import product

import numpy as np
import pytest

from ncclbench.schedule import (
    DTYPES,
    Case,
    Collective,
    Dtype,
    Op,
    Redop,
    Schedule,
)
from ncclbench.schedule.input_values import Fill
from ncclbench.schedule.oracle import repeats_before_overflow
from ncclbench.schedule.pattern import build_schedule
from ncclbench.topology import Topology
from tests.helpers.simulated import LIKE_INT32, NUMPY_FOLDS, Array, World, simulate, two_buffers


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


# An average of 72 is refused for e4m3: see test_fill.
MADE = [
    pytest.param(dtype, redop, groups, id=f"{dtype}-{redop}-{name}")
    for dtype, redop, (name, groups) in product(DTYPES, Redop, GROUPINGS.items())
    if (dtype, redop, name) != ("float8_e4m3fn", Redop.AVG, "72")
    and (dtype not in LIKE_INT32 or name in ("2", "node and rail of 2x2"))
]


@pytest.mark.parametrize(("dtype", "redop", "groups"), MADE)
def test_in_place_data_stay_in_range_for_the_given_repeats(dtype: str, redop: Redop, groups: tuple[Array, ...]) -> None:
    schedule = in_place(dtype, redop, *groups)
    repeats = min(repeats_before_overflow(schedule), 12)
    assert repeats >= 1
    assert runs_in_range(schedule, repeats) == repeats


@pytest.mark.parametrize("members", [2, 8, 72])
@pytest.mark.parametrize("redop", [Redop.SUM, Redop.PROD])
@pytest.mark.parametrize("dtype", DTYPES)
def test_limit_is_within_a_factor_of_two(dtype: str, redop: Redop, members: int) -> None:
    """So that refilling is rare: at least half of what the values themselves would allow."""
    schedule = in_place(dtype, redop, np.arange(members)[None])
    repeats = repeats_before_overflow(schedule)
    assert runs_in_range(schedule, 2 * repeats + 3) <= 2 * repeats + 2


def test_float32_sum_over_8_ranks_runs_37_times() -> None:
    """2^16 and 37 doublings of 3 bits make 2^127."""
    assert repeats_before_overflow(in_place("float32", Redop.SUM, np.arange(8)[None])) == 37


@pytest.mark.parametrize("pattern", ["all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv"])
def test_schedules_with_separate_input_are_never_refilled(pattern: str) -> None:
    schedule = build_schedule(Case(pattern=pattern, nbytes=1024), Topology.single_node(4))
    assert repeats_before_overflow(schedule) >= 1 << 20


@pytest.mark.parametrize("redop", [Redop.MIN, Redop.MAX, Redop.AVG])
def test_reductions_without_growth_are_never_refilled(redop: Redop) -> None:
    assert repeats_before_overflow(in_place("float16", redop, np.arange(8)[None])) >= 1 << 20
