"""SIGTERM and SIGINT at any time: one line, exit 3, what was finished is kept; and what the caller has closed."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ncclbench.errors import Exit
from ncclbench.launch.signals import SIGNALS
from ncclbench.launch.watchdog.attribution import Fault
from ncclbench.store import events
from ncclbench.store.run_directory import read_run
from tests.helpers.recorders import PLAN, measured, opened
from tests.ranks.conftest import Starter

pytestmark = pytest.mark.ranks

MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
# A small case that ends, and one that runs until it is stopped.
CASES = ["all_reduce/float32/8/isolated", "all_reduce/float32/4194304/isolated"]
PLAN_TEXT = """
name = "signals"
[[case]]
pattern = "all_reduce"
bytes = 8
iterations = 6
[[case]]
pattern = "all_reduce"
bytes = "4M"
iterations = 1_000_000
"""


@pytest.fixture
def plan(jobs: Starter) -> Path:
    (jobs.folder / "plan.toml").write_text(PLAN_TEXT)
    return jobs.folder / "plan.toml"


def in_the_last_case(run: Path) -> Callable[[], bool]:
    def is_so() -> bool:
        log = run / "events.jsonl"
        return log.exists() and [e.kind for e in events.read_events(log)].count("case") == 2

    return is_so


def ours(err: str) -> list[str]:
    """The lines that are ncclbench's errors; the others are progress, and mpiexec's own report."""
    return [line for line in err.splitlines() if "error" in line and not line.startswith("prte")]


# Over gloo SIGTERM and SIGINT are in test_faults.py, where a rank hangs as well.
MID_CASE = [(transport, number) for transport in ("threads", "mpi") for number in SIGNALS] + [("gloo", SIGNALS[-1])]


@pytest.mark.usefixtures("plan")
@pytest.mark.parametrize(("transport", "number"), MID_CASE)
def test_a_signal_in_mid_case_keeps_what_was_finished(transport: str, number: signal.Signals, jobs: Starter) -> None:
    run = jobs.folder / "run"
    job = jobs.ncclbench(f"run --plan plan.toml --transport {transport} --nproc 2 -o run", MPI)
    assert jobs.eventually(in_the_last_case(run), 60)
    job.signal(number)
    finished = job.wait(30)
    assert finished.code == Exit.ENVIRONMENT
    # An mpiexec's own report may speak of errors as well.
    assert [line for line in ours(finished.err) if line.startswith("ncclbench")] == [
        f"ncclbench: error: {CASES[1]}: interrupted by {number.name}; finished cases are kept, go on with --resume"
    ]
    assert "Traceback" not in finished.err
    stored = read_run(run)
    assert [(r.case, r.status) for r in stored.records] == [(CASES[0], "ok"), (CASES[1], "failed")]
    assert stored.records[1].reason == f"interrupted by {number.name}"
    assert (stored.events[-1].kind, stored.events[-1].exit_code) == ("end", 3)
    assert job.no_process_is_left()


def test_signal_ends_a_start_and_prevents_further_starts(plan: Path, jobs: Starter) -> None:
    plan.write_text(PLAN_TEXT.replace('"signals"', '"signals"\nstarts = 3'))
    job = jobs.ncclbench("run --plan plan.toml --transport threads --nproc 2 -o run --json")
    assert jobs.eventually(in_the_last_case(jobs.folder / "run"), 60)
    job.signal(signal.SIGTERM)
    finished = job.wait(30)
    assert (finished.code, len(ours(finished.err))) == (Exit.ENVIRONMENT, 1)
    assert [record["status"] for record in finished.records] == ["ok", "failed"]
    assert finished.summary["error"] == "interrupted by SIGTERM"
    assert job.no_process_is_left()


# A transport whose ranks never join: they wait in a library's C code, which does not handle signals.
_NEVER = """
import ctypes, os
from pathlib import Path

def open_transport(name, identity, timeout):
    Path(os.environ["MARKS"], str(identity.rank)).touch()
    ctypes.CDLL(None).sleep(ctypes.c_uint(3600))
"""


@pytest.fixture
def never(tmp_path: Path) -> dict[str, str]:
    """Variables with which a job finds the transport ``never``."""
    site, marks = tmp_path / "site", tmp_path / "marks"
    (site / "never-1.dist-info").mkdir(parents=True)
    marks.mkdir()
    (site / "never.py").write_text(_NEVER)
    (site / "never-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: never\nVersion: 1\n")
    (site / "never-1.dist-info" / "entry_points.txt").write_text("[ncclbench.transports]\nnever = never\n")
    return {"PYTHONPATH": ":".join([str(site), *sys.path[1:]]), "MARKS": str(marks)}


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_ranks_meet_is_one_line(
    number: signal.Signals, as_json: bool, jobs: Starter, never: dict[str, str]
) -> None:
    json_flag = "--json" if as_json else ""
    job = jobs.ncclbench(f"run all_reduce -e 8 --transport never --nproc 3 -o run {json_flag}", never)
    assert jobs.eventually(lambda: len(list(Path(never["MARKS"]).iterdir())) == 3, 60)
    job.signal(number)
    finished = job.wait(30)
    assert finished.code == Exit.ENVIRONMENT
    assert finished.err == f"ncclbench: error: interrupted by {number.name}\n"  # and not a word of finished cases
    assert not (jobs.folder / "run").exists()
    assert finished.out == "" or json.loads(finished.out)["error"] == f"interrupted by {number.name}"
    assert bool(finished.out) == as_json
    assert job.no_process_is_left()


def test_signal_before_the_ranks_start_is_one_line(jobs: Starter) -> None:
    """As soon as the program is heard of, which is before it has loaded anything; whatever it starts ends as well."""
    for delay in (0, 1, 2, 3):
        job = jobs.ncclbench(f"run all_reduce -e 8 --transport gloo --nproc 2 -o run{delay}")
        heeds = lambda pid=job.process.pid: int(_status(pid, "SigCgt"), 16) >> (signal.SIGTERM - 1) & 1  # noqa: E731
        assert jobs.eventually(heeds, 20)
        jobs.eventually(lambda: False, delay * 0.15)
        job.signal(signal.SIGTERM)
        finished = job.wait(30)
        assert finished.code == Exit.ENVIRONMENT
        assert len(ours(finished.err)) == 1, finished.err
        assert "" not in finished.err.splitlines()
        assert job.no_process_is_left()


def _status(pid: int, field: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{field}:"))


def test_a_signal_after_the_end_changes_nothing(tmp_path: Path) -> None:
    recorder, listener = opened(tmp_path / "run")
    for number, planned in enumerate(PLAN.cases):
        recorder.begin(number, planned)
        recorder.finish(measured(number))
    assert recorder.end() is Exit.GOOD
    assert recorder.fault(Fault("failed", (), "interrupted by SIGINT", -1)) is Exit.GOOD
    assert (listener.code, listener.error) == (Exit.GOOD, None)
    assert [event.kind for event in read_run(tmp_path / "run").events].count("lost") == 0


FULL = ["ncclbench: error: could not write to stdout: No space left on device"]


@pytest.mark.parametrize(
    ("transport", "how", "code", "said"),
    [
        ("threads", "2>&-", 0, []),
        ("threads", ">&-", 0, []),
        ("threads", "<&- >&- 2>&-", 0, []),
        ("threads", ">/dev/full", 3, FULL),
        # What is closed is opened before ranks are started; these have what their parent has.
        ("gloo", "<&- >&- 2>&-", 0, []),
        ("gloo", ">/dev/full", 3, FULL),
    ],
)
def test_what_the_caller_has_closed_or_filled(
    transport: str, how: str, code: int, said: list[str], jobs: Starter
) -> None:
    line = f"{sys.executable} -m ncclbench run all_reduce -e 8 -n 6 --nproc 2 --transport {transport} -o run {how}"
    finished = jobs.start(f"sh -c '{line}'").wait()
    assert (finished.code, ours(finished.err)) == (code, said)
    assert [record.status for record in read_run(jobs.folder / "run").records] == ["ok"]


@pytest.mark.parametrize("line", ["list patterns", "--help", "run all_reduce --dry-run --transport threads"])
def test_full_disk_under_stdout_is_a_one_line_error(line: str, jobs: Starter) -> None:
    finished = jobs.start(f"sh -c '{sys.executable} -m ncclbench {line} >/dev/full'").wait()
    assert finished.code == Exit.ENVIRONMENT
    assert finished.err == "ncclbench: error: could not write to stdout: No space left on device\n"
