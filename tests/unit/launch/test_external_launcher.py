"""The command line of a start under ``--launcher``, and allocations that it would be a mistake to measure in part."""

from __future__ import annotations

import sys

import pytest

from ncclbench.errors import UsageError
from ncclbench.launch.arguments import with_options, without_option
from ncclbench.launch.external_launcher import launcher_line, launcher_words, refuse_part_of_an_allocation

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
def test_each_launcher_is_given_the_program_as_it_wants_it(launcher: str, line: str) -> None:
    assert launcher_line(launcher_words(launcher), ["run"]) == line.split()


def test_words_are_those_of_a_shell() -> None:
    assert launcher_words("srun --comment 'a b'") == ["srun", "--comment", "a b"]
    for text in ("", "  ", "'"):
        with pytest.raises(UsageError, match="--launcher"):
            launcher_words(text)


@pytest.mark.parametrize("given", [["--launcher", "srun -N2"], ["--launcher=srun -N2"]])
def test_the_ranks_are_not_told_of_the_launcher(given: list[str]) -> None:
    line = ["run", "--plan", "p", *given, "-o", "x", "--", "--launcher"]
    assert without_option(line, "--launcher") == ["run", "--plan", "p", "-o", "x", "--", "--launcher"]


@pytest.mark.parametrize(
    ("line", "more"), [("run -n 3", "-- all_reduce"), ("run all_reduce", ""), ("run", "-- all_reduce -- --out")]
)
def test_options_are_added_before_the_patterns_that_stand_behind_two_dashes(line: str, more: str) -> None:
    whole = [*line.split(), *more.split()]
    assert with_options(whole, ["-o", "x"]) == [*line.split(), "-o", "x", *more.split()]


def test_a_part_of_an_allocation_is_not_measured_for_the_whole() -> None:
    inside = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "18"}
    with pytest.raises(UsageError, match=r"allocation of 18 nodes.*--launcher 'srun.*--nproc N"):
        refuse_part_of_an_allocation(inside)
    for other in ({}, {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1"}, {"SLURM_JOB_NUM_NODES": "18"}):
        refuse_part_of_an_allocation(other)
