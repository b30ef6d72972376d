"""Starts that are missing, lost or share processes; impossible samples."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from ncclbench.accept.example_runs import write_example
from ncclbench.errors import Exit
from ncclbench.store.records import Record
from ncclbench.store.run_directory import read_run
from ncclbench.store.samples import write_samples
from ncclbench.store.verdict import Action, Verdict
from tests.helpers.acceptance import NODE, RAIL, WORLD, example, made, of, only, verdict_on

pytestmark = pytest.mark.usefixtures("unsynced")


def test_empty_run_is_not_run_with_the_environment_exit_code(tmp_path: Path) -> None:
    path = write_example(tmp_path / "made", example(made=0))
    document = verdict_on(path)
    assert (document.verdict, document.exit_code) == (Verdict.NOT_RUN, Exit.INCONCLUSIVE)
    assert "no case was measured" in document.reasons
    assert document.starts.present == 0


def test_run_of_only_skipped_cases_measured_nothing(tmp_path: Path) -> None:
    def edit(record: Record) -> Record:
        return msgspec.structs.replace(record, status="skipped", reason="needs GPUs", time_us=None, gpus=[], groups=[])

    document = made(tmp_path, edit=edit)
    assert (document.verdict, document.exit_code) == (Verdict.NOT_RUN, Exit.INCONCLUSIVE)


def test_missing_start_is_inconclusive(tmp_path: Path) -> None:
    document = made(tmp_path, made=2)
    assert (document.verdict, document.exit_code) == (Verdict.INCONCLUSIVE, Exit.INCONCLUSIVE)
    assert (document.starts.declared, document.starts.present) == (3, 2)
    (result,) = [r for r in of(document, "starts", Verdict.INCONCLUSIVE) if r.subject == "start 2"]
    assert "not been made yet" in result.reason


def test_plan_of_one_start_gives_no_verdict_on_performance(tmp_path: Path) -> None:
    document = made(tmp_path, starts=1)
    assert document.verdict is Verdict.INCONCLUSIVE
    assert "declares 1 process start" in of(document, "starts", Verdict.INCONCLUSIVE)[0].reason
    floors = of(document, "floor", Verdict.INCONCLUSIVE)
    assert [r.subject for r in floors] == [NODE.id, RAIL.id, WORLD.id]
    assert all("measured in 1 process start, needs 3" in r.reason for r in floors)


def test_killed_start_is_an_environment_fault(run: Path) -> None:
    """SIGKILL during the last start: half of the last line of results, and no `end` event."""
    results = (run / "results.jsonl").read_bytes()
    (run / "results.jsonl").write_bytes(results[: len(results) - 200])
    lines = (run / "events.jsonl").read_bytes().splitlines()[:-2]
    (run / "events.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    document = verdict_on(run)
    assert (document.verdict, document.exit_code) == (Verdict.INCONCLUSIVE, Exit.ENVIRONMENT)
    assert document.starts.present == 2
    (result,) = [r for r in of(document, "starts", Verdict.INCONCLUSIVE) if r.cause]
    assert "was cut off: 1 case missing" in result.reason


def failed_third(record: Record) -> Record:
    if (record.start, record.case) != (2, WORLD.id):
        return record
    return msgspec.structs.replace(
        record, status="failed", reason="rank 5 died", ranks=[5], time_us=None, skew_us=None, groups=[], gpus=[]
    )


def test_lost_rank_is_an_environment_fault_and_is_named(tmp_path: Path) -> None:
    document = made(tmp_path, edit=failed_third)
    assert document.exit_code == Exit.ENVIRONMENT
    (result,) = [r for r in of(document, "starts", Verdict.INCONCLUSIVE) if r.cause]
    assert result.action is Action.ISOLATE
    assert "rank 5 died" in result.reason


def test_resumed_start_that_lost_a_rank_is_inconclusive(run: Path) -> None:
    from ncclbench.store.run_writer import RunWriter

    RunWriter(run).event("lost", start=1, ranks=[5], reason="rank 5 died")
    document = verdict_on(run)
    assert document.verdict is Verdict.INCONCLUSIVE
    assert "a start that failed counts" in only(document, "starts", Verdict.INCONCLUSIVE).reason


def test_interruption_by_the_user_is_ignored(run: Path) -> None:
    from ncclbench.store.run_writer import RunWriter

    RunWriter(run).event("lost", start=1, ranks=[], reason="interrupted by SIGINT")
    assert verdict_on(run).verdict is Verdict.PASS


def test_starts_in_the_same_processes_are_inconclusive(run: Path) -> None:
    text = (run / "events.jsonl").read_text()
    pids = [json.loads(line)["pids"] for line in text.splitlines() if '"kind":"start"' in line]
    text = text.replace(json.dumps(pids[2], separators=(",", ":")), json.dumps(pids[0], separators=(",", ":")))
    (run / "events.jsonl").write_text(text)
    assert "the very processes of start 0" in only(verdict_on(run), "starts", Verdict.INCONCLUSIVE).reason


def test_starts_with_equal_pids_in_containers_are_distinct(run: Path) -> None:
    text = (run / "events.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for number, event in enumerate(event for event in lines if event["kind"] == "start"):
        event["pids"], event["process"] = [7] * 64, f"mark {number}"
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in lines))
    assert verdict_on(run).verdict is Verdict.PASS


BAD_SAMPLES = {
    "NaN": np.nan,
    "infinite": np.inf,
    "negative": -1e-3,
    "zero": 0.0,
}


@pytest.mark.parametrize("what", BAD_SAMPLES)
def test_impossible_samples_are_inconclusive_and_named(what: str, run: Path) -> None:
    """A file of another program may hold any value; ncclbench leaves out missing samples."""
    samples = read_run(run).records[0].samples
    assert samples is not None
    table = pq.read_table(run / samples)
    seconds = table.column("seconds").to_numpy().copy()
    seconds[7 * 60 + 11] = BAD_SAMPLES[what]
    pq.write_table(table.set_column(3, "seconds", pa.array(seconds, from_pandas=False)), run / samples)
    (result,) = of(verdict_on(run), "samples", Verdict.INCONCLUSIVE)
    assert f"1 {what} samples, the first of rank 7 in iteration 11" in result.reason


def _damage_samples(run: Path, damage: Callable[[NDArray[np.float64]], None]) -> None:
    from ncclbench.accept.impossible_samples import read_total

    record = read_run(run).records[0]
    assert record.samples is not None
    seconds = read_total(run / record.samples)[:, :, None].copy()
    damage(seconds)
    write_samples(run / record.samples, ["total"], seconds)


def test_samples_that_contradict_their_record(run: Path) -> None:
    def damage(seconds: NDArray[np.float64]) -> None:
        seconds *= 1.01

    _damage_samples(run, damage)
    assert "its samples say" in of(verdict_on(run), "samples", Verdict.INCONCLUSIVE)[0].reason


@pytest.mark.parametrize("content", [None, b"", b"PAR1 no, not really PAR1"])
def test_missing_or_invalid_samples_file(content: bytes | None, run: Path) -> None:
    samples = read_run(run).records[0].samples
    assert samples is not None
    if content is None:
        (run / samples).unlink()
    else:
        (run / samples).write_bytes(content)
    assert "no readable samples" in of(verdict_on(run), "samples", Verdict.INCONCLUSIVE)[0].reason


def test_judging_reads_samples_without_pandas(healthy: Path) -> None:
    """Importing pandas would take longer than judging a short run."""
    code = (
        "import sys; from pathlib import Path; from ncclbench.store.run_directory import read_run;"
        "from ncclbench.accept.check_context import CheckContext; from ncclbench.accept.judge import judge;"
        "from ncclbench.accept.profile import load_profile;"
        "judge(CheckContext(read_run(Path(sys.argv[1])), load_profile('h100-hgx-ib'))); print('pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(healthy)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
