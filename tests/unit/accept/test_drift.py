"""Between process starts: what differs is named, and what may differ is not held against a run."""

from typing import Any

import msgspec
import pytest

from ncclbench.accept.checks.drift import _told
from ncclbench.store.manifest import SoftwareRecord
from ncclbench.store.provenance import recorded_variables
from ncclbench.store.records import Json

NCCL: dict[str, Json] = {"nccl": "2.28.9"}
VIEWS = [
    SoftwareRecord(ranks=[0, 1], versions=NCCL, variables={"NCCL_ALGO": "Ring", "NCCL_IB_HCA": "mlx5_0"}),
    SoftwareRecord(ranks=[2], versions=NCCL, variables={"NCCL_ALGO": "Tree", "NCCL_IB_HCA": "mlx5_1"}),
]


def test_what_ranks_have_in_common_is_said_once_and_what_may_differ_not_at_all() -> None:
    assert _told(VIEWS, ["NCCL_IB_*"]) == {"nccl": "2.28.9", "NCCL_ALGO": "Ring on ranks 0, 1, Tree on rank 2"}


@pytest.mark.parametrize("views", [[], [{"ranks": [0]}], [{"ranks": [0], "versions": None, "variables": {}}]])
def test_a_start_that_tells_nothing_differs_in_nothing(views: list[dict[str, Any]]) -> None:
    assert _told(msgspec.convert(views, list[SoftwareRecord]), []) == {}


def test_the_order_in_which_ranks_were_told_does_not_matter() -> None:
    assert _told(VIEWS, []) == _told(VIEWS[::-1], [])


def test_where_a_log_goes_is_no_setting() -> None:
    """Each process has one of its own: on GPUs every second start would have drifted from the first."""
    environ = {"NCCL_DEBUG_FILE": "/tmp/4711.log", "NCCL_DEBUG": "INFO", "NCCL_AUTH_TOKEN": "x", "HOME": "/"}
    assert recorded_variables(environ) == {"NCCL_DEBUG": "INFO"}
