"""Several process starts: which are made, which are missing, and when no further one is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ncclbench.cli.progress import JsonListener
from ncclbench.errors import EnvironmentFault, Exit, UsageError
from ncclbench.launch import execution
from ncclbench.launch import next_start_command as next_command
from ncclbench.launch.process_starts import StartMissing, make_starts
from ncclbench.launch.rank_session import refuse_disagreement
from ncclbench.launch.recorder import RunRecorder
from ncclbench.launch.request import RunRequest
from ncclbench.launch.signals import forwarded
from ncclbench.store.run_directory import read_run
from ncclbench.store.run_writer import RunWriter
from ncclbench.transports.threads import ThreadTransport, play
from tests.helpers.recorders import PLAN, RememberingListener, planned_manifest, prepared_run


def made(
    path: Path, outcomes: list[Exit | StartMissing], on_start: Callable[[], object] = lambda: None
) -> tuple[Any, Any]:
    """The exit code of `make_starts`, and the process starts that it made."""
    asked = []

    def one(start: int) -> Exit:
        asked.append(start)
        outcome = outcomes[asked[-1]]
        on_start()
        if isinstance(outcome, StartMissing):
            raise outcome
        if not (path / "manifest.json").exists():
            RunWriter.create(path, planned_manifest())
        return outcome

    return make_starts(path, 0, len(outcomes), one, lambda _text: None), asked


def test_next_start_is_made_after_a_missing_one(tmp_path: Path) -> None:
    refused = StartMissing("no node left")
    assert made(tmp_path / "a", [refused, Exit.GOOD, refused]) == (Exit.ENVIRONMENT, [0, 1, 2])
    with pytest.raises(StartMissing, match="no node left, in all 2 process starts"):
        made(tmp_path / "b", [refused, refused])


def test_no_start_follows_a_usage_error_or_a_signal(tmp_path: Path) -> None:
    assert made(tmp_path / "a", [Exit.USAGE, Exit.GOOD]) == (Exit.USAGE, [0])
    try:
        assert made(tmp_path / "b", [Exit.GOOD, Exit.GOOD], lambda: forwarded.append(15)) == (Exit.GOOD, [0])
    finally:
        forwarded.clear()


def test_another_plans_run_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    RunWriter.create(tmp_path / "run", planned_manifest())
    monkeypatch.setattr(execution, "start_in_child_process", lambda _arguments: Exit.USAGE)
    (tmp_path / "p.toml").write_text('name = "p"\nstarts = 2\n[[case]]\npattern = "all_reduce"\nbytes = ["1K", "2K"]\n')
    request = RunRequest(
        plan=str(tmp_path / "p.toml"), transport="threads", nproc=2, out=tmp_path / "run", resume=True, results="json"
    )
    assert execution.execute(request, JsonListener()).exit_code is Exit.USAGE
    assert capsys.readouterr().out == "", "the failed process start has printed the JSON line"


@pytest.mark.parametrize("one_of_several", [True, False])
def test_later_start_begins_a_run_only_after_missing_starts(one_of_several: bool, tmp_path: Path) -> None:
    path, plan = tmp_path / "run", replace(PLAN, starts=2)
    recorder = RunRecorder(prepared_run(path, RememberingListener(), plan=plan, start=1, one_of_several=one_of_several))
    if not one_of_several:
        with pytest.raises(UsageError, match="make process start 1 first"):
            recorder.open(planned_manifest())
        return
    recorder.open(planned_manifest(plan=plan.as_record()))
    assert read_run(path).open_start == 0


def test_ranks_with_different_process_starts_are_refused(tmp_path: Path) -> None:
    prepared = prepared_run(tmp_path, RememberingListener(), plan=replace(PLAN, starts=2), transport="threads")

    def main(transport: ThreadTransport) -> str:
        with pytest.raises(EnvironmentFault) as refused:
            refuse_disagreement(replace(prepared, start=transport.rank or None), transport)
        return str(refused.value)

    said = play(2, main, 20.0)
    assert set(said) == {"rank 1 has process start 2, rank 0 has the next that is missing: start all alike"}


def test_prterun_is_shown_as_mpirun() -> None:
    assert next_command.command_as_typed(["/opt/bin/prterun", "-n", "2"]) == ["/opt/bin/mpirun", "-n", "2"]
    assert next_command.command_as_typed(["prterun", "-n", "2"]) == ["mpirun", "-n", "2"]
    assert next_command.command_as_typed(["srun", "-N2", "prterun"]) == ["srun", "-N2", "prterun"]
