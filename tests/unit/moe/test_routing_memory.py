"""Memory of the tables of an expert-parallel layer: estimated, and refused before allocation."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ncclbench.errors import UsageError
from ncclbench.moe import layer_variants as layer
from ncclbench.moe import routing_memory as tables
from ncclbench.moe.routing_memory import RoutingMemory
from ncclbench.moe.routing_sampling import RoutingSampler
from ncclbench.schedule import RowWork
from ncclbench.schedule.pattern import build_variants
from ncclbench.schedule.phases import flatten
from ncclbench.topology import Topology
from tests.helpers.moe_cases import case_of

LARGE: dict[str, Any] = {"tokens": "4000", "experts": 64, "top_k": 8}


@pytest.mark.parametrize(
    ("ranks", "params"),
    [
        (4, {}),
        (16, {}),
        (4, {"top_k": 1}),
        (4, {"dedup": "selection"}),
        (4, {"variant": "padded"}),
        (4, {"variant": "hierarchical", "placement": "2x2"}),
        (4, {"variant": "cached", "routing": "hot-rank:1.0"}),
    ],
)
def test_estimate_matches_allocation_of_one_rank(
    ranks: int, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[RoutingMemory] = []
    monkeypatch.setattr(RoutingMemory, "refuse_if_too_large", lambda one, _clear_caches: sizes.append(one))
    topology = Topology.single_node(ranks)
    layer.cached_schedules.cache_clear()
    tracemalloc.start()
    try:
        variants = build_variants(case_of(**{**LARGE, "routings": 2, **params}), topology)
        works = [phase for one in variants for phase in flatten(one.phases) if isinstance(phase, RowWork)]
        _plans = [work.plan(0) for work in works]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    (size,) = sizes
    assert 0.7 < size.nbytes / peak < 1.5


def test_tables_scale_with_tokens_choices_and_ranks() -> None:
    one = RoutingMemory(ranks=8, tokens=1000, top_k=8, members=8, domains=1, routings=4)
    assert one.shared_bytes == 8 * 1000 * (4 * (8 * 24 + 9) + 8 * 16)
    assert one.own_bytes == 4 * 1000 * 8 * (20 * 8 + 18 * 8)
    assert RoutingMemory(ranks=8, tokens=10**9, top_k=8, members=8, domains=1, routings=4).nbytes == 10**6 * one.nbytes


@pytest.mark.parametrize("pattern", ["moe_dispatch", "moe_overlap"])
@pytest.mark.parametrize("tokens", [str(1 << 24), f"0,0,{1 << 24},5"])
def test_too_large_tables_are_refused_before_sampling(
    pattern: str, tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_args: object) -> None:
        raise AssertionError("a table was sampled")

    monkeypatch.setattr(RoutingSampler, "sample", never)
    monkeypatch.setattr(tables, "available_memory", lambda: 20 << 30)
    case = msgspec.structs.replace(case_of(tokens=tokens, top_k=8, routings=4), pattern=pattern)
    with pytest.raises(UsageError) as refused:
        build_variants(case, Topology.single_node(4))
    said = str(refused.value)
    assert "GiB of host memory in every process (4 routings of 4 ranks x 16777216 tokens x top 8)" in said
    assert said.endswith("and 20.0 GiB is free: lower tokens or routings, or --nproc")


def test_too_large_tables_of_a_trace_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "a.jsonl"
    trace.write_text("".join(json.dumps({"rank": 0, "token": t, "experts": [0, 1]}) + "\n" for t in range(9)))
    case = case_of(tokens="", top_k=2, routing=f"trace:{trace}")
    monkeypatch.setattr(tables, "available_memory", lambda: 1000)
    with pytest.raises(UsageError, match=r"\(1 routing of 2 ranks x 9 tokens x top 2\), and 1000 B is free"):
        build_variants(case, Topology.single_node(2))


def test_cached_tables_are_freed_before_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of recent cases are cached, which must not cause a refusal."""
    build_variants(case_of(seed=1), Topology.single_node(2))
    monkeypatch.setattr(
        tables, "available_memory", lambda: 0 if layer.cached_schedules.cache_info().currsize else 1 << 40
    )
    assert build_variants(case_of(seed=2), Topology.single_node(2))
