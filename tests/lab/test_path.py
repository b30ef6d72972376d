"""NIC counters against the ledger on real packets, and a run by the command line under gloo and under Open MPI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ncclbench.analysis.flows import flows_of, rail_matrix
from ncclbench.store.run_directory import read_run
from scripts.lab import execute, faults, kernel
from scripts.lab.plan import Lab, LabError
from tests.helpers.stored import known
from tests.lab.conftest import NBYTES, SCRIPT, environment

if TYPE_CHECKING:
    from pathlib import Path

    from tests.lab.conftest import StayingJob

pytestmark = [pytest.mark.lab, pytest.mark.ranks]


def rails_of(record: dict[str, Any]) -> list[dict[str, int]]:
    rails: list[dict[str, int]] = record["path"]["counters"]["rails"]
    return rails


def test_every_nic_carried_its_bytes(staged: StayingJob) -> None:
    for record in (staged.same_rail(), staged.cross_rail(samples=3, check=True)):
        assert record["path"]["proof"] == "proven", record["path"]
        for rail in rails_of(record):
            for way in ("sent", "received"):
                # 5%, and of every 9000 bytes 66 of headers; acknowledgements come on top.
                assert 1.0 <= rail[way] / rail[f"expected_{way}"] <= 1.05 + 0.02, rail


def test_traffic_over_another_rail_is_contradicted(staged: StayingJob) -> None:
    """GPU n0:r0 hands what is for n1:r0 to its neighbour over NVLink, which sends it by its own NIC, as PXN would."""
    lab = staged.lab
    sender, relay, target = (lab.nics_named(name)[0] for name in ("n0:r0", "n0:r1", "n1:r0"))
    space = lab.gpu_space(sender.gpu)
    before = kernel.run(["ip", "-n", space, "route", "show", f"{target.address}/32"])
    assert before == ""
    kernel.in_space(lab.gpu_space(relay.gpu), ["sh"], ["echo 1 > /proc/sys/net/ipv4/ip_forward"])
    route = [f"{target.address}/32", "via", relay.address, "dev", "nvl", "onlink", "src", sender.address]
    kernel.run(["ip", "-n", space, "route", "add", *route])
    try:
        record = staged.same_rail(check=True)
        assert record["path"]["proof"] == "contradicted", record["path"]
        assert "rail0 of n0 (rank 0, rail 0) sent" in record["path"]["reason"]
        off = {(one["rank"], one["direction"]) for one in record["path"]["counters"]["off"]}
        assert (0, "sent") in off, "less than it had to"
        assert (1, "sent") in off, "and its neighbour more"
        # Received it is where it belongs, in the right time: only the counters of the sender tell.
        assert lab.gpus().index(target.gpu) not in {rank for rank, way in off if way == "received"}
        assert record["wrong"] == 0, "and the data are right"
    finally:
        kernel.run(["ip", "-n", space, "route", "del", f"{target.address}/32"])
        kernel.in_space(lab.gpu_space(relay.gpu), ["sh"], ["echo 0 > /proc/sys/net/ipv4/ip_forward"])
    assert staged.same_rail(samples=5)["path"]["proof"] == "proven"


def command_line(
    lab: Lab, folder: Path, line: str, *how: str, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """``ncclbench run`` in a lab, as a user starts it; the run directory is `folder`/run."""
    (folder / "lab.toml").write_text(lab.topology())
    ncclbench = [python, "-m", "ncclbench", *line.split(), "--topology", "lab.toml", "-o", "run", "--json"]
    return subprocess.run(
        [python, str(SCRIPT), "--prefix", lab.prefix, "exec", *how, "--", *ncclbench],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.mark.parametrize("library", ["openmpi", "mpich"])
def test_mpi_reads_the_same_matrix_from_the_command_line(library: str, prefix: str, tmp_path: Path) -> None:
    """2 nodes x 2 rails with a spine of one third, by `fabric_lab.py exec --mpi`."""
    python = os.environ.get("NCCLBENCH_MPICH_PYTHON", "") if library == "mpich" else sys.executable
    if not python:
        pytest.skip("no MPICH environment: scripts/test makes one and sets NCCLBENCH_MPICH_PYTHON")
    lab = Lab(prefix=prefix, nodes=2, rails=2, nic_rate=1e8, spine_rate=1e8 / 3)
    kernel.make(lab)
    line = f"run same_rail cross_rail --param direction=apart -b {2 * NBYTES} -e {2 * NBYTES} -n 10 -w 1"
    done = command_line(lab, tmp_path, f"{line} --transport mpi", "--mpi", python=python)
    assert done.returncode == 0, done.stderr[-2000:]
    run = read_run(tmp_path / "run")
    assert [rank.host for rank in run.manifest.ranks] == ["n0", "n0", "n1", "n1"]
    assert run.manifest.provenance.launcher == library
    same, cross = (rail_matrix(flows_of(record), known(run.topology).rails) * 8e3 for record in run.records)
    assert np.all(np.diag(same) >= 75), same
    off = cross[~np.eye(2, dtype=bool)]
    assert np.all(np.abs(off - 100 / 3) <= 0.15 * 100 / 3), (same, cross)
    # By shared memory the bytes would never have come past the NICs.
    assert [record.path.proof for record in run.records if record.path] == ["proven", "proven"]
    assert not kernel.processes_of(prefix)


@pytest.mark.parametrize("transport", ["gloo", "mpi"])
def test_a_job_starts_although_a_rail_is_down(transport: str, prefix: str, tmp_path: Path) -> None:
    """`fabric_lab.py exec` with gloo and Open MPI, and a NIC that is unreachable from the first connection on."""
    lab = Lab(prefix=prefix, nodes=2, rails=2)
    kernel.make(lab)
    faults.inject(lab, [], "nic", "n1:r0", "down")
    how = ["--mpi"] if transport == "mpi" else []
    line = f"run cross_rail same_rail -b {NBYTES} -e {NBYTES} -n 6 -w 1 --transport {transport}"
    done = command_line(lab, tmp_path, line, *how)
    assert done.returncode == 3, done.stderr[-2000:]
    cross, same = read_run(tmp_path / "run").records
    # With one peer on the other rail and one on its own, either end may be the dead one; both cases name rank 2.
    assert (cross.status, cross.ranks, same.status, same.ranks) == ("timeout", [1, 2], "timeout", [0, 2])
    assert "rank 1 -> 2, 2 -> 1" in (cross.reason or "")
    found = flows_of(same)
    assert set(zip(found.src.tolist(), found.dst.tolist(), strict=True)) == {(1, 3), (3, 1)}
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert "'NCCLBENCH_CONTROL_IFNAME': 'ctl'" in str(manifest["provenance"])
    assert [rank["host"] for rank in manifest["ranks"]] == ["n0", "n0", "n1", "n1"]
    assert manifest["provenance"]["launcher"] == {"gloo": "torchrun", "mpi": "openmpi"}[transport]
    assert not kernel.processes_of(prefix)


def test_an_mpiexec_of_another_kind_is_refused(prefix: str, tmp_path: Path) -> None:
    other = tmp_path / "mpiexec"
    other.write_text("#!/bin/sh\necho Other MPI 4.2\n")
    other.chmod(0o755)
    assert shutil.which(str(other))
    with pytest.raises(LabError, match=r"is neither Open MPI's nor MPICH's"):
        execute.mpi_command(Lab(prefix=prefix), ["true"], mpiexec=str(other))
