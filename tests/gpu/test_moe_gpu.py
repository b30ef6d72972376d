"""MoE on a real GPU: the kernels on rows against NumPy to the bit, and every variant behind a gate and in a graph."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gpu.conftest import GPUS, WORLDS, Records
from tests.rows import LAYERS, works


@pytest.mark.parametrize("params", LAYERS, ids=lambda params: "-".join(map(str, params.values())))
def test_kernels_and_numpy_agree_to_the_bit(params: dict[str, Any]) -> None:
    import cupy

    from ncclbench.transports._rows import row_call

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
def test_every_variant_is_right_and_no_gate_opens_by_itself(
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
