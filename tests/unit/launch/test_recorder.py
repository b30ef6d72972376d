"""The recorder: a run ends once, and no thread writes after its end."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ncclbench.errors import Exit
from ncclbench.launch.recorder import RunRecorder
from ncclbench.launch.watchdog.attribution import Fault
from ncclbench.measure.sampling import Samples
from ncclbench.plan.plan import parse_plan
from ncclbench.store import events
from ncclbench.store.run_directory import read_run
from ncclbench.store.run_writer import RunWriter
from tests.helpers.recorders import PLAN, RememberingListener, measured, opened, planned_manifest, prepared_run


def test_result_after_a_fault_is_not_written(tmp_path: Path) -> None:
    recorder, _ = opened(tmp_path / "run")
    recorder.begin(0, PLAN.cases[0])
    recorder.fault(Fault("failed", (), "interrupted by SIGTERM", 0))
    late = threading.Thread(target=lambda: recorder.finish(measured(0)), daemon=True)
    late.start()
    late.join(0.2)
    assert late.is_alive(), "the measuring thread blocks until its process ends"
    run = read_run(tmp_path / "run")
    assert [record.status for record in run.records] == ["failed"]
    assert [event.kind for event in run.events] == ["start", "case", "result", "lost", "end"]


def test_only_the_first_fault_is_written(tmp_path: Path) -> None:
    recorder, listener = opened(tmp_path / "run")
    recorder.begin(0, PLAN.cases[0])
    assert recorder.fault(Fault("timeout", (1,), "rank 1 hangs", 0)) is Exit.ENVIRONMENT
    recorder.fault(Fault("failed", (0,), "rank 0 noticed", 0))
    (record,) = read_run(tmp_path / "run").records
    assert (record.status, record.ranks) == ("timeout", [1])
    assert listener.error is not None
    assert "rank 1 hangs" in listener.error


@pytest.mark.parametrize(
    "fault",
    [
        Fault("failed", (0,), "rank 0 died", 1),
        Fault("timeout", (1,), "no progress for 3 s", 0),
        Fault("failed", (), "interrupted by SIGINT", 0),
        Fault("failed", (), "interrupted: the launching process is gone", 0),
    ],
    ids=lambda fault: fault.reason,
)
def test_resume_repeats_the_interrupted_case(fault: Fault, tmp_path: Path) -> None:
    path = tmp_path / "run"
    recorder, _ = opened(path)
    recorder.begin(0, PLAN.cases[0])
    recorder.finish(measured(0))
    recorder.begin(1, PLAN.cases[1])
    assert recorder.fault(fault) is Exit.ENVIRONMENT
    first, second = read_run(path).records
    assert (second.status, second.reason) == (fault.status, fault.reason)
    del recorder

    recorder = RunRecorder(prepared_run(path, RememberingListener(), resume=True))
    assert recorder.open(planned_manifest()) == {first.case}, "which need not be measured again"
    recorder.begin(1, PLAN.cases[1])
    recorder.finish(measured(1))
    assert recorder.end() is Exit.GOOD
    run = read_run(path)
    assert [record.status for record in run.records] == ["ok", "ok"]
    assert run.records[0] == first
    assert [event.case for event in run.events if event.kind == "case"] == [first.case, second.case, second.case]
    assert events.broken_link(path / "events.jsonl") is None


def test_wrong_data_are_more_severe_than_a_fault(tmp_path: Path) -> None:
    recorder, listener = opened(tmp_path / "run")
    recorder.begin(0, PLAN.cases[0])
    recorder.finish(measured(0, "wrong"))
    recorder.begin(1, PLAN.cases[1])
    assert recorder.fault(Fault("failed", (1,), "rank 1 died", 1)) is Exit.WRONG_DATA
    assert listener.code is Exit.WRONG_DATA
    assert read_run(tmp_path / "run").events[-1].exit_code == Exit.WRONG_DATA


def test_rank_1_ends_only_a_run_that_rank_0_left_open(tmp_path: Path) -> None:
    recorder, _ = opened(tmp_path / "run")
    recorder.begin(1, PLAN.cases[1])
    successor = RunRecorder(recorder.prepared)
    successor.take_over(1)
    successor.fault(Fault("failed", (0,), "rank 0 died", 1))
    (record,) = read_run(tmp_path / "run").records
    assert (record.case, record.ranks) == (PLAN.cases[1].case.id, [0])
    late = RunRecorder(recorder.prepared)
    late.take_over(1)
    late.fault(Fault("failed", (0,), "rank 0 died", 1))
    assert len((tmp_path / "run/results.jsonl").read_bytes().splitlines()) == 1


@pytest.mark.parametrize("by_rank_1", [False, True])
def test_unfinished_case_records_staged(by_rank_1: bool, tmp_path: Path) -> None:
    listener = RememberingListener()
    recorder = RunRecorder(prepared_run(tmp_path / "run", listener, transport="mpi"))
    recorder.open(planned_manifest(provenance={"transport": {"staged": True}}))
    recorder.begin(0, PLAN.cases[0])
    if by_rank_1:
        recorder = RunRecorder(recorder.prepared)
        recorder.take_over(0)
    recorder.fault(Fault("timeout", (0,), "rank 0 hangs", 0))
    (record,) = read_run(tmp_path / "run").records
    assert (record.status, record.staged, record.world_size) == ("timeout", True, 2)


def test_run_of_skipped_cases_is_inconclusive(tmp_path: Path) -> None:
    recorder, listener = opened(tmp_path / "run")
    recorder.finish(measured(0, "skipped"))
    recorder.finish(measured(1, "skipped"))
    assert recorder.end() is Exit.INCONCLUSIVE
    assert listener.code is Exit.INCONCLUSIVE
    assert listener.error is not None
    assert "nothing was measured: all 2 cases were skipped" in listener.error
    assert read_run(tmp_path / "run").events[-1].exit_code == Exit.INCONCLUSIVE


def test_one_measured_case_makes_a_run_good(tmp_path: Path) -> None:
    recorder, listener = opened(tmp_path / "run")
    recorder.finish(measured(0, "skipped"))
    recorder.finish(measured(1, "ok"))
    assert recorder.end() is Exit.GOOD
    assert listener.error is None


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:50])])
def test_resume_warns_of_lost_samples(spoil: Callable[[Path], object], tmp_path: Path) -> None:
    recorder, _ = opened(tmp_path / "run")
    for number in range(2):
        samples = Samples(["total"], np.full((2, 6, 1), 1e-6), "iterations")
        recorder.finish(replace(measured(number), samples=samples))
    del recorder
    (gone,) = (tmp_path / "run/samples").glob("00001-*.parquet")
    spoil(gone)
    recorder, listener = opened(tmp_path / "run", resume=True)
    (warning,) = listener.warnings
    assert f"the samples of {PLAN.cases[1].case.id} are missing from" in warning
    assert read_run(tmp_path / "run").events[-1].kind == "warning"
    assert len(recorder.records) == 2
    whole, listener = opened(tmp_path / "other")
    whole.finish(replace(measured(0), samples=samples))
    del whole
    _, listener = opened(tmp_path / "other", resume=True)
    assert listener.warnings == []


def test_resume_accepts_a_longer_timeout(tmp_path: Path) -> None:
    opened(tmp_path / "run")
    longer = parse_plan(
        'name = "p"\n[[case]]\npattern = "all_reduce"\nbytes = ["1K", "2K"]\ntimeout = 600\n', "plan"
    ).as_record()
    assert RunWriter.resume(tmp_path / "run", planned_manifest(plan=longer)).path == tmp_path / "run"
