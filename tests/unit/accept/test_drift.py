"""Drift between process starts: differences are named, and allowed variables may differ."""

from typing import Any

import msgspec
import pytest

from ncclbench.accept.checks.drift import software_of_start
from ncclbench.store.manifest import SoftwareRecord
from ncclbench.store.provenance import recorded_variables
from ncclbench.store.records import Json

NCCL: dict[str, Json] = {"nccl": "2.28.9"}
VIEWS = [
    SoftwareRecord(ranks=[0, 1], versions=NCCL, variables={"NCCL_ALGO": "Ring", "NCCL_IB_HCA": "mlx5_0"}),
    SoftwareRecord(ranks=[2], versions=NCCL, variables={"NCCL_ALGO": "Tree", "NCCL_IB_HCA": "mlx5_1"}),
]


def test_common_values_are_listed_once_and_allowed_ones_omitted() -> None:
    assert software_of_start(VIEWS, ["NCCL_IB_*"]) == {
        "nccl": "2.28.9",
        "NCCL_ALGO": "Ring on ranks 0, 1, Tree on rank 2",
    }


@pytest.mark.parametrize("views", [[], [{"ranks": [0]}], [{"ranks": [0], "versions": None, "variables": {}}]])
def test_start_without_software_does_not_differ(views: list[dict[str, Any]]) -> None:
    assert software_of_start(msgspec.convert(views, list[SoftwareRecord]), []) == {}


def test_order_of_ranks_does_not_matter() -> None:
    assert software_of_start(VIEWS, []) == software_of_start(VIEWS[::-1], [])


def test_log_path_is_not_a_recorded_setting() -> None:
    """The path differs in every process, so each later start would differ from the first."""
    environ = {"NCCL_DEBUG_FILE": "/tmp/4711.log", "NCCL_DEBUG": "INFO", "NCCL_AUTH_TOKEN": "x", "HOME": "/"}
    assert recorded_variables(environ) == {"NCCL_DEBUG": "INFO"}
