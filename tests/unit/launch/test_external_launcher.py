"""The command line of a process start under ``--launcher``, and partial allocations."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ncclbench.cli.run import command as run_command
from ncclbench.config.request_json import request_from_json
from ncclbench.errors import Exit, UsageError
from ncclbench.launch.external_launcher import (
    ExternalLauncher,
    launcher_line,
    launcher_words,
    refuse_partial_allocation,
)
from ncclbench.launch.next_start_command import next_command
from ncclbench.launch.request import RunRequest

PYTHON = f"{sys.executable} -m ncclbench"


@pytest.mark.parametrize(
    ("launcher", "line"),
    [
        ("srun -N2 --ntasks-per-node=8", f"srun -N2 --ntasks-per-node=8 {PYTHON} run"),
        ("mpirun -n 16", f"mpirun -n 16 {PYTHON} run"),
        ("torchrun --nproc-per-node 8", "torchrun --nproc-per-node 8 -m ncclbench run"),
        ("srun -N2 /opt/bin/torchrun --nnodes 2", "srun -N2 /opt/bin/torchrun --nnodes 2 -m ncclbench run"),
        ("python3 -m torch.distributed.run", "python3 -m torch.distributed.run -m ncclbench run"),
        ("torchrun --no-python", f"torchrun --no-python {PYTHON} run"),
        ("srun --container-image=x ncclbench", "srun --container-image=x ncclbench run"),
        ("torchrun -m ncclbench", "torchrun -m ncclbench run"),
        ("srun /opt/venv/bin/ncclbench", "srun /opt/venv/bin/ncclbench run"),
    ],
)
def test_command_line_of_each_launcher(launcher: str, line: str) -> None:
    assert launcher_line(launcher_words(launcher), ["run"]) == line.split()


def test_launcher_is_split_like_a_shell() -> None:
    assert launcher_words("srun --comment 'a b'") == ["srun", "--comment", "a b"]
    for text in ("", "  ", "'"):
        with pytest.raises(UsageError, match="--launcher"):
            launcher_words(text)


@pytest.mark.parametrize("given", [["--launcher", "srun -N2"], ["--launcher=srun -N2"]])
def test_rank_request_has_no_launcher(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks' command line is one request; --launcher remains only in the command for the manifest."""
    started: list[list[str]] = []

    def start(_launcher: ExternalLauncher, arguments: list[str], _out: Path) -> Exit:
        started.append(arguments)
        return Exit.ENVIRONMENT

    monkeypatch.setattr(ExternalLauncher, "start", start)
    monkeypatch.setattr("sys.argv", ["ncclbench", "run", "all_reduce", *given])
    line = ["all_reduce", "--transport", "gloo", *given, "-o", str(tmp_path / "run")]
    assert CliRunner().invoke(run_command, line).exit_code == Exit.ENVIRONMENT
    ((command, option, text),) = started
    assert (command, option) == ("run", "--request")
    told = request_from_json(text, RunRequest)
    assert (told.launcher, told.patterns, told.one_of_several) == (None, ("all_reduce",), True)
    assert told.command == ("run", "all_reduce", *given)


@pytest.mark.parametrize("given", [["--process-start", "1"], ["--process-start=1"]])
def test_next_command_drops_process_start_in_both_spellings(given: list[str]) -> None:
    line = ["run", "--plan", "p", *given, "-o", "x", "--", "--process-start"]
    assert next_command("flux", line, Path("x"), {}).endswith("ncclbench run --plan p -o x --resume -- --process-start")


@pytest.mark.parametrize(
    ("line", "more"), [("run -n 3", "-- all_reduce"), ("run all_reduce", ""), ("run", "-- all_reduce -- --out")]
)
def test_next_command_adds_options_before_two_dashes(line: str, more: str) -> None:
    whole = [*line.split(), *more.split()]
    said = next_command("flux", whole, Path("x"), {})
    assert said.endswith(f"ncclbench {line} -o x --resume {more}".rstrip())


def test_partial_slurm_allocation_is_refused() -> None:
    inside = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "18"}
    with pytest.raises(UsageError, match=r"allocation has 18 nodes.*--launcher 'srun.*--nproc N"):
        refuse_partial_allocation(inside)
    for other in ({}, {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1"}, {"SLURM_JOB_NUM_NODES": "18"}):
        refuse_partial_allocation(other)
