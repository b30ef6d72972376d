"""One rank of three fails during a case: it is named, no process is left, finished cases are kept, the run resumes."""

from __future__ import annotations

import json
import signal
import time
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest

from ncclbench.errors import Exit
from ncclbench.store import events
from ncclbench.store.run_directory import read_run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ncclbench.store.run_directory import Run
    from tests.ranks.conftest import Job, Starter

pytestmark = pytest.mark.ranks

LIMIT = 3.0  # seconds without progress, the plan's timeout
GRACE = 5.0  # what may pass beyond that until rank 0 has named the culprit and the last rank is gone
CASES = ["all_reduce/float32/1024/isolated", "all_reduce/float32/4096/isolated", "all_reduce/float32/16384/isolated"]
# One launch to check and one to warm up; the tenth is in the middle of the twenty that are timed.
AT = "4096:10"
# The limit stands in the plan: --timeout would be one for meeting each other as well.
PLAN = """
name = "faults"
[[case]]
pattern = "all_reduce"
min_bytes = "1K"
max_bytes = "16K"
factor = 4
iterations = 20
warmup = 1
timeout = {limit}
"""
LINE = "run --plan plan.toml --transport saboteur --json -o run"


def start(
    jobs: Starter, saboteur: Mapping[str, str], launcher: str, sabotage: str = "", more: str = "", limit: float = LIMIT
) -> Job:
    """Three ranks, of which one may misbehave; a run that goes on has the plan that it had."""
    environ = {**saboteur, "SABOTAGE": sabotage, "SABOTAGE_MARK": str(jobs.folder / "mark")}
    if not more:
        (jobs.folder / "plan.toml").write_text(PLAN.format(limit=limit))
    if launcher == "torchrun":
        return jobs.torchrun(3, f"{LINE} {more}", environ)
    return jobs.ncclbench(f"{LINE} --nproc 3 {more}", environ)


def sabotaged_at(jobs: Starter) -> float:
    """When it happened, in seconds of the epoch."""
    return float((jobs.folder / "mark").read_text())


def ranks_gone_at(job: Job, jobs: Starter) -> float:
    """When the last rank was gone, in seconds of the epoch; torchrun itself takes its time after that."""
    assert jobs.eventually((jobs.folder / "mark").exists, 60)
    assert jobs.eventually(lambda: not job.ranks(), 60)
    return time.time()


def statuses(run: Run) -> dict[str, str]:
    return {record.case: record.status for record in run.records}


def assert_finished_is_intact(jobs: Starter) -> Run:
    """The case before the fault is there with its samples, the one after it never began, and the log is sound."""
    run = read_run(jobs.folder / "run")
    assert [record.case for record in run.records] == CASES[:2]
    first = run.records[0]
    assert first.status == "ok"
    assert first.samples is not None
    assert pq.read_table(run.path / first.samples).num_rows == 3 * 20
    assert events.broken_link(run.path / "events.jsonl") is None
    assert run.interrupted_in is None  # it is known how the case ended
    assert run.events[-1].kind == "end"
    assert run.events[-1].exit_code == Exit.ENVIRONMENT
    return run


def assert_goes_on(jobs: Starter, saboteur: Mapping[str, str], launcher: str) -> None:
    """--resume measures what is missing, and keeps what there was."""
    kept = read_run(jobs.folder / "run").records[0]
    finished = start(jobs, saboteur, launcher, "", "--resume").wait()
    assert finished.code == Exit.GOOD, finished.err
    run = read_run(jobs.folder / "run")
    assert statuses(run) == dict.fromkeys(CASES, "ok")
    assert run.records[0] == kept
    assert [record["case"] for record in finished.records] == CASES
    began = [event.case for event in run.events if event.kind == "case"]
    assert began == [*CASES[:2], *CASES[1:]]  # the finished one was not measured again
    assert events.broken_link(run.path / "events.jsonl") is None
    assert len({record.samples for record in run.records}) == 3


# What a rank does -> status of the record, whether only this rank is named, and words of the reason.
FAULTS: dict[str, tuple[str, bool, str]] = {
    "raise": ("failed", True, "ValueError: sabotage"),
    "exit": ("failed", True, "died (last seen in timed"),
    "kill": ("failed", True, "died (last seen in timed"),
    "stop": ("timeout", True, f"no progress for {LIMIT:.0f} s"),
    # The others wait in the same launch, so from outside they look alike; the one that hangs is among them.
    "hang": ("timeout", False, f"no progress for {LIMIT:.0f} s"),
}


# Every fault alone and under torchrun, and of rank 0, which writes the run, by one of the two.
ALONE = [("raise", 0), ("exit", 2), ("kill", 0), ("kill", 2), ("stop", 2), ("hang", 0)]
TORCHRUN = [("raise", 2), ("exit", 0), ("kill", 0), ("stop", 0), ("hang", 2)]
FAULTY = [(*fault, launcher) for launcher, faults in (("alone", ALONE), ("torchrun", TORCHRUN)) for fault in faults]
# Where it is also tried to go on: alone and under torchrun, and after the death of rank 0. However a run has ended, it
# goes on by what is stored: tests/unit/launch/test_recorder.py.
GOES_ON = [("kill", 2, "alone"), ("kill", 0, "torchrun")]


@pytest.mark.parametrize(("kind", "victim", "launcher"), FAULTY)
def test_a_rank_goes_wrong_in_mid_case(
    kind: str, victim: int, launcher: str, jobs: Starter, saboteur: dict[str, str]
) -> None:
    status, alone, words = FAULTS[kind]
    job = start(jobs, saboteur, launcher, f"{kind}:{victim}:{AT}")
    gone = ranks_gone_at(job, jobs)
    finished = job.wait(60)

    assert finished.code == (Exit.ENVIRONMENT if launcher == "alone" else 1), finished.err
    assert gone - sabotaged_at(jobs) < LIMIT + GRACE
    assert job.no_process_is_left()

    record = assert_finished_is_intact(jobs).records[1]
    assert (record.status, record.samples) == (status, None)
    assert victim in record.ranks, record.reason
    assert not alone or record.ranks == [victim], record.reason
    reason = record.reason or ""
    assert f"rank {victim}" in reason
    if not (victim == 0 and kind in ("exit", "kill", "stop")):  # then rank 1 reports, which knows less
        assert words in reason
    assert "\n" not in reason
    assert "Traceback" not in finished.err or launcher == "torchrun"  # which prints one of its own
    assert "/ncclbench/" not in finished.err
    assert f"rank {victim}" in finished.err
    assert "go on with --resume" in finished.err

    summary: dict[str, Any] = json.loads(finished.out.splitlines()[-1])
    assert summary["exit_code"] == Exit.ENVIRONMENT
    assert [(r["case"], r["status"]) for r in summary["records"]] == [(CASES[0], "ok"), (CASES[1], status)]

    if (kind, victim, launcher) in GOES_ON:
        assert_goes_on(jobs, saboteur, launcher)


def test_rank_that_hangs_first_is_named_alone(jobs: Starter, saboteur: dict[str, str]) -> None:
    job = start(jobs, saboteur, "alone", "hang-compile:1:4096:0")
    gone = ranks_gone_at(job, jobs)
    assert gone - sabotaged_at(jobs) < LIMIT + GRACE
    assert job.wait(60).code == Exit.ENVIRONMENT
    record = assert_finished_is_intact(jobs).records[1]
    assert (record.status, record.ranks) == ("timeout", [1])
    assert "rank 1 (compile" in (record.reason or "")


def test_library_error_is_reported_by_its_rank(jobs: Starter, saboteur: dict[str, str]) -> None:
    """Torch raises RuntimeErrors; translated once, with the case and the rank."""
    finished = start(jobs, saboteur, "alone", f"library:2:{AT}").wait(60)
    assert finished.code == Exit.ENVIRONMENT
    record = assert_finished_is_intact(jobs).records[1]
    assert (record.status, record.ranks) == ("failed", [2])
    assert record.reason == f"{CASES[1]} on rank 2: connection reset by sabotage"


@pytest.mark.parametrize("victim", [0, 2])
def test_background_library_error_is_reported_while_the_caller_waits(
    victim: int, jobs: Starter, saboteur: dict[str, str]
) -> None:
    """As in NCCL: after the error its kernels never end."""
    finished = start(jobs, saboteur, "alone", f"background:{victim}:{AT}", limit=60).wait(40)
    assert finished.code == Exit.ENVIRONMENT
    record = assert_finished_is_intact(jobs).records[1]
    assert (record.status, record.ranks) == ("failed", [victim])
    assert record.reason == f"rank {victim}: NCCL: remote process exited or there was a network error"


@pytest.mark.parametrize(
    ("number", "launcher"), [(signal.SIGTERM, "alone"), (signal.SIGINT, "alone"), (signal.SIGTERM, "torchrun")]
)
def test_an_interruption_is_written_down(
    number: signal.Signals, launcher: str, jobs: Starter, saboteur: dict[str, str]
) -> None:
    job = start(jobs, saboteur, launcher, f"hang:1:{AT}", limit=60)
    assert jobs.eventually((jobs.folder / "mark").exists, 60)  # now it is in mid-case, and stays there
    job.signal(number)
    finished = job.wait(60)
    assert finished.code == Exit.ENVIRONMENT if launcher == "alone" else finished.code != 0
    assert job.no_process_is_left()
    record = assert_finished_is_intact(jobs).records[1]
    assert (record.status, record.ranks) == ("failed", [])
    if launcher == "alone":  # torchrun says SIGTERM to its ranks whatever it got itself
        assert record.reason == f"interrupted by {number.name}"
        assert finished.err.count("\n") == 1
    assert "interrupted by SIG" in (record.reason or "")


def test_ranks_do_not_outlive_the_process_that_started_them(jobs: Starter, saboteur: dict[str, str]) -> None:
    job = start(jobs, saboteur, "alone", f"hang:1:{AT}", limit=60)
    assert jobs.eventually((jobs.folder / "mark").exists, 60)
    assert len(job.survivors()) == 4
    job.signal(signal.SIGKILL)
    assert job.no_process_is_left(LIMIT + GRACE)
    assert job.wait().code == -signal.SIGKILL
    record = assert_finished_is_intact(jobs).records[1]
    assert (record.status, record.ranks) == ("failed", [])  # no rank is to blame
    assert "the launching process is gone" in (record.reason or "")


def test_refusal_after_the_rendezvous_is_one_line(jobs: Starter, saboteur: dict[str, str]) -> None:
    """Only rank 0 sees that the plan differs. All ranks end by themselves; none is killed."""
    assert start(jobs, saboteur, "alone").wait().code == Exit.GOOD
    before = (jobs.folder / "run" / "results.jsonl").read_bytes()
    (jobs.folder / "plan.toml").write_text(PLAN.format(limit=LIMIT).replace("warmup = 1", "warmup = 2"))
    finished = start(jobs, saboteur, "alone", "", "--resume").wait()
    assert finished.code == Exit.USAGE
    assert finished.err.splitlines() == [
        "ncclbench: error: cannot resume run: plan.cases[0].settings.warmup was 1, and now is 2"
    ]
    assert (jobs.folder / "run" / "results.jsonl").read_bytes() == before
