"""MoE on a real GPU: the kernels on rows against NumPy to the bit, and every variant behind a gate and in a graph."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gpu.conftest import GPUS, WORLDS, Records
from tests.helpers.rows import LAYERS, works


@pytest.mark.parametrize("params", LAYERS, ids=lambda params: "-".join(map(str, params.values())))
def test_kernels_and_numpy_agree_to_the_bit(params: dict[str, Any]) -> None:
    import cupy

    from ncclbench.transports._row_work import row_call

    done = set()
    for work in works(params):
        buffers = work.filled(np.random.default_rng(5))
        expected = work.on_host(buffers)
        there = {name: cupy.asarray(array) for name, array in buffers.items()}
        row_call(work.phase, work.rank, there)()
        cupy.cuda.get_current_stream().synchronize()
        wrong = {name: int(np.count_nonzero(cupy.asnumpy(there[name]) != expected[name])) for name in there}
        assert not any(wrong.values()), (work.phase.label, work.rank, wrong)
        done.add(work.phase.kernel)
    assert len(done) == 3


PLAN = """
name = "moe-gpu"
[defaults]
iterations = {iterations}
warmup = 2
[defaults.params]
tokens = 256
hidden = 1792
experts = 64
top_k = 8
routings = 2
[[case]]
pattern = "moe_dispatch"
params = {{ variant = ["flat", "hierarchical", "control"], format = {formats} }}
[[case]]
pattern = "moe_dispatch"
params = {{ variant = ["cached", "padded"], quad = [false, true], format = {formats} }}
[[case]]
pattern = "moe_dispatch"
timing = "graph"
params = {{ variant = ["cached", "padded"], quad = {quads}, format = {formats} }}
[[case]]
pattern = "moe_overlap"
timing = ["isolated", "graph"]
params = {{ gradient_bytes = 3000000 }}
"""


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("transport", ["nccl", "cupy_nccl"])
def test_every_variant_is_right_and_gates_stay_closed(
    transport: str, ranks: int, run: Callable[..., Records], tmp_path: Path
) -> None:
    # Where ranks share a GPU every launch waits for the other's turn on it, some 5 ms: less of everything.
    shared = ranks > GPUS
    formats = ["bf16", "nvfp4"] if shared else ["bf16", "fp8", "mxfp8", "nvfp4"]
    quads, iterations = ("false", 2) if shared else ("[false, true]", 20)
    (tmp_path / "plan.toml").write_text(PLAN.format(iterations=iterations, formats=formats, quads=quads))
    records = list(run(ranks, "--plan", str(tmp_path / "plan.toml"), "--transport", transport).values())
    assert len(records) == len(formats) * (3 + 4 + (2 if shared else 4)) + 2
    for record in records:
        assert (record["status"], record["wrong"]) == ("ok", 0), (record["case"], record["reason"])
        assert not [note for note in record["notes"] if "opened by itself" in note], record["case"]
        variant = "padded" if record["pattern"] == "moe_overlap" else record["params"].get("variant", "flat")
        waits = variant in ("flat", "hierarchical")
        assert any("timed ungated" in note for note in record["notes"]) == waits, record["case"]
    both = [record for record in records if record["pattern"] == "moe_overlap"]
    assert [record["timing"] for record in both] == ["isolated", "graph"]
    assert set(both[0]["ratios"]) == {"slowdown_experts", "slowdown_data_parallel"}
    assert all(ratio > 0 for ratio in both[0]["ratios"].values())


# Small rows of DeepSeek-V3's experts, whose groups limit routing; two domains are simulated, so that hops are real.
PRODUCT = """
name = "moe-product"
[defaults]
iterations = 2
warmup = 1
[defaults.params]
model = "deepseek-v3"
hidden = 512
routings = 1
"""
FORMATS = ["bf16", "fp8", "mxfp8", "nvfp4"]
ROUTINGS = ["uniform", "group-limited", "zipf:1.0", "hot-expert:0.3", "hot-rank:0.5", "hot-rail:0.5", "maxvio:2"]


def product_of(routing: dict[str, Any], placement: str) -> list[dict[str, Any]]:
    """Every variant in every format; rows for each choice, scales apart and fractions as weights besides."""
    plain = ["flat", "cached", "padded"]
    return [
        {**routing, "variant": [*plain, "control"], "format": FORMATS},
        {**routing, "variant": "hierarchical", "placement": placement, "format": FORMATS},
        {**routing, "variant": ["flat", "cached"], "dedup": "selection", "format": ["bf16", "nvfp4"]},
        {**routing, "variant": ["flat", "padded"], "scales": "separate", "format": FORMATS[1:]},
        {**routing, "variant": plain, "weights": "float", "format": FORMATS},
    ]


def plan_of(cases: list[dict[str, Any]]) -> str:
    """A plan of moe_dispatch with these parameters; a TOML value of these kinds is spelled as in JSON."""
    tables = (
        "{ " + ", ".join(f"{name} = {json.dumps(value)}" for name, value in case.items()) + " }" for case in cases
    )
    return PRODUCT + "".join(f'[[case]]\npattern = "moe_dispatch"\nparams = {table}\n' for table in tables)


@pytest.mark.parametrize("routings", [ROUTINGS[:4], [*ROUTINGS[4:], "trace"]], ids=["first", "last"])
@pytest.mark.parametrize("transport", ["nccl", "cupy_nccl"])
def test_every_variant_format_and_routing_is_right(
    transport: str, routings: list[str], run: Callable[..., Records], tmp_path: Path
) -> None:
    ranks = WORLDS[-1]
    (tmp_path / "trace.jsonl").write_text(trace_of(ranks))
    # Where ranks share a GPU a launch takes some 5 ms: fewer routings.
    chosen = routings[1:3] if ranks > GPUS else routings
    half = ranks // 2 if ranks % 2 == 0 else ranks
    kinds: list[dict[str, Any]] = [
        {"routing": f"trace:{tmp_path / 'trace.jsonl'}"} if one == "trace" else {"tokens": 64, "routing": one}
        for one in chosen
    ]
    cases = [case for kind in kinds for case in product_of(kind, f"{half}x{ranks // half}")]
    (tmp_path / "plan.toml").write_text(plan_of(cases))
    records = list(run(ranks, "--plan", str(tmp_path / "plan.toml"), "--transport", transport).values())
    assert len(records) == len(chosen) * (5 * 4 + 2 * 2 + 2 * 3 + 3 * 4)
    bad = {r["case"]: (r["status"], r["wrong"], r["reason"]) for r in records if (r["status"], r["wrong"]) != ("ok", 0)}
    assert not bad


def trace_of(ranks: int) -> str:
    """Recorded choices of 64 tokens per rank: one expert is always chosen, and the last rank's experts never."""
    each = 256 // ranks
    rows = []
    for rank in range(ranks):
        for token in range(64):
            experts = [0, *(1 + (7 * token + 11 * rank + 13 * k) % (256 - each - 1) for k in range(7))]
            rows.append({"rank": rank, "token": token, "experts": experts})
    return "\n".join(json.dumps(row) for row in rows) + "\n"
