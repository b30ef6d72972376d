"""Summaries, checked with SciPy and with values from first principles."""

import math
from fractions import Fraction
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from scipy import stats

from ncclbench.analysis.summary import (
    MIN_SAMPLES_P95,
    MIN_SAMPLES_P99,
    median_interval,
    relative_width,
    skew,
    summarise,
)
from tests.helpers.stored import summary

durations = st.floats(1e-9, 1e3)
samples = st.lists(durations, min_size=1, max_size=200)


def scipy_interval(n: int, confidence: float) -> tuple[int, int] | None:
    """SciPy's interval of the median of 0, 1, ..., n - 1: its ends are the order statistics."""
    interval: Any = stats.quantile_test(np.arange(n), p=0.5).confidence_interval(confidence)
    return None if np.isnan([interval.low, interval.high]).any() else (int(interval.low), int(interval.high))


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_median_interval_equals_scipy(confidence: float) -> None:
    for n in range(1, 201):
        assert median_interval(n, confidence) == scipy_interval(n, confidence), n


def test_the_medians_interval_is_the_narrowest_that_covers_95_percent() -> None:
    for n in range(6, 201):
        interval = median_interval(n)
        assert interval is not None, n
        low, high = interval
        assert low + high == n - 1, "not symmetric"
        assert stats.binom.cdf(high, n, 0.5) - stats.binom.cdf(low, n, 0.5) >= 0.95, n
        assert stats.binom.cdf(high - 1, n, 0.5) - stats.binom.cdf(low + 1, n, 0.5) < 0.95, n


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("n", [999, 1000, 1001, 1002, 2500, 9999])
def test_median_interval_of_many_samples_is_exact(n: int, confidence: float) -> None:
    tail = math.floor(Fraction((1.0 - confidence) / 2.0) * 2**n)
    below, ways, cumulated = 0, 1, 1  # `ways` is the binomial coefficient of n and `below`
    while cumulated <= tail:
        below += 1
        ways = ways * (n - below + 1) // below
        cumulated += ways
    assert median_interval(n, confidence) == (below - 1, n - below)


def test_median_interval_of_ten_million_samples_is_fast() -> None:
    low, high = median_interval(10_000_000) or (0, 0)
    assert low + high == 10_000_000 - 1
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(10_000_000) / 2, rel=0.01)


@pytest.mark.parametrize("n", range(6))
def test_fewer_than_6_samples_have_no_interval(n: int) -> None:
    assert median_interval(n) is None


@given(samples)
def test_summary_equals_numpy_and_scipy(seconds: list[float]) -> None:
    summary, us, n = summarise(np.array(seconds)), np.array(seconds) * 1e6, len(seconds)
    expected = {
        "min": us.min(),
        "p50": stats.quantile(us, 0.5),
        "p95": stats.quantile(us, 0.95),
        "p99": stats.quantile(us, 0.99),
        "max": us.max(),
        "mean": stats.tmean(us),
        "cv": stats.variation(us, ddof=1) if n > 1 else None,
    }
    assert summary.n == n
    for name, value in expected.items():
        found = getattr(summary, name)
        assert found is None or found == pytest.approx(value, rel=1e-9, abs=1e-9), name
    assert (summary.cv is None) == (n == 1)


@given(samples)
@example([1.0] * 6)
@example([1e-9] * 5 + [1e3])
def test_summary_values_are_ordered(seconds: list[float]) -> None:
    summary = summarise(np.array(seconds))
    assert summary.min <= summary.p50 <= summary.max
    assert (summary.p50_lo is None) == (summary.p50_hi is None) == (len(seconds) < 6)
    if summary.p50_lo is not None and summary.p50_hi is not None:
        assert summary.min <= summary.p50_lo <= summary.p50 <= summary.p50_hi <= summary.max
    if summary.p95 is not None:
        assert summary.p50 <= summary.p95 <= summary.max
    if summary.p95 is not None and summary.p99 is not None:
        assert summary.p95 <= summary.p99


@given(seconds=samples, seed=st.integers(0, 1000))
def test_summary_ignores_the_order_of_samples(seconds: list[float], seed: int) -> None:
    shuffled = np.random.default_rng(seed).permutation(seconds)
    assert summarise(shuffled) == summarise(np.array(seconds))


def test_summarise_does_not_modify_the_samples() -> None:
    seconds = np.array([3.0, 1.0, 2.0])
    summarise(seconds)
    assert seconds.tolist() == [3.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("percentile", "fewest"), [("p50_lo", 6), ("p50_hi", 6), ("p95", MIN_SAMPLES_P95), ("p99", MIN_SAMPLES_P99)]
)
def test_percentile_needs_its_minimum_of_samples(percentile: str, fewest: int) -> None:
    assert getattr(summarise(np.ones(fewest - 1)), percentile) is None
    assert getattr(summarise(np.ones(fewest)), percentile) == 1e6


def test_p99_needs_100_samples() -> None:
    assert (MIN_SAMPLES_P95, MIN_SAMPLES_P99) == (20, 100)


def test_summary_of_known_numbers() -> None:
    summary = summarise(np.array([k * 1e-6 for k in range(100, 0, -1)]))
    expected = {"n": 100, "min": 1, "p50": 50.5, "p50_lo": 40, "p50_hi": 61, "p95": 95.05, "p99": 99.01, "max": 100}
    deviation = np.sqrt(101 * 100 / 12)  # of 1, 2, ..., 100
    assert msgspec.structs.asdict(summary) == pytest.approx({**expected, "mean": 50.5, "cv": deviation / 50.5})


def test_summary_of_no_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summarise(np.array([]))


@given(seconds=st.lists(durations, min_size=6, max_size=50), factor=st.sampled_from([2.0, 0.5, 1024.0]))
def test_relative_width_has_no_unit(seconds: list[float], factor: float) -> None:
    array = np.array(seconds)
    assert relative_width(summarise(array * factor)) == pytest.approx(relative_width(summarise(array)))


def test_relative_width_is_half_the_interval_over_the_median() -> None:
    assert relative_width(summary(p50=10.0, p50_lo=9.0, p50_hi=12.0)) == pytest.approx(0.15)
    assert relative_width(summary(p50=10.0, p50_lo=10.0, p50_hi=10.0)) == 0


@pytest.mark.parametrize("changes", [{"p50_lo": None, "p50_hi": None}, {"p50": 0.0, "p50_lo": 0.0}])
def test_relative_width_is_infinite_without_interval_or_time(changes: dict[str, Any]) -> None:
    assert relative_width(summary(**changes)) == float("inf")


def test_skew_is_the_spread_over_ranks_per_iteration() -> None:
    seconds_RN = np.array([[5.0, 1.0, 7.0], [2.0, 1.0, 1.0]]) * 1e-6
    found = skew(seconds_RN)
    assert [found.p50, found.max] == pytest.approx([3, 6])


@given(data=st.data(), ranks=st.integers(1, 8), n=st.integers(1, 20))
def test_skew_is_not_negative_and_zero_for_equal_ranks(data: st.DataObject, ranks: int, n: int) -> None:
    one = np.array(data.draw(st.lists(durations, min_size=n, max_size=n)))
    equal = np.tile(one, (ranks, 1))
    assert (skew(equal).p50, skew(equal).max) == (0, 0)
    late = equal.copy()
    late[data.draw(st.integers(0, ranks - 1))] += 1.0
    assume(ranks > 1)
    assert skew(late).max >= skew(late).p50 > 0.99e6
