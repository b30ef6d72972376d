"""A disk that fills up under rank 0 while it stores: said in a line, nothing stored is lost, and the run goes on."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ncclbench.errors import Exit
from ncclbench.store import events
from ncclbench.store.run_directory import read_run
from tests.ranks.conftest import Starter

pytestmark = pytest.mark.ranks

MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
SIZES = [1024 << k for k in range(5)]
# Samples of one case take 8 KB, or 4 where many durations are the same, and what else a run has 16 to 20: some cases
# fit, and not all.
ITERATIONS = 300
RUN = f"run all_reduce -b 1K -e 16K -n {ITERATIONS} --nproc 2"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with space for a few cases."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=36k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("transport", ["threads", "gloo", "mpi"])
def test_full_disk_keeps_stored_records_and_the_run_resumes(transport: str, small_disk: Path, jobs: Starter) -> None:
    out = small_disk / "run"
    finished = jobs.ncclbench(f"{RUN} --transport {transport} -o {out} --json", MPI).wait()
    assert finished.code == Exit.ENVIRONMENT
    said = [line for line in finished.err.splitlines() if line.startswith("ncclbench: ")]
    assert len(said) == 1
    assert said[0].count("could not store") == 1
    assert "No space left on device; what was stored before is intact; finished cases are kept" in said[0]
    summary = json.loads(finished.out.splitlines()[-1])
    assert summary["exit_code"] == Exit.ENVIRONMENT
    assert f"ncclbench: error: {summary['error']}" == said[0]

    run = read_run(out)
    done = [record for record in run.records if record.status == "ok"]
    assert [record.bytes for record in done] == SIZES[: len(done)]
    assert 1 <= len(done) < len(SIZES)
    for record in done:
        assert record.samples is not None
        assert pq.read_table(out / record.samples).num_rows == 2 * ITERATIONS
    assert events.broken_link(out / "events.jsonl") is None
    assert not list(out.rglob("*.tmp"))

    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    again = jobs.ncclbench(f"{RUN} --transport {transport} -o {out} --resume --json", MPI).wait()
    assert again.code == Exit.GOOD, again.err
    run = read_run(out)
    assert [(record.bytes, record.status) for record in run.records] == [(size, "ok") for size in SIZES]
    assert list(run.records[: len(done)]) == done
    assert events.broken_link(out / "events.jsonl") is None
