"""MoE dispatch over real packets: what crosses between nodes is what the ledger says, by the NICs' own counters."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import PYTHONPATH, SCRIPTS

pytestmark = [pytest.mark.lab, pytest.mark.timeout(280)]

PREFIX = f"moe{os.getpid() % 10000}"
NODES, RAILS, ITERATIONS = 2, 2, 4
PARAMS = {"hidden": 512, "tokens": 64, "experts": 32, "top_k": 8, "routings": 1}
# Of a stream of segments of 9000 bytes headers are under 2%; acknowledgements and retransmissions come on top.
HEADERS = 0.08


def lab(*arguments: object) -> str:
    line = [sys.executable, SCRIPTS / "fabric_lab.py", "--prefix", PREFIX, *arguments]
    paths = PYTHONPATH
    done = subprocess.run(
        [str(part) for part in line],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def fabric(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A lab that is up, and the file of its topology."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("the fabric lab needs root and iproute2")
    lab("up", "--nodes", NODES, "--rails", RAILS, "--nic-rate", "50mbit")
    try:
        path = tmp_path_factory.mktemp("lab") / "lab.toml"
        path.write_text(lab("topology"))
        yield path
    finally:
        lab("down")


def sent_by_nics() -> int:
    """Bytes that all NICs of the lab have sent so far."""
    total = 0
    for node in range(NODES):
        for rail in range(RAILS):
            line = ["ip", "-n", f"{PREFIX}-n{node}r{rail}", "-j", "-s", "link"]
            links = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
            total += sum(link["stats64"]["tx"]["bytes"] for link in links if link["ifname"].startswith("rail"))
    return total


def measured(fabric: Path, folder: Path, variants: tuple[str, ...]) -> tuple[list[dict[str, Any]], int]:
    """The record of each variant, measured by one job, and the bytes that the NICs sent meanwhile."""
    (folder / "plan.toml").write_text(
        f'name = "variants"\n[[case]]\npattern = "moe_dispatch"\n'
        f"[case.params]\nvariant = {json.dumps(variants)}\n"
        + "".join(f"{name} = {value}\n" for name, value in PARAMS.items())
    )
    before = sent_by_nics()
    lab("exec", "--", sys.executable, "-m", "ncclbench", "run", "--plan", folder / "plan.toml", "--transport", "gloo",
        "--topology", fabric, "-n", ITERATIONS, "-w", 0, "--no-check", "-o", folder / "run")  # fmt: skip
    records = [json.loads(line) for line in (folder / "run" / "results.jsonl").read_text().splitlines()]
    return records, sent_by_nics() - before


def crossing(record: dict[str, Any]) -> int:
    """Bytes between nodes in one iteration, as the ledger has it."""
    sent = record["ledger"]["sent_bytes"]
    return int(sent["same_rail"] + sent["cross_rail"])


def test_hierarchical_crosses_once_a_domain_and_the_nics_agree(fabric: Path, tmp_path: Path) -> None:
    variants = ("cached", "hierarchical")
    records, by_nics = measured(fabric, tmp_path, variants)
    assert [(record["status"], record["params"]["variant"]) for record in records] == [
        ("ok", name) for name in variants
    ]
    crossed = {name: crossing(record) for name, record in zip(variants, records, strict=True)}
    ledger = sum(crossed.values()) * ITERATIONS
    assert ledger <= by_nics <= ledger * (1 + HEADERS)
    for name, record in zip(variants, records, strict=True):  # and each by itself, by its own counters
        sent = sum(rail["sent"] for rail in record["path"]["counters"]["rails"])
        # What the sum allows for control messages, a single variant may have had all of.
        assert crossed[name] * ITERATIONS <= sent <= crossed[name] * ITERATIONS * (1 + 2 * HEADERS), name
    record = records[-1]
    (rows,) = record["facts"][0]["rows"]["domain_dedup"]
    between = sum(rows[s][d] for s in range(4) for d in range(4) if s // RAILS != d // RAILS)
    dispatch = next(phase for phase in record["phases"] if phase["label"] == "dispatch_rail")
    assert crossing({"ledger": dispatch["ledger"]}) == between * 2 * PARAMS["hidden"]
    assert 0 < between <= NODES * RAILS * PARAMS["tokens"]
    assert crossed["hierarchical"] < 0.7 * crossed["cached"]
