"""Cases of MoE dispatch on threads, small enough to run hundreds of them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ncclbench.errors import UsageError
from ncclbench.measure.case import run_case
from ncclbench.moe.routing import KINDS, Router, RoutingSpec, expert_hosts
from ncclbench.moe.routing_sampling import RoutingSampler
from ncclbench.moe.routing_trace import read_trace
from ncclbench.plan.plan import Settings
from ncclbench.schedule import Case, Schedule
from ncclbench.store.records import Record
from ncclbench.topology import Topology
from ncclbench.transports.threads import play

QUICK = Settings(iterations=2, warmup=1)
ONCE = Settings(iterations=1, warmup=0)
SMALL: dict[str, Any] = {"hidden": 32, "tokens": "12", "experts": 16, "top_k": 4, "routings": 2}
VALUES = {"zipf": "1.5", "maxvio": "2", "trace": "FILE"}


def spelled(kind: str) -> str:
    """The text of a routing of this kind: most with a share of tokens, some with another number."""
    try:
        return str(RoutingSpec.parse(kind))
    except UsageError:
        return f"{kind}:{VALUES.get(kind, '0.7')}"


ROUTINGS = [spelled(kind) for kind in KINDS]
"""One routing of each kind. FILE is a trace that `routed` writes."""
GROUPED = {"model": "deepseek-v3", "experts": 0}
"""A preset that has groups of experts, for group-limited."""


def routed(routing: str, tokens: list[int], folder: Path) -> dict[str, Any]:
    """Parameters of a routing with `tokens` tokens per rank; a trace is written to `folder`.

    The trace is Parquet if all ranks have equally many tokens, and JSON lines otherwise.
    """
    if routing == "trace:FILE":
        return {"tokens": "", "routing": f"trace:{recorded(tokens, folder)}"}
    grouped = GROUPED if routing == "group-limited" else {}
    return {"tokens": ",".join(map(str, tokens)), "routing": routing, **grouped}


def recorded(tokens: list[int], folder: Path) -> Path:
    """A trace of choices that no sampled routing has: experts k apart, with another first expert per token."""
    experts, top_k = SMALL["experts"], SMALL["top_k"]
    rows = [
        {"rank": rank, "token": tok, "experts": [(3 * rank + tok + top_k * j) % experts for j in range(top_k)]}
        for rank, count in enumerate(tokens)
        for tok in range(count)
    ]
    path = folder / f"{'-'.join(map(str, tokens))}.{'parquet' if len(set(tokens)) == 1 else 'jsonl'}"
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_lines(path, rows)
    return path


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A trace in JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table_of_each_kind(folder: Path, tokens_W: list[list[int]]) -> tuple[Path, dict[str, str]]:
    """A trace with one iteration for each kind of routing, and the kind of each table by its hash.

    Args:
        folder: where the trace is written.
        tokens_W: tokens of each rank, for one kind after the other in turns.
    """
    ranks = len(tokens_W[0])
    router = Router(experts=SMALL["experts"], top_k=SMALL["top_k"], groups=4, groups_kept=2)
    hosts, rails = expert_hosts(router.experts, ranks), np.arange(ranks) // 2
    kinds, rows = {}, []
    for i, text in enumerate(ROUTINGS):
        tokens = tokens_W[i % len(tokens_W)]
        if text == "trace:FILE":
            (table,) = read_trace(str(recorded(tokens, folder)), router, ranks)
        else:
            sampler = RoutingSampler(
                spec=RoutingSpec.parse(text), router=router, seed=0, iteration=i, hosts=hosts, rails=rails
            )
            table = sampler.sample(np.array(tokens))
        kinds[table.sha256] = KINDS[i]
        rows += [
            {"iteration": i, "rank": rank, "token": tok, "experts": table.experts[rank, tok].tolist()}
            for rank, count in enumerate(tokens)
            for tok in range(count)
        ]
    write_lines(folder / "every-kind.jsonl", rows)
    return folder / "every-kind.jsonl", kinds


def case_of(**params: Any) -> Case:
    return Case(pattern="moe_dispatch", nbytes=64, dtype="bfloat16", params={**SMALL, **params})


def facts_of(source: Schedule | Record) -> Any:
    """The facts of a schedule or a record, as nested data."""
    return source.facts


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
