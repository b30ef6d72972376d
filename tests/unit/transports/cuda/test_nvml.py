"""What NVML is asked for, and what it is not asked again."""

import pytest

from ncclbench.store.records import Json
from ncclbench.transports.cuda import nvml as _nvml
from ncclbench.transports.cuda.nvml import gpu_state
from tests.helpers.fake_nvml import FakeNvml
from tests.helpers.stored import known


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml({1: 3, 2: 2, 3: 15})  # not supported, invalid argument, and a GPU that is lost for a while
    monkeypatch.setattr(_nvml, "nvml_library", lambda: fake)
    monkeypatch.setattr(_nvml, "unsupported_counters", {})
    return fake


def errors(pci_bus_id: str) -> dict[str, Json]:
    return known(known(gpu_state(pci_bus_id)).errors)


def test_unsupported_counters_are_read_once(nvml: FakeNvml) -> None:
    first, second = (errors("0000:01:00.0") for _ in range(2))
    assert first == second
    assert first["ECC corrected errors"] == 5
    assert "ECC uncorrected errors" not in first
    assert {link for link in range(18) if f"NVLink {link} replay errors" in first} == set(range(18)) - {1, 2, 3}
    here = b"0000:01:00.0"
    assert [nvml.asked[here, link] for link in (0, 1, 2, 3)] == [8, 4, 4, 8]  # of four counters


@pytest.mark.usefixtures("nvml")
def test_another_gpu_reads_all_counters() -> None:
    gpu_state("0000:01:00.0")
    assert errors("0000:02:00.0")["NVLink 1 replay errors"] == 1


def test_temporary_error_is_read_again(nvml: FakeNvml) -> None:
    assert "NVLink 3 replay errors" not in errors("0000:01:00.0")
    nvml.answers.clear()
    told = errors("0000:01:00.0")
    assert told["NVLink 3 replay errors"] == 3
    assert "NVLink 1 replay errors" not in told
