"""Bus-bandwidth factors against those of nccl-tests, written as fractions."""

from fractions import Fraction

import pytest

from ncclbench.config.plugins import names
from ncclbench.schedule import Case, Op, Unable
from ncclbench.schedule.pattern import build_schedule, load_pattern
from ncclbench.schedule.rates import alg_gb_per_s, bus_factor, bus_gb_per_s
from ncclbench.topology import Topology

GROUP_SIZES = range(2, 73)
# op -> numerator over n, given n.
TWICE_ALL_BUT_ONE, ALL_BUT_ONE, ALL = "2(n-1)/n", "(n-1)/n", "1"
DESIGN = {
    "all_reduce": TWICE_ALL_BUT_ONE,
    "all_gather": ALL_BUT_ONE,
    "reduce_scatter": ALL_BUT_ONE,
    "all_to_all": ALL_BUT_ONE,
    "gather": ALL_BUT_ONE,
    "scatter": ALL_BUT_ONE,
    "broadcast": ALL,
    "reduce": ALL,
    "send_recv": ALL,
}

PATTERNS = [name for name in names("patterns") if not load_pattern(name).rotates]


def factor(formula: str, n: int) -> Fraction:
    moved = {TWICE_ALL_BUT_ONE: 2 * n - 2, ALL_BUT_ONE: n - 1, ALL: n}[formula]
    return Fraction(moved, n)


@pytest.mark.parametrize("op", DESIGN)
def test_bus_factor_matches_nccl_tests(op: str) -> None:
    for n in GROUP_SIZES:
        assert bus_factor(op, n) == pytest.approx(float(factor(DESIGN[op], n)), rel=1e-15), n


@pytest.mark.parametrize("op", DESIGN)
def test_bus_bandwidth_is_size_over_time_times_factor(op: str) -> None:
    assert bus_gb_per_s(op, 4, 3_000_000_000, 1.5) == pytest.approx(2.0 * float(factor(DESIGN[op], 4)))


def test_gigabyte_is_1e9_bytes() -> None:
    assert alg_gb_per_s(2_500_000_000, 0.5) == pytest.approx(5.0)


@pytest.mark.parametrize("op", ["", "allreduce", "ALL_REDUCE", "all_reduce ", "barrier", "moe_dispatch"])
def test_unknown_op_names_the_known_ones(op: str) -> None:
    with pytest.raises(ValueError, match=r"all_reduce, .*send_recv"):
        bus_factor(op, 4)
    with pytest.raises(ValueError, match="no bus bandwidth"):
        bus_gb_per_s(op, 4, 1024, 1e-3)


@pytest.mark.parametrize("n", [0, -1])
def test_empty_group_has_no_factor(n: int) -> None:
    with pytest.raises(ValueError, match="at least one rank"):
        bus_factor("all_reduce", n)


@pytest.mark.parametrize("op", DESIGN)
def test_bus_factor_of_a_single_rank(op: str) -> None:
    assert bus_factor(op, 1) == factor(DESIGN[op], 1)


@pytest.mark.parametrize("op", [op for op in Op if op is not Op.BARRIER])
def test_every_op_that_moves_data_has_a_factor(op: Op) -> None:
    assert op.value in DESIGN
    assert bus_factor(op.value, 8) > 0


@pytest.mark.parametrize("pattern", [name for name in names("patterns") if not load_pattern(name).rotates])
def test_every_pattern_has_an_op_with_factor_or_none(pattern: str) -> None:
    try:
        schedule = build_schedule(Case(pattern=pattern, nbytes=1 << 16), Topology.single_node(8))
    except Unable as unable:
        pytest.skip(str(unable))
    assert schedule.op is None or bus_factor(schedule.op, 8) > 0
