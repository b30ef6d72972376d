"""Robustness: two writers, unusual targets and names, and errors with --json."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ncclbench.cli.report import command as report
from ncclbench.errors import UsageError
from ncclbench.plan.plan import parse_plan
from ncclbench.store.run_writer import RunWriter, check_target
from tests.helpers.stored import manifest

PLAN: dict[str, Any] = {"name": "p", "starts": 1, "cases": []}


def run_cli(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "ncclbench", *arguments], capture_output=True, text=True, timeout=60)


def test_second_writer_is_refused(tmp_path: Path) -> None:
    first = RunWriter.create(tmp_path / "run", manifest())
    with pytest.raises(UsageError, match="another ncclbench is writing"):
        RunWriter.resume(tmp_path / "run", manifest())
    del first
    assert RunWriter.resume(tmp_path / "run", manifest()).path == tmp_path / "run"


def test_directory_of_a_killed_start_is_reused(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "manifest.json.tmp").write_text("{")
    check_target(tmp_path, resume=False)
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match="not empty"):
        check_target(tmp_path, resume=False)


@pytest.mark.parametrize("name", ["x" * 300, "null\0byte", "not-text-\udcff"])
def test_impossible_directory_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        check_target(tmp_path / name, resume=False)


@pytest.mark.parametrize("name", ["/abs", "../up", "a\\nb", "", "-o", "x" * 61, ".hidden"])
def test_plan_name_is_not_a_path(name: str) -> None:
    with pytest.raises(UsageError, match="name must be"):
        parse_plan(f'name = "{name}"\n[[case]]\npattern = "all_reduce"\nbytes = 8\n', "plan")


def test_report_does_not_replace_a_pipe(tmp_path: Path) -> None:
    RunWriter.create(tmp_path / "run", manifest())
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="not a regular file"):
        report.callback((tmp_path / "run",), "table", pipe)  # type: ignore[misc]
    assert pipe.is_fifo()


def test_report_keeps_a_symbolic_link(tmp_path: Path) -> None:
    RunWriter.create(tmp_path / "run", manifest())
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    report.callback((tmp_path / "run",), "table", tmp_path / "link")  # type: ignore[misc]
    assert (tmp_path / "link").is_symlink()
    assert "no case has finished" in (tmp_path / "real").read_text()


def test_error_is_json_with_json_option() -> None:
    done = run_cli("run", "all_reducex", "--json")
    assert done.returncode == 2
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["exit_code"] == 2
    assert "all_reducex" in answer["error"]
    assert run_cli("run", "all_reducex").stdout == ""


@pytest.mark.parametrize("arguments", [("--nproc", "99999999999"), ("-n", "99999999999999999"), ("-b", "", "-e", "8")])
def test_invalid_numbers_are_refused_in_one_line(arguments: tuple[str, ...]) -> None:
    done = run_cli("run", "all_reduce", "--transport", "threads", *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
