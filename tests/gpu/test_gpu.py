"""On real GPUs: every pattern, type and reduction by both roads to NCCL, checked; regimes, buffers, evidence.

Ranks are one a GPU; with one GPU the world is of one rank, which proves the machinery and no link.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GPUS = len([path for path in Path("/dev").iterdir() if re.fullmatch(r"nvidia\d+", path.name)])

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="no GPU on this machine")]

Records = dict[str, dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Records]:
    """Runs ncclbench on all GPUs, and returns its records by case."""

    def call(*arguments: str, code: int = 0, environ: dict[str, str] | None = None) -> Records:
        done = subprocess.run(
            [sys.executable, "-m", "ncclbench", "run", *arguments, "--json", "-o", str(tmp_path / "run")],
            capture_output=True,
            text=True,
            timeout=280,
            env={**os.environ, **(environ or {})},
        )
        assert done.returncode == code, done.stderr[-2000:]
        return {record["case"]: record for record in json.loads(done.stdout.splitlines()[-1])["records"]}

    return call


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


@pytest.mark.parametrize("transport", ["nccl", "cupy_nccl"])
def test_every_pattern_type_and_reduction_is_right(transport: str, run: Callable[..., Records], tmp_path: Path) -> None:
    moves = ("all_gather", "broadcast", "all_to_all", "gather", "scatter", "send_recv", "hypercube")
    plan = tmp_path / "plan.toml"
    rest = "".join(f'[[case]]\npattern = "{name}"\n' for name in moves)
    plan.write_text(PLAN.format(roots=sorted({0, GPUS - 1}), rest=rest))
    records = run("--plan", str(plan), "--transport", transport, "--nproc", str(GPUS))
    assert len(records) > 300
    unexpected = {case: r["reason"] for case, r in records.items() if r["status"] not in ("ok", "skipped")}
    assert not unexpected
    skipped = {r["reason"].split(";")[0] for r in records.values() if r["status"] == "skipped"}
    assert all("power of two" in reason or "less than one" in reason for reason in skipped), skipped


@pytest.mark.parametrize("transport", ["nccl", "cupy_nccl"])
def test_the_three_regimes_and_what_they_ran_on(transport: str, run: Callable[..., Records]) -> None:
    records = run(
        *("all_reduce", "-b", "8", "-e", "32M", "-f", "4194304", "--timing", "all", "-n", "20"),
        *("--transport", transport, "--nproc", str(GPUS)),
    )
    assert {r["timing"] for r in records.values()} == {"isolated", "pipelined", "graph"}
    for record in records.values():
        assert record["status"] == "ok", record["reason"]
        assert record["time_us"]["p50"] > 0
        assert record["setup"]["cache"] == ("cold" if record["bytes"] > 1 << 20 else "warm")
        assert record["path"]["version"].startswith("2.")
        assert len(record["gpus"]) == GPUS
        assert record["gpus"][0]["after"]["sm_mhz"] > 0
    if GPUS > 1:
        assert any(link.startswith("P2P/") for link in record["path"]["links"])


@pytest.mark.parametrize("buffers", ["pool", "nccl", "torch"])
@pytest.mark.parametrize("transport", ["nccl", "cupy_nccl"])
def test_buffers_of_every_kind(transport: str, buffers: str, run: Callable[..., Records]) -> None:
    (record,) = run(
        *("all_gather", "-b", "1M", "-e", "1M", "-n", "10", "--buffers", buffers, "--cache", "warm"),
        *("--transport", transport, "--nproc", str(GPUS)),
    ).values()
    assert record["status"] == "ok", record["reason"]
    assert record["setup"] == {"buffers": buffers, "copies": 1, "cache": "warm"}


def test_more_ranks_than_gpus_are_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ncclbench", "run", "all_reduce", "-b", "8", "-e", "8", "--transport", "nccl"),
            *("--nproc", str(GPUS + 1), "-o", str(tmp_path / "refused")),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 3
    assert f"--nproc {GPUS}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_size_beyond_the_gpu_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ncclbench", "run", "all_reduce", "-b", "1T", "-e", "1T", "--transport", "nccl"),
            *("--nproc", "1", "-o", str(tmp_path / "refused")),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "needs 1.0 TiB on a GPU" in done.stderr


@pytest.mark.skipif(GPUS < 2, reason="two nodes on one host need 2 GPUs")
def test_two_nodes_on_one_host_are_seen_to_use_sockets(tmp_path: Path) -> None:
    # NCCL takes ranks with different host ids for different hosts, and then the network it is told to.
    script = (
        'import os,sys; os.environ["NCCL_HOSTID"]=f"node{os.environ[\'RANK\']}"; from ncclbench.cli import main; main()'
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"),
            *(sys.executable, "-c", script, "run", "all_reduce", "-b", "1M", "-e", "1M", "-n", "10", "--json"),
            *("-o", str(tmp_path / "run")),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "NCCL_NET": "Socket"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (record,) = json.loads(done.stdout.splitlines()[-1])["records"]
    assert "NET/Socket" in record["path"]["links"]
    assert any("sockets" in note for note in record["notes"])
