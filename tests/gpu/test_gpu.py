"""On real GPUs: every pattern, type and reduction, by both NCCL transports and by MPI; regimes, buffers and paths."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ncclbench.schedule import DTYPES
from tests.gpu.conftest import GPUS, SHARED, WORLDS, Records, environment

Run = Callable[..., Records]

both_transports = pytest.mark.parametrize("transport", ["nccl", "cupy_nccl"])
every_world = pytest.mark.parametrize("ranks", WORLDS)

# Ranks that share a GPU wait some 5 ms at every launch for their turn on it.
PLAN = """
name = "everything"
[defaults]
bytes = {sizes}
dtype = {dtypes}
iterations = {iterations}
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
COMMON = ["float32", "float16", "bfloat16", "float64", "int32", "uint8"]
FURTHER = [dtype for dtype in DTYPES if dtype not in COMMON]
MOVES = ("all_gather", "broadcast", "all_to_all", "gather", "scatter", "send_recv", "hypercube")


def everything(folder: Path, ranks: int, dtypes: list[str], *sizes: str) -> str:
    """A plan of all standard patterns and reductions, in these types and sizes."""
    rest = "".join(f'[[case]]\npattern = "{name}"\n' for name in MOVES)
    iterations = 2 if ranks > GPUS else 5
    text = PLAN.format(roots=sorted({0, ranks - 1}), rest=rest, iterations=iterations, dtypes=dtypes, sizes=list(sizes))
    (folder / "plan.toml").write_text(text)
    return str(folder / "plan.toml")


def assert_all_right(records: Records, ranks: int) -> None:
    """Nothing failed or went wrong, and what was skipped could not be otherwise."""
    assert len(records) > 100
    unexpected = {case: r["reason"] for case, r in records.items() if r["status"] not in ("ok", "skipped")}
    assert not unexpected
    skipped = {r["reason"].split(";")[0] for r in records.values() if r["status"] == "skipped"}
    honest = ("power of two", "less than one", "no reductions of uint")
    assert all(any(words in reason for words in honest) for reason in skipped), skipped
    shared = [any("share a GPU" in note for note in r["notes"]) for r in records.values() if r["status"] == "ok"]
    assert set(shared) == {ranks > GPUS}


@every_world
@both_transports
def test_every_pattern_type_and_reduction_is_right(transport: str, ranks: int, run: Run, tmp_path: Path) -> None:
    plan = everything(tmp_path, ranks, COMMON, "8", "4100", "1M")
    assert_all_right(run(ranks, "--plan", plan, "--transport", transport), ranks)


@both_transports
def test_every_further_type_is_right(transport: str, run: Run, tmp_path: Path) -> None:
    ranks = WORLDS[-1]
    records = run(ranks, "--plan", everything(tmp_path, ranks, FURTHER, "4100"), "--transport", transport)
    assert_all_right(records, ranks)
    added = {r["dtype"] for r in records.values() if r["status"] == "ok" and r["pattern"] == "all_reduce"}
    # torch has no reductions of unsigned types of more than a byte.
    assert added == {dtype for dtype in FURTHER if transport == "cupy_nccl" or not dtype.startswith("uint")}


def test_every_pattern_type_and_reduction_is_right_by_mpi(run: Run, tmp_path: Path) -> None:
    plan = everything(tmp_path, WORLDS[-1], list(DTYPES), "8", "4100")
    records = run(WORLDS[-1], "--plan", plan, "--transport", "mpi", "--device", "cuda")
    assert_all_right(records, WORLDS[-1])
    assert {record["staged"] for record in records.values()} <= {True, False}


EIGHT = """
name = "eight"
[defaults]
iterations = 2
warmup = 1
[[case]]
pattern = "moe_dispatch"
params = {{ variant = ["flat", "cached", "padded", "control"], {layer} }}
[[case]]
pattern = "moe_dispatch"
params = {{ variant = "hierarchical", placement = "2x4", {layer} }}
{rest}
"""
LAYER = "ep = 8, tokens = 64, hidden = 256, experts = 64, top_k = 8"
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send_recv", "hypercube")


@both_transports
def test_eight_ranks(transport: str, run: Run, tmp_path: Path) -> None:
    rest = "".join(f'[[case]]\npattern = "{name}"\nbytes = ["4K", "1M"]\n' for name in COLLECTIVES)
    (tmp_path / "plan.toml").write_text(EIGHT.format(layer=LAYER, rest=rest))
    records = run(8, "--plan", str(tmp_path / "plan.toml"), "--transport", transport)
    assert len(records) == 2 * 7 + 4 + 1
    assert {case: record["reason"] for case, record in records.items() if record["status"] != "ok"} == {}


@every_world
@both_transports
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
@both_transports
def test_buffers_of_every_kind(transport: str, buffers: str, ranks: int, run: Run) -> None:
    (record,) = run(
        *(ranks, "all_gather", "-b", "1M", "-e", "1M", "-n", "10", "--buffers", buffers, "--cache", "warm"),
        *("--transport", transport),
    ).values()
    assert record["status"] == "ok", record["reason"]
    registered = {"registered": True} if buffers == "nccl" else {}
    assert record["setup"] == {"buffers": buffers, "copies": 1, "cache": "warm", **registered}


@every_world
@both_transports
def test_blocks_from_nccl_serve_one_case_after_the_other(transport: str, ranks: int, run: Run) -> None:
    records = run(
        *(ranks, "all_gather", "-b", "4M", "-e", "8M", "-f", "2", "--timing", "all", "-n", "20", "--buffers", "nccl"),
        *("--transport", transport),
    )
    assert len(records) == 6
    for record in records.values():
        assert record["status"] == "ok", record["reason"]
        assert record["setup"]["registered"] is True
        assert record["setup"]["cache"] == "cold"


def refused(folder: Path, *arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    """A run that is to end before it measures."""
    return subprocess.run(
        [sys.executable, "-m", "ncclbench", "run", "all_reduce", *arguments, "-o", str(folder / "refused")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**environment(1), **environ},
    )


@pytest.mark.parametrize("transport", ["nccl", "cupy_nccl", "mpi"])
def test_two_ranks_on_the_same_gpu_are_refused(transport: str, tmp_path: Path) -> None:
    # As a launcher does that shows each rank a GPU of its own, and has the same one for two.
    device = ["--device", "cuda"] if transport == "mpi" else []
    options = ["-b", "8", "-e", "8", "--transport", transport, "--nproc", "2", *device]
    done = refused(tmp_path, *options, CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])
    assert done.returncode == 3
    assert "ranks 0 and 1 are on the same GPU" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("transport", ["nccl", "cupy_nccl", "mpi"])
def test_more_ranks_than_gpus_are_refused(transport: str, tmp_path: Path) -> None:
    device = ["--device", "cuda"] if transport == "mpi" else []
    done = refused(tmp_path, "-b", "8", "-e", "8", "--transport", transport, "--nproc", str(GPUS + 1), *device)
    assert done.returncode == 3
    # A single GPU that is shown could be another one for each rank; that it is not is found out when they have met.
    assert f"--nproc {GPUS}" in done.stderr or (GPUS == 1 and "on the same GPU" in done.stderr)
    assert "Traceback" not in done.stderr


def test_size_beyond_the_gpu_is_refused_before_allocation(tmp_path: Path) -> None:
    done = refused(tmp_path, "-b", "1T", "-e", "1T", "--transport", "nccl", "--nproc", "1")
    assert done.returncode == 2
    assert "needs 1.0 TiB on a GPU" in done.stderr


@both_transports
def test_two_nodes_on_one_host_use_sockets(transport: str, tmp_path: Path) -> None:
    # NCCL takes ranks with different host ids for different hosts, and then uses the given network.
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


@both_transports
def test_disabled_nvls_differs_from_missing_nvls(transport: str, run: Run) -> None:
    ranks = max(2, GPUS)
    (record,) = run(
        ranks, "all_reduce", "-b", "1M", "-e", "1M", "-n", "10", "--transport", transport, NCCL_NVLS_ENABLE="0"
    ).values()
    assert record["path"]["nvls"] is False
    assert record["path"]["nvls_switched_off"] is True
