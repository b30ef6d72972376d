"""Cases of MoE dispatch on threads, small enough to be run by the hundred."""

from typing import Any

from ncclbench.measure.case import run_case
from ncclbench.plan import Settings
from ncclbench.schedule import Case
from ncclbench.store.records import Record
from ncclbench.topology import Topology
from ncclbench.transports.threads import play

QUICK = Settings(iterations=2, warmup=1)
ONCE = Settings(iterations=1, warmup=0)
SMALL: dict[str, Any] = {"hidden": 32, "tokens": "12", "experts": 16, "top_k": 4, "routings": 2}
ROUTINGS = ["uniform", "zipf:1.5", "hot-rank:0.7"]


def case_of(**params: Any) -> Case:
    return Case(pattern="moe_dispatch", nbytes=64, dtype="bfloat16", params={**SMALL, **params})


def run(case: Case, ranks: int, topology: Topology | None = None, settings: Settings = QUICK) -> Record:
    where = topology or Topology.single_node(ranks)
    measured = play(ranks, lambda transport: run_case(case, transport, where, settings))[0]
    assert measured is not None
    return measured.record


def named(value: Any) -> str:
    """The id of a test's parameter."""
    if isinstance(value, dict):
        return "-".join(map(str, value.values()))
    return str(getattr(value, "__name__", value))


ALL: list[dict[str, Any]] = [
    {"variant": "flat"},
    {"variant": "flat", "dedup": "selection"},
    {"variant": "flat", "format": "fp8", "scales": "separate"},
    {"variant": "flat", "format": "nvfp4"},
    {"variant": "cached"},
    {"variant": "padded", "format": "mxfp8"},
    {"variant": "control"},
    {"variant": "hierarchical", "placement": "2x2"},
    {"variant": "flat", "quad": True},
    {"variant": "hierarchical", "placement": "2x2", "quad": True, "format": "fp8"},
]
