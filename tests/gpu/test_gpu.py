"""On real GPUs: every pattern, type and reduction, by both roads to NCCL and by MPI; regimes, buffers, evidence, faults."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.gpu.conftest import GPUS, SHARED, WORLDS, Records, environment

Run = Callable[..., Records]

both_roads = pytest.mark.parametrize("transport", ["nccl", "cupy_nccl"])
every_world = pytest.mark.parametrize("ranks", WORLDS)

PLAN = """
name = "everything"
[defaults]
bytes = ["8", "4100", "1M"]
dtype = ["float32", "float16", "bfloat16", "float64", "int32", "uint8"]
iterations = 5
warmup = 1
[[case]]
pattern = "all_reduce"
params = {{ redop = ["sum", "min", "max", "prod", "avg"] }}
[[case]]
pattern = "reduce_scatter"
params = {{ redop = ["sum", "min", "max", "prod", "avg"] }}
[[case]]
pattern = "reduce"
params = {{ redop = ["sum", "min", "max", "prod", "avg"], root = {roots} }}
{rest}
"""
MOVES = ("all_gather", "broadcast", "all_to_all", "gather", "scatter", "send_recv", "hypercube")


def everything(folder: Path, ranks: int) -> str:
    """A plan of all standard patterns, types and reductions."""
    rest = "".join(f'[[case]]\npattern = "{name}"\n' for name in MOVES)
    (folder / "plan.toml").write_text(PLAN.format(roots=sorted({0, ranks - 1}), rest=rest))
    return str(folder / "plan.toml")


def assert_all_right(records: Records, ranks: int) -> None:
    """Nothing failed or went wrong, and what was skipped could not be otherwise."""
    assert len(records) > 300
    unexpected = {case: r["reason"] for case, r in records.items() if r["status"] not in ("ok", "skipped")}
    assert not unexpected
    skipped = {r["reason"].split(";")[0] for r in records.values() if r["status"] == "skipped"}
    assert all("power of two" in reason or "less than one" in reason for reason in skipped), skipped
    shared = [any("share a GPU" in note for note in r["notes"]) for r in records.values() if r["status"] == "ok"]
    assert set(shared) == {ranks > GPUS}


@every_world
@both_roads
def test_every_pattern_type_and_reduction_is_right(transport: str, ranks: int, run: Run, tmp_path: Path) -> None:
    assert_all_right(run(ranks, "--plan", everything(tmp_path, ranks), "--transport", transport), ranks)


def test_every_pattern_type_and_reduction_is_right_by_mpi(run: Run, tmp_path: Path) -> None:
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    plan = everything(tmp_path, WORLDS[-1])
    records = run(WORLDS[-1], "--plan", plan, "--transport", "mpi", "--device", "cuda", **root)
    assert_all_right(records, WORLDS[-1])
    assert {record["staged"] for record in records.values()} <= {True, False}


@every_world
@both_roads
def test_the_three_regimes_and_what_they_ran_on(transport: str, ranks: int, run: Run) -> None:
    records = run(
        *(ranks, "all_reduce", "-b", "8", "-e", "32M", "-f", "4194304", "--timing", "all", "-n", "20"),
        *("--transport", transport),
    )
    assert {r["timing"] for r in records.values()} == {"isolated", "pipelined", "graph"}
    for record in records.values():
        assert record["status"] == "ok", record["reason"]
        assert record["time_us"]["p50"] > 0
        assert record["setup"]["cache"] == ("cold" if record["bytes"] > 1 << 20 else "warm")
        assert record["path"]["version"].startswith("2.")
        assert len(record["gpus"]) == ranks
        assert record["gpus"][0]["after"]["sm_mhz"] > 0
        if ranks > 1:
            assert any(link.startswith("NET/" if SHARED else "P2P/") for link in record["path"]["links"])


@every_world
@pytest.mark.parametrize("buffers", ["pool", "nccl", "torch"])
@both_roads
def test_buffers_of_every_kind(transport: str, buffers: str, ranks: int, run: Run) -> None:
    (record,) = run(
        *(ranks, "all_gather", "-b", "1M", "-e", "1M", "-n", "10", "--buffers", buffers, "--cache", "warm"),
        *("--transport", transport),
    ).values()
    assert record["status"] == "ok", record["reason"]
    assert record["setup"] == {"buffers": buffers, "copies": 1, "cache": "warm"}


def refused(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A run that is to end before it measures."""
    return subprocess.run(
        [sys.executable, "-m", "ncclbench", "run", "all_reduce", *arguments, "-o", str(folder / "refused")],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("transport", ["nccl", "cupy_nccl", "mpi"])
def test_more_ranks_than_gpus_are_refused(transport: str, tmp_path: Path) -> None:
    device = ["--device", "cuda"] if transport == "mpi" else []
    done = refused(tmp_path, "-b", "8", "-e", "8", "--transport", transport, "--nproc", str(GPUS + 1), *device)
    assert done.returncode == 3
    assert f"--nproc {GPUS}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_size_beyond_the_gpu_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    done = refused(tmp_path, "-b", "1T", "-e", "1T", "--transport", "nccl", "--nproc", "1")
    assert done.returncode == 2
    assert "needs 1.0 TiB on a GPU" in done.stderr


@both_roads
def test_two_nodes_on_one_host_are_seen_to_use_sockets(transport: str, tmp_path: Path) -> None:
    # NCCL takes ranks with different host ids for different hosts, and then the network it is told to.
    script = (
        'import os,sys; os.environ["NCCL_HOSTID"]=f"node{os.environ[\'RANK\']}"; from ncclbench.cli import main; main()'
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"),
            *(sys.executable, "-c", script, "run", "all_reduce", "-b", "1M", "-e", "1M", "-n", "10", "--json"),
            *("-o", str(tmp_path / "run"), "--transport", transport),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(2, NCCL_NET="Socket"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (record,) = json.loads(done.stdout.splitlines()[-1])["records"]
    assert "NET/Socket" in record["path"]["links"]
    assert any("sockets" in note for note in record["notes"])


@pytest.mark.parametrize("timing", ["isolated", "graph"])
@both_roads
def test_a_peer_killed_while_others_are_inside_a_launch_is_named(transport: str, timing: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = subprocess.Popen(
        [
            *(sys.executable, "-m", "ncclbench", "run", "all_reduce", "-b", "16M", "-e", "16M", "--timing", timing),
            *("-n", "1000000", "--transport", transport, "--nproc", "2", "--json", "-o", str(out)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(2),
    )
    try:
        pids = wait_for_ranks(out)
        time.sleep(8)  # connected, checked, warmed up and captured: the launches that are timed are under way
        assert job.poll() is None, job.communicate()[1]
        psutil.Process(pids[1]).send_signal(signal.SIGKILL)
        died = time.monotonic()
        stdout, stderr = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 4, stderr
    assert time.monotonic() - died < 30
    (record,) = json.loads(stdout.splitlines()[-1])["records"]
    assert (record["status"], record["ranks"]) == ("failed", [1]), record["reason"]
    assert "rank 1" in record["reason"]
    assert "died" in record["reason"]
    assert "Traceback" not in stderr
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def wait_for_ranks(out: Path) -> list[int]:
    """The ranks' process ids, once the first case has begun."""
    for _ in range(600):
        if (out / "events.jsonl").exists() and '"case"' in (out / "events.jsonl").read_text():
            manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
            return [place["pid"] for place in manifest["ranks"]]
        time.sleep(0.1)
    raise AssertionError("the run did not begin")
