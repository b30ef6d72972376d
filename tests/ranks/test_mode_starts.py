"""Modes of a plan with real processes: one start each, into one run directory, for every launcher."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ncclbench.errors import Exit
from ncclbench.store.run_directory import Run, read_run
from tests.helpers.stored import known

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.ranks.conftest import Starter

pytestmark = pytest.mark.ranks

PLAN = """
name = "modes"
[[mode]]
name = "pxn"
variables = { NCCL_PXN_DISABLE = 0, NCCL_P2P_PXN_LEVEL = 2 }
[[mode]]
name = "spine"
variables = { NCCL_PXN_DISABLE = 1, NCCL_CROSS_NIC = 1 }
[[case]]
pattern = "all_reduce"
bytes = ["1K", "4K"]
iterations = 10
[[case]]
pattern = "all_gather"
bytes = "4K"
iterations = 10
mode = "spine"
"""
SMALL, LARGE, GATHER = (
    f"{name}/isolated" for name in ("all_reduce/float32/1024", "all_reduce/float32/4096", "all_gather/float32/4096")
)
LINE = "run --plan modes.toml -o run"
PXN_SET = {"NCCL_PXN_DISABLE": "0", "NCCL_P2P_PXN_LEVEL": "2"}
SPINE_SET = {"NCCL_PXN_DISABLE": "1", "NCCL_CROSS_NIC": "1"}


@pytest.fixture
def planned(jobs: Starter) -> Starter:
    (jobs.folder / "modes.toml").write_text(PLAN)
    return jobs


def found_set(run: Run) -> dict[int, dict[str, str]]:
    """The modes' variables, as every rank of each start found them in its environment."""
    names = {*PXN_SET, *SPINE_SET}
    found = {}
    for event in run.events:
        if event.kind == "start":
            (view,) = known(event.software)  # all ranks alike
            assert view.ranks == [0, 1]
            found[event.start] = {name: str(value) for name, value in known(view.variables).items() if name in names}
    return found


def test_next_mode_is_measured_after_a_killed_start(planned: Starter, saboteur: Mapping[str, str]) -> None:
    plot = {**saboteur, "SABOTAGE": "kill:1:4096:5", "SABOTAGE_MARK": str(planned.folder / "mark")}
    done = planned.ncclbench(f"{LINE} --transport saboteur --nproc 2", plot).wait()
    assert done.code == Exit.ENVIRONMENT
    assert "process start 2 of 2 (mode spine: NCCL_PXN_DISABLE=1 NCCL_CROSS_NIC=1)" in done.err
    run = read_run(planned.folder / "run")
    assert found_set(run) == {0: PXN_SET, 1: SPINE_SET}
    lost = [(r.start, r.mode, r.case, r.ranks) for r in run.records if r.status == "failed"]
    assert lost[0] == (0, "pxn", LARGE, [1])
    assert run.open_start == 0
    again = planned.ncclbench(f"{LINE} --transport saboteur --nproc 2 --resume", saboteur).wait()
    assert again.code == Exit.GOOD, again.err
    run = read_run(planned.folder / "run")
    assert run.open_start is None
    assert [(r.start, r.mode, r.case, r.status) for r in run.records] == [
        (0, "pxn", SMALL, "ok"),
        (0, "pxn", LARGE, "ok"),
        (1, "spine", GATHER, "ok"),
    ]


def test_torchrun_start_sets_its_mode_and_prints_the_next_command(planned: Starter) -> None:
    job = planned.torchrun(2, f"{LINE} --transport gloo").wait()
    assert job.code == Exit.GOOD, job.err
    (asked,) = [line for line in job.err.splitlines() if "is still missing; make it with: " in line]
    assert asked.startswith("process start 2 of 2 (mode spine: ")
    assert asked.endswith(" --resume --process-start 2")
    job = planned.start(asked.partition("is still missing; make it with: ")[2]).wait()
    assert job.code == Exit.GOOD, job.err
    assert "still missing" not in job.err
    run = read_run(planned.folder / "run")
    assert found_set(run) == {0: PXN_SET, 1: SPINE_SET}
    assert [(r.start, r.case) for r in run.records] == [(0, SMALL), (0, LARGE), (1, GATHER)]
