"""What a GPU's states before and after say: throttling, and errors, of which NVLink's checksums count by their rate."""

from typing import Any

import pytest

from ncclbench.store.gpu_warnings import crc_warnings, gpu_warnings
from ncclbench.store.records import GpuState
from tests.helpers.stored import gpu_state

# As two healthy H200 read in their first minute, over a case of six seconds.
H200 = {0: 6, 1: 1, 2: 3, 4: 8, 5: 20, 6: 8, 8: 5, 9: 3, 11: 6, 12: 5, 13: 1, 14: 5, 15: 9, 16: 7, 17: 13}


def crc(links: dict[int, int], base: int = 0) -> dict[str, int]:
    return {f"NVLink {link} CRC data errors": base + links.get(link, 0) for link in range(18)}


@pytest.mark.parametrize("seconds", [0.15, 6.0, 60.0, None])
def test_checksums_as_a_healthy_gpu_has_them_are_no_warning(seconds: float | None) -> None:
    at = None if seconds is None else 5.0 + seconds
    assert gpu_warnings(gpu_state(crc({}, 340), 5.0), gpu_state(crc(H200, 340), at)) == []


@pytest.mark.parametrize(("total", "warned"), [(5_999, False), (6_000, True)])
def test_a_hundred_checksums_a_second_are_too_many(total: int, warned: bool) -> None:
    now = gpu_state(crc({7: total - 3, 2: 3}), 60.0)
    expected = [f"NVLink CRC data errors rose by {total} (link 7: {total - 3}, link 2: 3)"] if warned else []
    assert gpu_warnings(gpu_state(crc({}), 0.0), now) == expected


def test_over_less_than_ten_seconds_a_burst_must_be_as_large_as_in_ten() -> None:
    assert gpu_warnings(gpu_state(crc({}), 0.0), gpu_state(crc({3: 999}), 0.2)) == []
    assert gpu_warnings(gpu_state(crc({}), 0.0), gpu_state(crc({3: 1000}), 0.2)) == [
        "NVLink CRC data errors rose by 1000 (link 3: 1000)"
    ]


@pytest.mark.parametrize("kind", ["replay", "recovery"])
def test_a_single_replay_or_recovery_is_one_too_many(kind: str) -> None:
    names = [f"NVLink {link} {kind} errors" for link in (0, 4, 9, 11, 17)]
    then, now = (gpu_state(dict.fromkeys(names, value)) for value in (5, 6))
    (warning,) = gpu_warnings(then, now)
    assert warning == f"NVLink {kind} errors rose by 5 (link 0: 1, link 4: 1, link 9: 1 and 2 more)"


def test_other_counters_and_throttling_are_told_as_they_are() -> None:
    then = gpu_state({"ECC uncorrected errors": 1, "ECC corrected errors": 7}, throttled=["hardware slowdown"])
    now = gpu_state(
        {"ECC uncorrected errors": 3, "ECC corrected errors": 7, "new": 5}, throttled=["software power cap"]
    )
    assert gpu_warnings(then, now) == ["software power cap", "ECC uncorrected errors rose by 2"]


@pytest.mark.parametrize("odd", [None, "7", [7], 7.5, True, {}, -(10**400)])
def test_a_counter_that_is_no_number_is_not_counted_and_hides_no_other(odd: Any) -> None:
    then = GpuState(errors={"ECC uncorrected errors": 1, "NVLink 0 CRC errors": 5, "a": odd})
    now = GpuState(errors={"ECC uncorrected errors": 4, "NVLink 0 CRC errors": odd, "a": 9})
    assert "ECC uncorrected errors rose by 3" in gpu_warnings(then, now)
    assert not [one for one in gpu_warnings(then, now) if "NVLink" in one]


def test_a_state_that_says_nothing_warns_of_nothing() -> None:
    good, empty = gpu_state({"ECC uncorrected errors": 1}, 1.0), GpuState()
    for then, now in ((good, empty), (empty, good), (good, gpu_state({"ECC uncorrected errors": 1}))):
        assert gpu_warnings(then, now) == []
        assert crc_warnings([(then, now)]) == []


def test_a_link_with_a_number_of_thousands_of_digits_is_a_counter_like_others() -> None:
    name = f"NVLink {'9' * 5000} CRC errors"
    assert gpu_warnings(gpu_state({name: 0}), gpu_state({name: 2})) == [f"{name} rose by 2"]


def test_checksums_are_summed_over_stretches_and_not_over_what_lies_between() -> None:
    """Counters that were reset, a clock that began anew, another GPU: none of these is an error of this one."""
    quiet = [
        (gpu_state(crc({1: n}), 10.0 * k), gpu_state(crc({1: n}), 10.0 * k + 5)) for k, n in enumerate((0, 50_000, 3))
    ]
    assert crc_warnings(quiet) == []
    noisy = [
        (gpu_state(crc({1: 900, 2: 1}), 9e5), gpu_state(crc({1: 1700, 2: 2}), 9e5 + 5)),
        (gpu_state(crc({}), 3.0), gpu_state(crc({1: 900}), 8.0)),
    ]
    assert crc_warnings(noisy) == ["NVLink CRC data errors rose by 1701 (link 1: 1700, link 2: 1)"]
