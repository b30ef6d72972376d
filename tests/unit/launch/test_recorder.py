"""The book is closed once: what comes afterwards is not written, whoever it comes from."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ncclbench.errors import Exit
from ncclbench.launch.recorder import Book, Job
from ncclbench.launch.watchdog.attribution import Fault
from ncclbench.measure.case import Measurement
from ncclbench.measure.sampling import Samples
from ncclbench.plan.plan import parse_plan
from ncclbench.store import events
from ncclbench.store.records import Record, Status
from ncclbench.store.run_directory import RunWriter, read_run

PLAN = parse_plan('name = "p"\n[[case]]\npattern = "all_reduce"\nbytes = ["1K", "2K"]\n', "plan")
MANIFEST: dict[str, Any] = {"schema": 1, "plan": PLAN.as_record(), "transport": "gloo", "topology": {}, "world_size": 2}


class Ear:
    """Hears what a listener is told."""

    def __init__(self) -> None:
        self.run: Path | None = None
        self.records: list[Record] = []
        self.warnings: list[str] = []
        self.code: Exit | None = None
        self.error: str | None = None

    def started(self, run: Path, cases: int, finished: int, header: Mapping[str, Any]) -> None: ...

    def warned(self, text: str) -> None:
        self.warnings.append(text)

    def began(self, number: int, case: str) -> None: ...

    def finished(self, record: Record) -> None: ...

    def ended(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        self.run, self.records, self.code, self.error = run, records, code, error


def opened(path: Path, *, resume: bool = False) -> tuple[Book, Ear]:
    ear = Ear()
    job = Job(plan=PLAN, transport="gloo", out=path, resume=resume, command=[], listener=ear)
    book = Book(job)
    book.open(MANIFEST)
    return book, ear


def measured(number: int, status: Status = "ok") -> Measurement:
    case = PLAN.cases[number].case
    record = Record(
        case=case.id,
        pattern="all_reduce",
        transport="gloo",
        timing="isolated",
        dtype="float32",
        bytes=case.nbytes,
        world_size=2,
        status=status,
        started="2026-01-01T00:00:00Z",
    )
    return Measurement(record)


def test_a_result_that_comes_after_a_fault_is_not_written(tmp_path: Path) -> None:
    book, _ = opened(tmp_path / "run")
    book.begin(0, PLAN.cases[0])
    book.fault(Fault("failed", (), "interrupted by SIGTERM", 0))
    late = threading.Thread(target=lambda: book.finish(measured(0)), daemon=True)
    late.start()
    late.join(0.2)
    assert late.is_alive(), "the measuring thread waits for the end of its process"
    run = read_run(tmp_path / "run")
    assert [record.status for record in run.records] == ["failed"]
    assert [event["kind"] for event in run.events] == ["start", "case", "result", "lost", "end"]


def test_only_the_first_fault_is_written(tmp_path: Path) -> None:
    book, ear = opened(tmp_path / "run")
    book.begin(0, PLAN.cases[0])
    assert book.fault(Fault("timeout", (1,), "rank 1 hangs", 0)) is Exit.ENVIRONMENT
    book.fault(Fault("failed", (0,), "rank 0 noticed", 0))
    (record,) = read_run(tmp_path / "run").records
    assert (record.status, record.ranks) == ("timeout", [1])
    assert ear.error is not None
    assert "rank 1 hangs" in ear.error


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
def test_a_run_goes_on_with_the_case_in_which_it_ended_however_it_did(fault: Fault, tmp_path: Path) -> None:
    path = tmp_path / "run"
    book, _ = opened(path)
    book.begin(0, PLAN.cases[0])
    book.finish(measured(0))
    book.begin(1, PLAN.cases[1])
    assert book.fault(fault) is Exit.ENVIRONMENT
    first, second = read_run(path).records
    assert (second.status, second.reason) == (fault.status, fault.reason)
    del book

    book = Book(Job(plan=PLAN, transport="gloo", out=path, resume=True, command=[], listener=Ear()))
    assert book.open(MANIFEST) == {first.case}, "which need not be measured again"
    book.begin(1, PLAN.cases[1])
    book.finish(measured(1))
    assert book.end() is Exit.GOOD
    run = read_run(path)
    assert [record.status for record in run.records] == ["ok", "ok"]
    assert run.records[0] == first
    assert [event["case"] for event in run.events if event["kind"] == "case"] == [first.case, second.case, second.case]
    assert events.broken_link(path / "events.jsonl") is None


def test_wrong_data_outweigh_a_fault(tmp_path: Path) -> None:
    book, ear = opened(tmp_path / "run")
    book.begin(0, PLAN.cases[0])
    book.finish(measured(0, "wrong"))
    book.begin(1, PLAN.cases[1])
    assert book.fault(Fault("failed", (1,), "rank 1 died", 1)) is Exit.WRONG_DATA
    assert ear.code is Exit.WRONG_DATA
    assert read_run(tmp_path / "run").events[-1]["exit_code"] == Exit.WRONG_DATA


def test_rank_1_finishes_a_book_that_rank_0_left_open_and_no_other(tmp_path: Path) -> None:
    book, _ = opened(tmp_path / "run")
    book.begin(1, PLAN.cases[1])
    successor = Book(book.job)
    successor.take_over(1)
    successor.fault(Fault("failed", (0,), "rank 0 died", 1))
    (record,) = read_run(tmp_path / "run").records
    assert (record.case, record.ranks) == (PLAN.cases[1].case.id, [0])
    late = Book(book.job)
    late.take_over(1)
    late.fault(Fault("failed", (0,), "rank 0 died", 1))
    assert len((tmp_path / "run/results.jsonl").read_bytes().splitlines()) == 1


@pytest.mark.parametrize("by_rank_1", [False, True])
def test_a_case_that_nobody_finished_says_that_it_was_staged(by_rank_1: bool, tmp_path: Path) -> None:
    ear = Ear()
    book = Book(Job(plan=PLAN, transport="mpi", out=tmp_path / "run", resume=False, command=[], listener=ear))
    book.open({**MANIFEST, "provenance": {"transport": {"staged": True}}})
    book.begin(0, PLAN.cases[0])
    if by_rank_1:
        book = Book(book.job)
        book.take_over(0)
    book.fault(Fault("timeout", (0,), "rank 0 hangs", 0))
    (record,) = read_run(tmp_path / "run").records
    assert (record.status, record.staged, record.world_size) == ("timeout", True, 2)


def test_a_run_of_which_every_case_was_skipped_says_nothing_and_says_so(tmp_path: Path) -> None:
    book, ear = opened(tmp_path / "run")
    book.finish(measured(0, "skipped"))
    book.finish(measured(1, "skipped"))
    assert book.end() is Exit.INCONCLUSIVE
    assert ear.code is Exit.INCONCLUSIVE
    assert ear.error is not None
    assert "nothing was measured: all 2 cases were skipped" in ear.error
    assert read_run(tmp_path / "run").events[-1]["exit_code"] == Exit.INCONCLUSIVE


def test_one_case_that_was_measured_is_enough(tmp_path: Path) -> None:
    book, ear = opened(tmp_path / "run")
    book.finish(measured(0, "skipped"))
    book.finish(measured(1, "ok"))
    assert book.end() is Exit.GOOD
    assert ear.error is None


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:50])])
def test_samples_that_are_gone_are_warned_of_when_a_run_goes_on(
    spoil: Callable[[Path], object], tmp_path: Path
) -> None:
    book, _ = opened(tmp_path / "run")
    for number in range(2):
        samples = Samples(["total"], np.full((2, 6, 1), 1e-6), "iterations")
        book.finish(replace(measured(number), samples=samples))
    del book
    (gone,) = (tmp_path / "run/samples").glob("00001-*.parquet")
    spoil(gone)
    book, ear = opened(tmp_path / "run", resume=True)
    (warning,) = ear.warnings
    assert f"the samples of {PLAN.cases[1].case.id} are gone" in warning
    assert read_run(tmp_path / "run").events[-1]["kind"] == "warning"
    assert len(book.records) == 2
    whole, ear = opened(tmp_path / "other")
    whole.finish(replace(measured(0), samples=samples))
    del whole
    _, ear = opened(tmp_path / "other", resume=True)
    assert ear.warnings == []


def test_a_longer_timeout_may_go_on_with_the_run(tmp_path: Path) -> None:
    opened(tmp_path / "run")
    longer = parse_plan(
        'name = "p"\n[[case]]\npattern = "all_reduce"\nbytes = ["1K", "2K"]\ntimeout = 600\n', "plan"
    ).as_record()
    assert RunWriter.resume(tmp_path / "run", {**MANIFEST, "plan": longer}).path == tmp_path / "run"
