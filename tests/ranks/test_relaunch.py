"""``--launcher``: called once, outside of the ranks, accept makes every start by a launcher call of its own."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ncclbench.errors import Exit
from ncclbench.store.run_directory import read_run
from tests.helpers.paths import ROOT
from tests.helpers.stored import known

if TYPE_CHECKING:
    from tests.ranks.conftest import Starter

pytestmark = pytest.mark.ranks

STARTS = 2
PLAN = f"""
name = "small"
starts = {STARTS}
[[case]]
pattern = "all_reduce"
bytes = "1K"
iterations = 10
warmup = 1
"""
PROFILE = f"""
schema = 1
name = "small"
title = "whatever moves"
plan = "plan.toml"
[fabric]
device = "cpu"
transports = ["gloo", "mpi", "threads"]
[limits]
min_starts = {STARTS}
median_width = 1e9
p95_over_p50 = 1e9
start_spread = 1e9
skew_share = 1e9
[[floor]]
where = {{ pattern = "all_reduce" }}
at_least = 1e-12
tolerance = 0.0
basis = "measured"
source = "a rate that only what stands still misses"
date = "2026-01-01"
"""
ROOT_MAY = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

# What srun does, on one host: two tasks with the variables of a step, each step with a number of its own; a task's
# exit code is the step's; SIGTERM goes to the tasks.
SRUN = """#!/usr/bin/env bash
[ "$1" != --kill-on-bad-exit=1 ] || shift
echo "$*" >> "$STEPS"
export SLURM_JOB_ID=$$ SLURM_STEP_ID=$(wc -l < "$STEPS") SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=1
export SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST=localhost SLURM_NODEID=0
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks[task]=$!; done
trap 'kill -TERM "${tasks[@]}"' TERM
worst=0
for task in "${tasks[@]}"; do
    wait "$task" || { code=$?; [ "$code" -le "$worst" ] || worst=$code; }
done
exit "$worst"
"""
# A launcher that fails in its second call, and otherwise starts a single process.
FLAKY = """#!/usr/bin/env bash
echo "$*" >> "$STEPS"
[ "$(wc -l < "$STEPS")" -ne 2 ] || { echo "flaky: no node left" >&2; exit 1; }
exec "$@"
"""


@pytest.fixture
def small(jobs: Starter) -> Starter:
    (jobs.folder / "plan.toml").write_text(PLAN)
    (jobs.folder / "small.toml").write_text(PROFILE)
    return jobs


def script(jobs: Starter, name: str, text: str) -> dict[str, str]:
    """A launcher of that name on the PATH; the file that STEPS names gets a line for each of its calls."""
    folder = jobs.folder / "bin"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
    (folder / "ncclbench").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m ncclbench "$@"\n')
    (folder / "ncclbench").chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {"PATH": path, "STEPS": str(jobs.folder / "steps")}


def starts(path: Path) -> list[tuple[int, int]]:
    """Number and number of processes of each start; no process belongs to two of them."""
    found = [(e.start, set(known(e.pids))) for e in read_run(path).events if e.kind == "start"]
    assert len(set().union(*(pids for _, pids in found))) == sum(len(pids) for _, pids in found)
    return [(number, len(pids)) for number, pids in found]


@pytest.mark.parametrize(
    ("launcher", "transport"),
    [("torchrun --standalone --nproc-per-node 2", "gloo"), ("mpiexec -n 2 --oversubscribe", "mpi")],
)
def test_every_start_is_a_call_of_the_launcher(launcher: str, transport: str, small: Starter) -> None:
    job = small.ncclbench(
        f"accept --profile small.toml --transport {transport} --launcher '{launcher}' -o rack", ROOT_MAY
    )
    done = job.wait()
    assert done.code == Exit.GOOD, done.out + done.err
    assert done.out.startswith(f"PASS  profile small, {STARTS} of {STARTS} process starts")
    assert starts(small.folder / "rack") == [(0, 2), (1, 2)]
    assert "still missing" not in done.err
    assert read_run(small.folder / "rack").manifest.provenance.launcher in ("torchrun", "openmpi")
    assert job.no_process_is_left()


def test_batch_script_makes_all_starts_and_the_verdict(small: Starter) -> None:
    environ = script(small, "srun", SRUN)
    allocation = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_SUBMIT_DIR": str(small.folder)}
    line = f"{ROOT}/scripts/launch/accept.sbatch small.toml --transport gloo"
    done = small.start(line, {**environ, **allocation}).wait()
    assert done.code == Exit.GOOD, done.out + done.err
    assert done.out.startswith("PASS")
    assert starts(small.folder / "runs/accept-4711") == [(0, 2), (1, 2)]
    calls = (small.folder / "steps").read_text().splitlines()
    told = [json.loads(call.partition(" run --request ")[2]) for call in calls]
    assert [request["process_start"] for request in told] == [1, 2]
    assert all("launcher" not in request for request in told), "ranks start no further ranks"
    assert all(request["command"][0] == "accept" for request in told), "the command that the manifest shows"


def test_refused_start_is_missing_and_can_be_repeated(small: Starter) -> None:
    environ = script(small, "flaky", FLAKY)
    line = "accept --profile small.toml --transport threads --launcher flaky -o rack"
    done = small.ncclbench(line, environ).wait()
    assert done.code == Exit.ENVIRONMENT
    assert done.out.startswith(f"INCONCLUSIVE  profile small, 1 of {STARTS} process starts")
    assert "flaky: no node left" in done.err
    done = small.ncclbench(f"{line} --resume", environ).wait()
    assert done.code == Exit.GOOD, done.out + done.err
    assert starts(small.folder / "rack") == [(0, 1), (1, 1)], "the ranks of each are threads"


@pytest.mark.parametrize(
    ("launcher", "code", "words"),
    [
        ("''", Exit.USAGE, "--launcher is empty"),
        ('"\'"', Exit.USAGE, "No closing quotation"),
        ("nowhere", Exit.ENVIRONMENT, "could not start --launcher 'nowhere': No such file or directory"),
        ("false", Exit.ENVIRONMENT, "false ended in 1 before anything was measured"),
        ("true", Exit.ENVIRONMENT, "name a directory that it shares with rank 0's host"),
        ("true --nproc 2", Exit.USAGE, "--nproc does not go with --launcher"),
    ],
)
def test_a_launcher_that_starts_nothing_is_one_clear_line(
    launcher: str, code: Exit, words: str, small: Starter
) -> None:
    done = small.ncclbench(f"accept --profile small.toml -o rack --launcher {launcher}").wait()
    assert done.code == code, done.out + done.err
    (said,) = [line for line in done.err.splitlines() if line.startswith("ncclbench: error:")]
    assert words in said
    assert not (small.folder / "rack/manifest.json").exists()


def test_interruption_ends_the_launcher_and_prevents_further_starts(small: Starter) -> None:
    (small.folder / "plan.toml").write_text(PLAN.replace("iterations = 10", "max_seconds = 60\nprecision = 0.0"))
    environ = script(small, "srun", SRUN)
    job = small.ncclbench("accept --profile small.toml --transport gloo --launcher srun -o rack", environ)
    log = small.folder / "rack/events.jsonl"
    assert small.eventually(lambda: log.exists() and b'"kind":"case"' in log.read_bytes(), 60)
    job.signal(signal.SIGINT)
    assert job.wait().code == Exit.ENVIRONMENT
    assert len(starts(small.folder / "rack")) == 1
    assert job.no_process_is_left()


def test_mpiexec_that_refuses_root_is_one_clear_line(small: Starter) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root is refused")
    done = small.start(
        f"env -u OMPI_ALLOW_RUN_AS_ROOT {shlex.quote(sys.executable)} -m ncclbench "
        "accept --profile small.toml --transport mpi --nproc 2 -o rack"
    ).wait()
    assert done.code == Exit.ENVIRONMENT
    (said,) = [line for line in done.err.splitlines() if line.startswith("ncclbench: error:")]
    assert "before any rank had begun" in said
    assert "OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1" in said


def test_mpi_alone_makes_all_starts_itself(small: Starter) -> None:
    done = small.ncclbench("accept --profile small.toml --transport mpi --nproc 2 -o rack", ROOT_MAY).wait()
    assert done.code == Exit.GOOD, done.out + done.err
    assert starts(small.folder / "rack") == [(0, 2), (1, 2)]
    assert "still missing" not in done.err, "the script makes the missing starts by itself"
