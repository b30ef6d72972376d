"""The oracle: tolerances of expected contents, and counts of wrong elements."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncclbench.buffers.arrays import allocate
from ncclbench.errors import Unable
from ncclbench.schedule import (
    DTYPES,
    Collective,
    Op,
    Redop,
    Schedule,
)
from ncclbench.schedule.oracle import CANARY_BYTE, Oracle, count_overwritten, count_unequal, refuse_unverifiable
from ncclbench.schedule.symbolic_trace import NoInput
from tests.helpers.simulated import (
    COUNT,
    Array,
    all_reduce,
    average,
    fold_typed,
    inputs_of,
    simulate,
    two_buffers,
    wrong_in,
)

# Tolerance.


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 72])
@pytest.mark.parametrize("redop", Redop)
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_inexact_float_averages_have_a_tolerance(dtype: str, redop: Redop, world_size: int) -> None:
    oracle = Oracle(all_reduce(world_size, dtype, redop), 0, 0)
    if (dtype, redop, world_size) == ("float8_e4m3fn", Redop.AVG, 72):
        with pytest.raises(Unable, match="over 72 ranks"):
            refuse_unverifiable([oracle.schedule])
        return
    rounds = redop is Redop.AVG and DTYPES[dtype].is_float and world_size not in (1, 2, 4, 8, 16)
    assert (oracle.tolerance > 0) == rounds
    if rounds:
        assert oracle.tolerance_reason == f"an average over {world_size} ranks, not a power of two, rounds in {dtype}"
    else:
        assert oracle.tolerance_reason is None


def test_tolerance_reason_names_the_rounding_group() -> None:
    phases = [
        Collective("of_3", Op.ALL_REDUCE, np.array([[0, 1, 2]]), 8, redop=Redop.AVG),
        Collective("of_4", Op.ALL_REDUCE, np.array([[0, 1, 2, 3]]), 8, redop=Redop.AVG),
    ]
    why = Oracle(two_buffers(4, *phases), 0, 0).tolerance_reason
    assert why is not None
    assert "average over 3 ranks" in why


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_moved_data_have_no_tolerance_beside_an_average(dtype: str) -> None:
    """The input of a reduce_scatter must not change by one bit, though its output may."""
    phase = Collective("rs", Op.REDUCE_SCATTER, np.array([[0, 1, 2]]), 8, redop=Redop.AVG)
    schedule = two_buffers(3, phase, dtype=dtype)
    oracle = Oracle(schedule, 0, 1)
    buffers = correct_buffers(schedule, 1)[0]
    assert oracle.count_wrong(buffers) == 0
    largest = int(np.argmax(buffers["send"].astype(np.float64)))
    buffers["send"].view(schedule.dtype.bits)[largest] ^= 1
    assert oracle.count_wrong(buffers) == 1


def test_nan_is_never_within_tolerance() -> None:
    schedule = all_reduce(3, "float32", Redop.AVG, count=16)
    assert wrong_in(schedule, np.full(16, np.nan, np.float32)) == 16


def test_sum_of_averages_is_within_tolerance() -> None:
    """Sums round too, once an average is not a whole number."""
    phases = [
        Collective("avg", Op.ALL_REDUCE, np.arange(24).reshape(8, 3), 1000, redop=Redop.AVG),
        Collective("sum", Op.ALL_REDUCE, np.arange(24).reshape(8, 3).T, 1000, read="recv", write="recv"),
    ]
    schedule = two_buffers(24, *phases, dtype="bfloat16", count=1000)
    oracle = Oracle(schedule, 0, 1)
    assert oracle.count_wrong(correct_buffers(schedule, 1)[0]) == 0


# Counts of wrong elements.


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
            if segment.term is not NoInput.UNSPECIFIED
            for k in range(segment.start, segment.stop)
        ]
        for name, k in data.draw(st.lists(st.sampled_from(places), unique=True)) if places else []:
            before = oracle.count_wrong(buffers)
            # The highest bit except the sign: the change exceeds any tolerance.
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


def test_reduce_results_off_root_are_ignored() -> None:
    phase = Collective("r", Op.REDUCE, np.array([[0, 1, 2]]), 8, root=1)
    schedule = two_buffers(3, phase)
    buffers = correct_buffers(schedule, 0)
    for rank, counted in ((0, 0), (1, 8), (2, 0)):
        buffers[rank]["recv"][:8] += 1
        assert Oracle(schedule, rank, 0).count_wrong(buffers[rank]) == counted


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_canary_byte_is_checked(dtype: str) -> None:
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


def test_canary_is_no_input_value() -> None:
    for name, dtype in DTYPES.items():
        canary = np.full(dtype.itemsize, CANARY_BYTE, np.uint8).view(dtype.numpy)
        values = np.concatenate([inputs_of(all_reduce(8, name, Redop.SUM), salt)[3] for salt in range(3)])
        assert name == "uint8" or canary[0] not in values.astype(dtype.numpy)


@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
def test_comparison_memory_is_constant(tolerance: float) -> None:
    """The memory check of a case counts its buffers only."""
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
def test_every_element_is_compared_at_block_edges(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncclbench.schedule.oracle.BLOCK", 2 * 997)
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
