"""Warnings from GPU states: throttling, error counters, and the rate of NVLink checksum errors."""

from typing import Any

import pytest

from ncclbench.store.gpu_warnings import crc_warnings, gpu_warnings
from ncclbench.store.records import GpuState
from tests.helpers.stored import gpu_state

# Counters of two healthy H200 in their first minute, over a case of 6 s.
H200 = {0: 6, 1: 1, 2: 3, 4: 8, 5: 20, 6: 8, 8: 5, 9: 3, 11: 6, 12: 5, 13: 1, 14: 5, 15: 9, 16: 7, 17: 13}


def crc(links: dict[int, int], base: int = 0) -> dict[str, int]:
    return {f"NVLink {link} CRC data errors": base + links.get(link, 0) for link in range(18)}


@pytest.mark.parametrize("seconds", [0.15, 6.0, 60.0, None])
def test_checksum_errors_of_a_healthy_gpu_are_no_warning(seconds: float | None) -> None:
    at = None if seconds is None else 5.0 + seconds
    assert gpu_warnings(gpu_state(crc({}, 340), 5.0), gpu_state(crc(H200, 340), at)) == []


@pytest.mark.parametrize(("total", "warned"), [(5_999, False), (6_000, True)])
def test_100_checksum_errors_per_second_are_a_warning(total: int, warned: bool) -> None:
    now = gpu_state(crc({7: total - 3, 2: 3}), 60.0)
    expected = [f"NVLink CRC data errors rose by {total} (link 7: {total - 3}, link 2: 3)"] if warned else []
    assert gpu_warnings(gpu_state(crc({}), 0.0), now) == expected


def test_limit_below_ten_seconds_is_that_of_ten_seconds() -> None:
    assert gpu_warnings(gpu_state(crc({}), 0.0), gpu_state(crc({3: 999}), 0.2)) == []
    assert gpu_warnings(gpu_state(crc({}), 0.0), gpu_state(crc({3: 1000}), 0.2)) == [
        "NVLink CRC data errors rose by 1000 (link 3: 1000)"
    ]


@pytest.mark.parametrize("kind", ["replay", "recovery"])
def test_single_replay_or_recovery_is_a_warning(kind: str) -> None:
    names = [f"NVLink {link} {kind} errors" for link in (0, 4, 9, 11, 17)]
    then, now = (gpu_state(dict.fromkeys(names, value)) for value in (5, 6))
    (warning,) = gpu_warnings(then, now)
    assert warning == f"NVLink {kind} errors rose by 5 (link 0: 1, link 4: 1, link 9: 1 and 2 more)"


def test_other_counters_and_throttling_are_reported() -> None:
    then = gpu_state({"ECC uncorrected errors": 1, "ECC corrected errors": 7}, throttled=["hardware slowdown"])
    now = gpu_state(
        {"ECC uncorrected errors": 3, "ECC corrected errors": 7, "new": 5}, throttled=["software power cap"]
    )
    assert gpu_warnings(then, now) == ["software power cap", "ECC uncorrected errors rose by 2"]


@pytest.mark.parametrize("odd", [None, "7", [7], 7.5, True, {}, -(10**400)])
def test_invalid_counter_is_ignored_and_hides_no_other(odd: Any) -> None:
    then = GpuState(errors={"ECC uncorrected errors": 1, "NVLink 0 CRC errors": 5, "a": odd})
    now = GpuState(errors={"ECC uncorrected errors": 4, "NVLink 0 CRC errors": odd, "a": 9})
    assert "ECC uncorrected errors rose by 3" in gpu_warnings(then, now)
    assert not [one for one in gpu_warnings(then, now) if "NVLink" in one]


def test_empty_state_has_no_warning() -> None:
    good, empty = gpu_state({"ECC uncorrected errors": 1}, 1.0), GpuState()
    for then, now in ((good, empty), (empty, good), (good, gpu_state({"ECC uncorrected errors": 1}))):
        assert gpu_warnings(then, now) == []
        assert crc_warnings([(then, now)]) == []


def test_link_number_of_thousands_of_digits_is_a_plain_counter() -> None:
    name = f"NVLink {'9' * 5000} CRC errors"
    assert gpu_warnings(gpu_state({name: 0}), gpu_state({name: 2})) == [f"{name} rose by 2"]


def test_checksum_errors_between_cases_are_not_counted() -> None:
    """A reset of counters or clock, or another GPU, is no error."""
    quiet = [
        (gpu_state(crc({1: n}), 10.0 * k), gpu_state(crc({1: n}), 10.0 * k + 5)) for k, n in enumerate((0, 50_000, 3))
    ]
    assert crc_warnings(quiet) == []
    noisy = [
        (gpu_state(crc({1: 900, 2: 1}), 9e5), gpu_state(crc({1: 1700, 2: 2}), 9e5 + 5)),
        (gpu_state(crc({}), 3.0), gpu_state(crc({1: 900}), 8.0)),
    ]
    assert crc_warnings(noisy) == ["NVLink CRC data errors rose by 1701 (link 1: 1700, link 2: 1)"]
