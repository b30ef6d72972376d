"""Under torchrun: one node, a launcher half set, and jobs that are several. Two nodes: test_launch_examples.py."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from ncclbench.errors import Exit

if TYPE_CHECKING:
    from tests.ranks.conftest import Starter

pytestmark = pytest.mark.ranks

ROOT_MAY = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "PRTE_ALLOW_RUN_AS_ROOT": "1",
            "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # fmt: skip


def errors(text: str) -> list[str]:
    """Our own lines among torchrun's."""
    return [line for line in text.splitlines() if "ncclbench: error: " in line]


def test_four_ranks_on_one_node(jobs: Starter) -> None:
    job = jobs.torchrun(4, "run all_reduce -b 1K -e 4M -f 64 --max-seconds 0.1 --json -o run")
    finished = job.wait()
    assert finished.code == Exit.GOOD, finished.err
    assert finished.out.count("\n") == 1  # only rank 0 prints
    assert finished.summary["exit_code"] == 0
    assert [record["bytes"] for record in finished.records] == [1 << 10, 1 << 16, 1 << 22]
    for record in finished.records:
        assert (record["status"], record["wrong"], record["world_size"]) == ("ok", 0, 4)
        assert record["stopped"] in ("precision", "time")
        assert record["time_us"]["n"] >= 6
    manifest = json.loads((jobs.folder / "run" / "manifest.json").read_text())
    assert manifest["provenance"]["launcher"] == "torchrun"
    assert manifest["topology"]["world_size"] == 4
    assert job.no_process_is_left()


def test_a_usage_error_is_said_once(jobs: Starter) -> None:
    finished = jobs.torchrun(2, "run all_redcue --json").wait()
    assert finished.code != 0
    assert len(errors(finished.err)) == 1
    assert "did you mean 'all_reduce'" in finished.err
    assert len(finished.out.splitlines()) == 1, "and once as JSON"
    assert finished.summary["exit_code"] == Exit.USAGE


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "MASTER_PORT", "WORLD_SIZE"])
def test_a_launcher_half_set_starts_nothing(missing: str, jobs: Starter) -> None:
    environ = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29400",
    }
    del environ[missing]
    finished = jobs.ncclbench("run all_reduce -b 8 -e 8 -o run", environ).wait(30)
    assert (finished.code, finished.out) == (Exit.ENVIRONMENT, "")
    assert finished.err.count("\n") == 1
    assert f"but not {missing}" in finished.err
    assert not (jobs.folder / "run").exists()


def test_independent_jobs_under_mpirun_are_refused(jobs: Starter) -> None:
    """The classic mistake: mpirun starts two processes, and each makes a torchrun job of one of itself."""
    job = jobs.start(
        "mpiexec -n 2 --oversubscribe torchrun --standalone --nproc-per-node 1"
        " -m ncclbench run all_reduce -b 8 -e 8 -o run",
        ROOT_MAY,
    )
    finished = job.wait()
    assert finished.code != 0
    said = errors(finished.err)
    assert said, finished.err
    for line in said:
        assert "openmpi started 2 processes, but torchrun makes a job of 1 in each" in line
        assert "2 independent jobs" in line
    assert not (jobs.folder / "run").exists()
    assert job.no_process_is_left()


def test_torchrun_inside_one_outer_task_is_one_job(jobs: Starter) -> None:
    """A step of one task that runs torchrun: legitimate, and not refused."""
    outer = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}
    finished = jobs.torchrun(2, "run all_reduce -b 8 -e 8 -n 6 -w 1 --json -o run", outer).wait()
    assert finished.code == Exit.GOOD, finished.err
    assert [(r["status"], r["world_size"]) for r in finished.records] == [("ok", 2)]
