"""Acceptance with real processes: all declared starts are made, whatever becomes of one, and end in a verdict."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ncclbench.errors import Exit
from ncclbench.store.run_directory import read_run
from tests.helpers.stored import known

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.ranks.conftest import Starter

pytestmark = pytest.mark.ranks

STARTS = 2  # each is ranks that load torch; that a start follows one that was itself asked for is in test_modes.py
PLAN = f"""
name = "small"
starts = {STARTS}
[[case]]
pattern = "all_reduce"
bytes = ["1K", "4K"]
iterations = 20
warmup = 1
"""
PROFILE = f"""
schema = 1
name = "small"
title = "whatever moves"
plan = "plan.toml"
[fabric]
device = "cpu"
transports = ["gloo", "threads", "saboteur"]
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


@pytest.fixture
def small(jobs: Starter) -> Starter:
    (jobs.folder / "plan.toml").write_text(PLAN)
    (jobs.folder / "small.toml").write_text(PROFILE)
    return jobs


def started(path: Path) -> list[tuple[int, tuple[int | str | None, ...]]]:
    """Number and processes of each start, in order."""
    return [(e.start, tuple(known(e.pids))) for e in read_run(path).events if e.kind == "start"]


def verify(jobs: Starter, path: str) -> None:
    done = jobs.ncclbench(f"verify {path}").wait()
    assert done.code == Exit.GOOD, done.out
    assert done.out.startswith("SOUND")


def test_laptop_profile_ends_in_a_verdict_with_all_starts(jobs: Starter) -> None:
    done = jobs.ncclbench("accept --profile cpu-gloo --nproc 2 -o rack --json").wait(240)
    document = done.summary
    assert document["verdict"] in ("PASS", "FAIL", "INCONCLUSIVE"), "a busy machine decides which"
    assert done.code == document["exit_code"]
    assert document["starts"] == {"declared": 3, "present": 3}
    assert "cpu only" in document["stamps"]
    assert done.out.splitlines()[0].startswith(document["verdict"])
    pids = [pid for _, processes in started(jobs.folder / "rack") for pid in processes]
    assert len(set(pids)) == 6, "three starts of two processes each"
    verify(jobs, "rack")
    verdict = json.loads((jobs.folder / "rack/verdict.json").read_text())
    assert verdict["checks"] == document["checks"]


@pytest.mark.parametrize("transport", ["gloo", "threads"])
def test_every_start_has_processes_of_its_own(transport: str, small: Starter) -> None:
    done = small.ncclbench(f"accept --profile small.toml --transport {transport} --nproc 2 -o rack --redact").wait()
    assert done.code == Exit.GOOD, done.out + done.err
    assert done.out.startswith(f"PASS  profile small, {STARTS} of {STARTS} process starts")
    starts = started(small.folder / "rack")
    assert [number for number, _ in starts] == list(range(STARTS))
    assert len({pid for _, processes in starts for pid in processes}) == STARTS * (2 if transport == "gloo" else 1)
    run = read_run(small.folder / "rack")
    assert [(r.start, r.bytes) for r in run.records] == [(k, size) for k in range(STARTS) for size in (1024, 4096)]
    assert len({r.samples for r in run.records}) == 2 * STARTS, "all samples are kept"
    verify(small, "rack")
    verify(small, "rack-redacted")


def test_run_makes_the_starts_that_its_plan_declares(small: Starter) -> None:
    done = small.ncclbench("run --plan plan.toml --nproc 2 --transport threads -o rack --json").wait()
    assert (done.code, len(done.out.splitlines())) == (Exit.GOOD, 1)
    assert [record["start"] for record in done.records] == [0, 0, 1, 1]
    assert len(started(small.folder / "rack")) == STARTS


def sabotaged(jobs: Starter, saboteur: Mapping[str, str], plot: str) -> tuple[int, dict[str, Any]]:
    environ = {**saboteur, "SABOTAGE": plot, "SABOTAGE_MARK": str(jobs.folder / "mark")}
    done = jobs.ncclbench("accept --profile small.toml --transport saboteur --nproc 2 -o rack --json", environ).wait()
    return done.code, done.summary


def test_killed_rank_counts_and_the_other_starts_run(small: Starter, saboteur: Mapping[str, str]) -> None:
    code, document = sabotaged(small, saboteur, "kill:1:4096:10")
    assert code == document["exit_code"] == Exit.ENVIRONMENT
    assert document["verdict"] == "INCONCLUSIVE"
    assert [number for number, _ in started(small.folder / "rack")] == [0, 1]
    lost = [check for check in document["checks"] if check["check"] == "starts" and check["cause"]]
    assert [check["subject"] for check in lost] == ["start 0", "start 1"]
    assert all("rank 1 died" in check["reason"] and check["action"] == "ISOLATE" for check in lost)
    verify(small, "rack")
    resumed = small.ncclbench(
        "accept --profile small.toml --transport saboteur --nproc 2 -o rack --resume --json", saboteur
    ).wait()
    assert resumed.summary["starts"] == {"declared": STARTS, "present": STARTS}
    assert resumed.summary["verdict"] == "INCONCLUSIVE", "a start that lost a rank counts, however it went on"
    assert resumed.code == Exit.INCONCLUSIVE


def test_wrong_data_end_in_4(small: Starter, saboteur: Mapping[str, str]) -> None:
    code, document = sabotaged(small, saboteur, "wrong:1:4096:1")
    assert (code, document["verdict"]) == (Exit.WRONG_DATA, "FAIL")
    (bad,) = [check for check in document["checks"] if check["check"] == "data" and check["verdict"] == "FAIL"]
    assert bad["evidence"][0]["wrong_ranks"] == [1]


def test_torchrun_start_prints_the_exact_next_command(small: Starter) -> None:
    job = small.torchrun(2, "accept --profile small.toml -o rack").wait()
    assert "INCONCLUSIVE  profile small" in job.out
    (asked,) = [line for line in job.err.splitlines() if "is still missing; make it with: " in line]
    assert asked.startswith(f"process start 2 of {STARTS} ")
    command = asked.partition("is still missing; make it with: ")[2]
    assert "torchrun" in shlex.split(command)[1]
    job = small.start(command).wait()
    assert "still missing" not in job.err
    assert job.out.startswith(f"PASS  profile small, {STARTS} of {STARTS}"), job.out
    assert len(started(small.folder / "rack")) == STARTS
    verify(small, "rack")


def test_interruption_leaves_no_process_and_makes_no_further_start(small: Starter) -> None:
    import signal

    (small.folder / "plan.toml").write_text(PLAN.replace("iterations = 20", "max_seconds = 60\nprecision = 0.0"))
    job = small.ncclbench("accept --profile small.toml --nproc 2 --transport gloo -o rack")
    assert small.eventually(lambda: (small.folder / "rack/events.jsonl").exists(), 60)
    small.eventually(lambda: b'"kind":"case"' in (small.folder / "rack/events.jsonl").read_bytes(), 60)
    job.signal(signal.SIGINT)
    done = job.wait()
    assert done.code == Exit.ENVIRONMENT
    assert len(started(small.folder / "rack")) == 1
    assert job.no_process_is_left()
