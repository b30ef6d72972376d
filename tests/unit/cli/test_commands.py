"""The command line: invalid input gives one line on stderr, the right exit code and no traceback."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ncclbench import __version__
from ncclbench.cli import main
from ncclbench.config.plugins import names
from ncclbench.config.shipped_files import MODELS
from ncclbench.errors import Exit, worst
from ncclbench.moe.model_presets import read_model
from ncclbench.store.run_directory import read_run
from ncclbench.store.run_writer import RunWriter
from tests.helpers.stored import manifest

LAUNCHER_PREFIXES = ("OMPI_", "PMI_", "MPI_LOCAL", "SLURM_", "FLUX_", "NCCLBENCH_", "GROUP_", "TORCHELASTIC_")
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

Result = tuple[int, str, str]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove launcher variables, and change to a temporary directory, so that the checkout stays clean."""
    for name in list(os.environ):
        if name.startswith(LAUNCHER_PREFIXES) or name in LAUNCHER_NAMES:
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ncclbench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Call the program in this process; returns exit code, stdout and stderr."""

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["ncclbench", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        assert isinstance(left.value.code, int)
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return call


@pytest.fixture
def refused(ncclbench: Callable[..., Result]) -> Callable[..., str]:
    """Call the program, check that it refuses, and return its error line."""

    def call(*arguments: str, code: Exit = Exit.USAGE) -> str:
        left, out, err = ncclbench(*arguments)
        assert left == code, err
        assert out == ""
        assert err.startswith("ncclbench: error: ")
        assert err.count("\n") == 1, err
        assert err.endswith("\n")
        assert "Traceback" not in err
        return err

    return call


def python_m_ncclbench(
    *arguments: str, env: dict[str, str] | None = None, options: tuple[str, ...] = ()
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *options, "-m", "ncclbench", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **(env or {})},
    )


SMALL = ("-b", "8", "-e", "8", "--transport", "threads", "--nproc", "2")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rnu",), "no command 'rnu'; did you mean 'run'? there are: run, "),
        (("--fast",), "--fast"),
        (("run",), "name a pattern (see `ncclbench list patterns`) or a plan with --plan"),
        (("run", "all_redcue"), "no pattern 'all_redcue'; did you mean 'all_reduce'?"),
        (("run", "all_reduce", "reduc"), "no pattern 'reduc'; did you mean 'reduce'?"),
        (("run", "all_reduce", "--transprot", "gloo"), "--transprot"),
        (("run", "all_reduce", "--transport", "glu"), "no transport 'glu'; did you mean 'gloo'? there are: auto"),
        (("run", "all_reduce", "--transport", "thread"), "did you mean 'threads'?"),
        (("run", "all_reduce", "--dtype", "float31"), "no dtype 'float31'; there are: float32"),
        (
            ("run", "all_reduce", "--timing", "isolatd"),
            "did you mean 'isolated'? there are: pipelined, isolated, graph",
        ),
        (
            ("run", "all_reduce", "--param", "redpo=max"),
            "no parameter 'redpo'; did you mean 'redop'? there are: redop, group",
        ),
        (("run", "all_reduce", "--param", "redop=mean"), "redop"),
        (("run", "all_reduce", "--param", "redop"), "--param must be NAME=VALUE, got 'redop'"),
        (("run", "all_reduce", "--param", "=max"), "--param must be NAME=VALUE, got '=max'"),
        (("run", "all_reduce", "--param", "redop=max", "--param", "redop=min"), "--param redop is given twice"),
        (("run", "broadcast", "--param", "root=first"), "root"),
        (("run", "all_reduce", "--param", "group=pod", *SMALL), "no group 'pod'; there are: world, node"),
        (("run", "all_reduce", "-b", "1Q"), "got '1Q'"),
        (("run", "all_reduce", "-b", "0"), "got '0'"),
        (("run", "all_reduce", "-b", "-8"), "got '-8'"),
        (("run", "all_reduce", "-e", "lots"), "got 'lots'"),
        (("run", "all_reduce", "-b", "0.3"), "whole number of bytes"),
        (("run", "all_reduce", "-b", "1M", "-e", "1K"), "min_bytes 1048576 is above max_bytes 1024"),
        (("run", "all_reduce", "-f", "1", *SMALL), "factor must be above 1"),
        (("run", "all_reduce", "-f", "0", *SMALL), "factor must be above 1"),
        (("run", "all_reduce", "-f", "inf", *SMALL), "factor"),
        (("run", "all_reduce", "-f", "two"), "'two' is not a valid float"),
        (("run", "all_reduce", "-n", "0"), "iterations must be at least 1"),
        (("run", "all_reduce", "-n", "many"), "'many' is not a valid integer"),
        (("run", "all_reduce", "-w", "-1"), "warmup must be at least 0"),
        (("run", "all_reduce", "--precision", "-1"), "precision must be at least 0"),
        (("run", "all_reduce", "--max-seconds", "-1"), "max_seconds must be at least 0"),
        (("run", "all_reduce", "--max-seconds", "inf", *SMALL), "max_seconds"),
        (("run", "all_reduce", "--timeout", "-1"), "timeout must be"),
        (("run", "all_reduce", "--timeout", "0", *SMALL), "timeout must be"),
        (("run", "all_reduce", "--timeout", "1e300", *SMALL), "timeout must be at most 604800, got 1e+300"),
        (
            ("run", "--plan", "accept-cpu", "--nproc", "2", "--process-start", "2", "-o", "new"),
            "--process-start 2: there is no run in new: make process start 1 first",
        ),
        (("run", "all_reduce", "--nproc", "0", "-e", "8"), "--nproc must be 1 to 1024, got 0"),
        (("run", "all_reduce", "--nproc", "-2", "-e", "8"), "--nproc must be 1 to 1024, got -2"),
        (("run", "all_reduce", "--resume"), "--resume needs -o RUN"),
        (("run", "all_reduce", "all_reduce", *SMALL), "is given twice"),
        (("run", "--plan", "quik"), "no plan 'quik'; did you mean 'quick'?"),
        (("run", "--plan", "none.toml"), "cannot read the plan none.toml"),
        (("run", "--plan", "quick", "nothing"), "quick has no case of nothing"),
        (("run", "--plan", "quick", "-b", "8"), "-b does not go with --plan"),
        (("run", "--plan", "quick", "--dtype", "int32"), "--dtype does not go with --plan"),
        (("report",), "RUN"),
        (("report", "nowhere"), "nowhere is no run directory"),
        (("list", "pattens"), "'pattens' is not one of"),
        (("list",), "patterns"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_code_2(
    arguments: tuple[str, ...], words: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    assert words in refused(*arguments)
    assert not list(tmp_path.iterdir())  # nothing was written


def test_case_larger_than_memory_is_refused_before_start(refused: Callable[..., str]) -> None:
    message = refused(
        "run", "all_reduce", "-b", "8", "-e", "8T", "-f", str(1 << 40), "--nproc", "4", "--transport", "threads"
    )
    assert "needs 96.0 TiB on this node (4 ranks x 24.0 TiB)" in message
    assert "256.0 MiB a rank is kept for libraries: lower --max-bytes or --nproc" in message


def test_a_case_larger_than_memory_in_a_plan(refused: Callable[..., str], tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('name = "p"\n[[case]]\npattern = "gather"\nbytes = "4T"\n')
    assert "gather/float32/4398046511104/isolated needs" in refused("run", "--plan", str(plan), "--nproc", "2")


def test_misspelled_plan_key_names_the_nearest(refused: Callable[..., str], tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('name = "p"\n[[case]]\npatern = "gather"\nbytes = "4K"\n')
    assert f"{plan}: unknown key case[0].patern; did you mean 'pattern'?" in refused("run", "--plan", str(plan))


def test_output_directory_that_is_not_empty(refused: Callable[..., str], tmp_path: Path) -> None:
    target = tmp_path / "run"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    message = refused("run", "all_reduce", *SMALL, "-o", str(target))
    assert f"-o {target} is not empty; name another directory, or go on with --resume" in message
    assert [path.name for path in target.iterdir()] == ["notes.txt"]


def test_output_directory_that_is_a_file_or_below_one(refused: Callable[..., str], tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("mine")
    assert f"-o {target} is a file" in refused("run", "all_reduce", *SMALL, "-o", str(target))
    assert f"{target} is a file" in refused("run", "all_reduce", *SMALL, "-o", str(target / "run"))
    assert target.read_text() == "mine"


def test_output_directory_without_permission(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "readonly"
    target.mkdir()
    target.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.geteuid() == 0:  # root may write there; simulate the kernel's answer to other users
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != target or not mode & os.W_OK)
    message = refused("run", "all_reduce", *SMALL, "-o", str(target / "run"))
    assert f"no permission to write in {target}" in message


def test_output_directory_that_cannot_be_created(refused: Callable[..., str]) -> None:
    # No user can create a directory in /proc, but access(2) permits it for root.
    codes = (Exit.USAGE, Exit.ENVIRONMENT)
    target = "/proc/ncclbench-run"
    message = refused("run", "all_reduce", *SMALL, "-o", target, code=codes[os.geteuid() == 0])
    assert "/proc" in message


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_nothing_to_resume(kind: str, refused: Callable[..., str], tmp_path: Path) -> None:
    target = tmp_path / "run"
    if kind == "empty":
        target.mkdir()
    message = refused("run", "all_reduce", *SMALL, "-o", str(target), "--resume")
    assert f"{target} is no run directory" in message


def test_another_plan_is_not_resumed(ncclbench: Callable[..., Result], refused: Callable[..., str]) -> None:
    assert ncclbench("run", "all_reduce", *SMALL, "-n", "6", "-o", "run")[0] == 0
    before = Path("run/results.jsonl").read_bytes()
    message = refused("run", "all_reduce", *SMALL, "-n", "7", "-o", "run", "--resume")
    assert "cannot resume run: plan.cases[0].settings.iterations was 6, and now is 7" in message
    message = refused("run", "all_reduce", *SMALL[:-1], "3", "-n", "6", "-o", "run", "--resume")
    assert "cannot resume run: " in message
    assert Path("run/results.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "torchrun has set RANK, WORLD_SIZE but not LOCAL_RANK"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "openmpi has set OMPI_COMM_WORLD_RANK but not OMPI_COMM_WORLD_SIZE"),
        (
            {"SLURM_STEP_NUM_TASKS": "two", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            "SLURM_STEP_NUM_TASKS must be a whole number, and is 'two'",
        ),
        (
            {"NCCLBENCH_STORE": "abc", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            "NCCLBENCH_STORE must be HOST:PORT, and is 'abc': unset it",
        ),
    ],
)
def test_broken_launch_is_an_environment_fault(
    variables: dict[str, str], words: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert words in refused("run", "all_reduce", code=Exit.ENVIRONMENT)


JOINED = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


def test_nproc_does_not_go_with_a_launcher(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in JOINED.items():
        monkeypatch.setenv(name, value)
    assert "--nproc is for a start without a launcher" in refused("run", "all_reduce", "-e", "8", "--nproc", "2")


def test_threads_are_not_started_by_a_launcher(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in JOINED.items():
        monkeypatch.setenv(name, value)
    assert "torchrun has started: leave the launcher out" in refused("run", "all_reduce", "--transport", "threads")


@pytest.mark.parametrize("starts", [1, 2])
def test_run_directory_is_printed_as_given(starts: int, ncclbench: Callable[..., Result]) -> None:
    plan = f'name = "p"\nstarts = {starts}\n[[case]]\npattern = "all_reduce"\nbytes = 8\niterations = 4\n'
    Path("p.toml").write_text(plan)
    code, out, err = ncclbench("run", "--plan", "p.toml", "--transport", "threads", "--nproc", "2", "-o", "r/../run")
    assert code == 0, err
    assert out.splitlines()[-1] == "run directory: r/../run"


def test_process_starts_record_the_users_command(ncclbench: Callable[..., Result]) -> None:
    """The request for the processes is not recorded."""
    Path("p.toml").write_text('name = "p"\nstarts = 2\n[[case]]\npattern = "all_reduce"\nbytes = 8\niterations = 4\n')
    typed = ("run", "--plan", "p.toml", "--transport", "threads", "--nproc", "2", "-o", "run", "--json")
    code, out, err = ncclbench(*typed)
    assert code == 0, err
    assert len(json.loads(out)["records"]) == 2
    run = read_run(Path("run"))
    assert run.manifest.provenance.command[1:] == list(typed)
    assert [event.command for event in run.events if event.kind == "start"] == [list(typed)] * 2


@pytest.mark.parametrize("rank", ["0", "1"])
def test_usage_error_is_printed_once_per_job(
    rank: str, ncclbench: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (JOINED | {"RANK": rank, "LOCAL_RANK": rank}).items():
        monkeypatch.setenv(name, value)
    code, _, err = ncclbench("run", "all_redcue")
    assert code == Exit.USAGE
    assert err.count("\n") == (1 if rank == "0" else 0)


def test_usage_error_of_one_rank_is_printed_by_it(
    ncclbench: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If rank 0 had the same error, the launcher would have ended this rank with it."""
    monkeypatch.setattr("ncclbench.launch.signals.time.sleep", lambda _seconds: None)
    for name, value in (JOINED | {"RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}).items():
        monkeypatch.setenv(name, value)
    code, _, err = ncclbench("run", "all_redcue")
    assert code == Exit.USAGE
    assert err.startswith("ncclbench: error: rank 1: ")
    assert "no pattern 'all_redcue'" in err


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which the import system does not find torch."""
    folder = tmp_path / "hidden"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch' or name.startswith('torch.'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "        return None\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'torch' else real(name, package)\n"
    )
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))}


@pytest.mark.parametrize("transport", ["gloo", "nccl"])
def test_missing_torch_names_the_pip_command(transport: str, without_torch: dict[str, str]) -> None:
    done = python_m_ncclbench("run", "all_reduce", "-e", "8", "--transport", transport, env=without_torch)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.count("\n") == 1
    assert f"the {transport} transport needs torch, which is not installed: pip install 'ncclbench[cpu]'" in done.stderr


@pytest.mark.parametrize("transport", ["gloo", "nccl"])
def test_dry_run_needs_no_library(transport: str, without_torch: dict[str, str]) -> None:
    done = python_m_ncclbench(
        "run", "all_reduce", *SMALL[:4], "--transport", transport, "--nproc", "2", "--dry-run", env=without_torch
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"1 case on 2 ranks over {transport}; nothing is started" in done.stdout


def test_without_torch_threads_and_lists_still_work(without_torch: dict[str, str]) -> None:
    done = python_m_ncclbench("run", "all_reduce", *SMALL, "-n", "6", "--json", env=without_torch)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["records"][0]["status"] == "ok"
    listed = python_m_ncclbench("list", "transports", env=without_torch)
    assert listed.returncode == 0
    assert "gloo" in listed.stdout
    assert "Traceback" not in listed.stderr


def test_process_has_the_same_code_and_line() -> None:
    done = python_m_ncclbench("run", "all_redcue")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ncclbench: error: ")
    assert "no pattern 'all_redcue'; did you mean 'all_reduce'?" in done.stderr
    assert done.stderr.count("\n") == 1


def test_dry_run_shows_memory_and_time_and_starts_nothing(
    ncclbench: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)  # starting a process would raise a TypeError
    code, out, err = ncclbench(
        "run", "all_reduce", "hypercube", "-b", "1K", "-e", "1M", "-f", "1024", "--nproc", "3", "--dry-run", "-n", "10"
    )
    assert (code, err) == (0, "")
    assert "4 cases on 3 ranks over gloo; nothing is started" in out
    rows = {line.split("  ")[-1].strip(): line for line in out.splitlines() if "/float32/" in line}
    assert "1.0 KiB" in rows["all_reduce/float32/1024/isolated"]
    assert "1.0 MiB" in rows["all_reduce/float32/1048576/isolated"]
    assert " s  " in rows["all_reduce/float32/1048576/isolated"]
    assert "would be skipped: hypercube needs a power of two" in out
    assert out.splitlines()[-1].startswith("about ")
    assert not list(tmp_path.iterdir())


def test_dry_run_json_is_one_compact_object(ncclbench: Callable[..., Result]) -> None:
    arguments = ("run", "all_reduce", "hypercube", "-b", "1K", "-e", "2K", "--nproc", "3", "--dry-run", "--json")
    code, out, err = ncclbench(*arguments)
    assert (code, err, out.count("\n")) == (0, "", 1)
    answer = json.loads(out)
    assert json.dumps(answer, separators=(",", ":")) == out.rstrip("\n")
    assert (answer["dry_run"], answer["plan"], answer["world_size"]) == (True, "all_reduce-hypercube", 3)
    assert (answer["exit_code"], answer["error"]) == (0, None)
    first, *_, last = answer["cases"]
    assert (first["case"], first["memory_bytes"]) == ("all_reduce/float32/1024/isolated", 1024)
    assert first["seconds"] > 0
    assert first["skipped"] is None
    assert "power of two" in last["skipped"]
    one_start = sum(case["seconds"] for case in answer["cases"]) + answer["start_seconds"]
    assert answer["seconds"] == answer["starts"] * one_start


def test_dry_run_error_comes_before_output(refused: Callable[..., str], tmp_path: Path) -> None:
    """Only the second case is invalid; the first must not be printed."""
    plan = tmp_path / "p.toml"
    plan.write_text(
        'name = "p"\n[[case]]\npattern = "all_reduce"\nbytes = 8\n'
        '[[case]]\npattern = "broadcast"\nbytes = 8\nparams = { root = -1 }\n'
    )
    assert "root must be" in refused("run", "--plan", str(plan), "--dry-run", "--nproc", "2")


@pytest.mark.parametrize("param", ["group=0", "root=-1"])
@pytest.mark.parametrize("transport", ["threads", "gloo"])
def test_parameters_invalid_for_any_job_are_refused(transport: str, param: str, refused: Callable[..., str]) -> None:
    refused("run", "broadcast", *SMALL[:4], "--nproc", "2", "--transport", transport, "--param", param)


def test_dry_run_shows_cases_too_large_for_memory(ncclbench: Callable[..., Result]) -> None:
    code, out, _ = ncclbench("run", "all_reduce", "-b", "8T", "-e", "8T", "--nproc", "2", "--dry-run")
    assert "8.0 TiB" in out
    assert code == 0
    assert "(would be refused on a node like this one: needs 16.0 TiB on this node (2 ranks x 8.0 TiB)" in out
    assert "refused" not in ncclbench("run", "all_reduce", *SMALL, "--dry-run")[1]


TOO_MANY = """
name = "p"
[[case]]
pattern = "all_reduce"
bytes = 64
[[case]]
pattern = "moe_dispatch"
params = { model = "deepseek-v3", tokens = [16, 16777216], hidden = 32 }
"""


def test_dry_run_shows_routing_tables_too_large(
    ncclbench: Callable[..., Result], refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "p.toml").write_text(TOO_MANY)
    line = ("run", "--plan", str(tmp_path / "p.toml"), "--nproc", "8", "--transport", "gloo")
    code, out, _ = ncclbench(*line, "--dry-run", "--json")
    cases = json.loads(out)["cases"]
    assert (code, len(cases)) == (0, 3)
    assert [case["refused"] is None for case in cases] == [True, True, False]
    assert "the routing tables take" in cases[2]["refused"]
    assert "(would be refused on a node like this one: the routing" in ncclbench(*line, "--dry-run")[1]
    assert "tokens=16777216: the routing tables take" in refused(*line)


def test_dry_run_shows_unverifiable_cases_as_skipped(ncclbench: Callable[..., Result]) -> None:
    line: tuple[str, ...] = ("run", "all_reduce", "-b", "256", "-e", "256", "--dtype", "float8_e4m3fn")
    line += ("--param", "redop=avg")
    line += ("--nproc", "66", "--transport", "threads", "--dry-run", "--json")
    (case,) = json.loads(ncclbench(*line)[1])["cases"]
    assert case["skipped"] == "no values of float8_e4m3fn show whether an average over 66 ranks is right"
    (unchecked,) = json.loads(ncclbench(*line, "--no-check")[1])["cases"]
    assert unchecked["skipped"] is None


def test_dry_run_skips_graph_timing_on_hosts(ncclbench: Callable[..., Result]) -> None:
    _, out, _ = ncclbench("run", "all_reduce", *SMALL, "--timing", "graph", "--dry-run")
    assert "would be skipped: graph timing needs a GPU transport" in out


def test_run_prints_the_table_and_its_directory(ncclbench: Callable[..., Result]) -> None:
    code, out, err = ncclbench("run", "all_reduce", *SMALL, "-n", "6", "-o", "run")
    assert code == 0
    assert "all_reduce, isolated" in out
    assert "# CPU only: proves logic, not a fabric" in out
    assert Path(out.splitlines()[-1].removeprefix("run directory: ")).samefile("run")
    assert err.splitlines()[0] == "1 case on 2 ranks over threads -> run"
    assert err.splitlines()[1].startswith("[1/1] all_reduce/float32/8/isolated: p50 ")


def test_json_output_is_one_object_without_progress(ncclbench: Callable[..., Result]) -> None:
    code, out, err = ncclbench("run", "all_reduce", *SMALL, "-n", "6", "-o", "run", "--json")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    summary = json.loads(out)
    assert Path(summary["run"]).samefile("run")
    assert (summary["exit_code"], summary["error"]) == (0, None)
    assert [record["case"] for record in summary["records"]] == ["all_reduce/float32/8/isolated"]


def test_default_run_directory_has_the_plans_name(ncclbench: Callable[..., Result]) -> None:
    code, out, _ = ncclbench("run", "all_reduce", *SMALL, "-n", "6", "--json")
    assert code == 0
    (made,) = Path("runs").iterdir()
    assert made.name.startswith("all_reduce-")
    assert Path(json.loads(out)["run"]).samefile(made)


def test_skipped_case_is_not_a_failure(ncclbench: Callable[..., Result]) -> None:
    arguments = ("-b", "64", "-e", "64", "--transport", "threads", "--nproc", "3", "-n", "6", "--json")
    code, out, err = ncclbench("run", "hypercube", "all_reduce", *arguments)
    assert (code, err) == (0, "")
    record, other = json.loads(out)["records"]
    assert (record["status"], other["status"]) == ("skipped", "ok")
    assert "power of two" in record["reason"]


def test_run_of_only_skipped_cases_is_inconclusive(ncclbench: Callable[..., Result]) -> None:
    arguments = ("run", "hypercube", "-b", "64", "-e", "128", "--transport", "threads", "--nproc", "3", "--json")
    code, out, err = ncclbench(*arguments)
    assert code == Exit.INCONCLUSIVE
    assert err.startswith(
        "ncclbench: error: nothing was measured: all 2 cases were skipped, the first because hypercube"
    )
    assert err.count("\n") == 1
    assert json.loads(out)["exit_code"] == Exit.INCONCLUSIVE


def test_graph_timing_is_skipped_on_cpus(ncclbench: Callable[..., Result]) -> None:
    code, out, _ = ncclbench("run", "all_reduce", *SMALL, "--timing", "graph", "--json")
    (record,) = json.loads(out)["records"]
    assert (code, record["status"]) == (Exit.INCONCLUSIVE, "skipped")
    assert "GPU" in record["reason"]


@pytest.mark.parametrize("world_size", ["1", "3"])
def test_world_of_one_rank_is_measured(world_size: str, ncclbench: Callable[..., Result]) -> None:
    code, out, _ = ncclbench("run", "all_reduce", *SMALL[:-1], world_size, "-n", "6", "--json")
    assert code == 0
    (record,) = json.loads(out)["records"]
    assert (record["status"], record["world_size"]) == ("ok", int(world_size))


@pytest.mark.parametrize("kind", ["patterns", "transports", "reports"])
def test_list_names_all_with_a_line_each(kind: str, ncclbench: Callable[..., Result]) -> None:
    code, out, _ = ncclbench("list", kind)
    assert code == 0
    listed = dict(line.split("  ", 1) for line in out.splitlines())
    assert list(listed) == names(kind)
    assert all(line.strip() for line in listed.values())


def test_list_plans(ncclbench: Callable[..., Result]) -> None:
    code, out, _ = ncclbench("list", "plans")
    assert code == 0
    assert any(line.startswith("quick ") for line in out.splitlines())


def test_list_models_shows_routing_and_layouts(ncclbench: Callable[..., Result]) -> None:
    code, out, _ = ncclbench("list", "models")
    assert code == 0
    listed = dict(line.split("  ", 1) for line in out.splitlines())
    assert list(listed) == MODELS.names()
    assert {"deepseek-v3", "gpt-oss-20b"} <= set(listed)
    assert "hidden 7168, 256 experts, top 8 from 4 of 8 groups" in listed["deepseek-v3"]
    assert "hidden 2880, 32 experts, top 4;" in listed["gpt-oss-20b"]
    for name, line in listed.items():
        model = read_model(name)
        assert model.title in line
        assert model.layout
        assert all(f"{layout.name}: EP {layout.ep}" in line for layout in model.layout)
        assert model.sources


def test_report_writes_a_file(ncclbench: Callable[..., Result]) -> None:
    assert ncclbench("run", "all_reduce", *SMALL, "-n", "6", "-o", "run")[0] == 0
    code, shown, _ = ncclbench("report", "run")
    assert code == 0
    assert ncclbench("report", "run", "-o", "table.txt") == (0, "", "")
    assert Path("table.txt").read_text() == shown
    assert sorted(path.name for path in Path().iterdir()) == ["run", "table.txt"]


def test_report_refuses_what_it_cannot_read_or_write(refused: Callable[..., str], tmp_path: Path) -> None:
    RunWriter.create(tmp_path / "run", manifest(topology={"node_names": ["n0"]}))
    assert "is no run directory" in refused("report", "run", "nowhere")
    assert "is no run directory" in refused("report", ".")
    assert "cannot write -o nowhere/table.txt" in refused("report", "run", "-o", "nowhere/table.txt")
    assert "no report 'tabel'; did you mean 'table'?" in refused("report", "run", "--format", "tabel")
    with (tmp_path / "run" / "results.jsonl").open("w") as file:
        file.write("{\n")
    assert "results.jsonl, line 1 is damaged" in refused("report", "run")


def test_report_into_a_directory_leaves_nothing_behind(refused: Callable[..., str], tmp_path: Path) -> None:
    RunWriter.create(tmp_path / "run", manifest(topology={"node_names": ["n0"]}))
    (tmp_path / "there").mkdir()
    assert "cannot write -o there" in refused("report", "run", "-o", "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]


def test_help_documents_every_exit_code(ncclbench: Callable[..., Result]) -> None:
    code, out, err = ncclbench("--help")
    assert code == 0, err
    codes = out.partition("Exit codes:")[2].partition("\n\n")[0]
    for number in Exit:
        assert f"{int(number)} " in codes
    assert "run" in out
    assert ncclbench("--version")[1] == f"ncclbench, version {__version__}\n"


@pytest.mark.parametrize("command", ["run", "report", "topo", "doctor", "list"])
def test_every_command_has_help_with_examples(command: str, ncclbench: Callable[..., Result]) -> None:
    code, out, _ = ncclbench(command, "-h")
    assert code == 0
    assert f"ncclbench {command}" in out.partition("Examples:")[2]


HEAVY = {"torch", "pandas", "scipy", "numpy", "pyarrow", "cupy", "mpi4py"}


@pytest.mark.parametrize("arguments", [("--help",), ("--version",)])
def test_help_loads_nothing_heavy(arguments: tuple[str, ...]) -> None:
    done = python_m_ncclbench(*arguments, options=("-X", "importtime"))
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "click" in loaded
    assert not loaded & HEAVY


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import ncclbench, sys; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_closed_pipe_is_not_an_error() -> None:
    code = "import sys; from ncclbench.cli import main; sys.argv = ['ncclbench', 'list', 'patterns']; main()"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([], Exit.GOOD),
        ([0, 0], Exit.GOOD),
        ([0, 5], Exit.INCONCLUSIVE),
        ([5, 1], Exit.FAIL),
        ([1, 3], Exit.ENVIRONMENT),
        ([3, 4, 0], Exit.WRONG_DATA),
        ([4, -9], Exit.WRONG_DATA),
        ([0, -9], Exit.ENVIRONMENT),
        ([0, 137], Exit.ENVIRONMENT),
        ([2, 4], Exit.USAGE),
    ],
)
def test_the_most_severe_exit_code_wins(codes: list[int], expected: Exit) -> None:
    assert worst(codes) is expected
