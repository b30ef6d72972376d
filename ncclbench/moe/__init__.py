"""Expert-parallel (MoE) layers: which expert each token chooses, which rows move, and what every buffer must hold.

How the parts hang together, in the order of use:

- `layer_params`: a pattern's parameters (`LayerParams`), checked and completed from `model_presets` (`LayerSpec`);
- `routing`, `routing_sampling`, `routing_trace`: the experts that each token chooses, sampled or read from a file;
- `expert_placement`, `row_routes`: the ranks that share experts, and the rows that go from rank to rank;
- `layer_schedule`, `equal_split_control`, `gradient_overlap`: these rows as phases and buffers of a `Schedule`;
- `token_values`, `expected_buffers`: the contents of the rows, and of every buffer after the last phase;
- `routing_statistics`, `routing_memory`: what a record states of a routing, and the host memory that it takes;
- `layer_variants`: all of the above for one case. This is what a pattern calls.
"""

from ncclbench.moe.gradient_overlap import overlap_schedules
from ncclbench.moe.layer_params import LayerParams, LayerSpec
from ncclbench.moe.layer_variants import build_bare_variants, build_layer_variants

__all__ = ["LayerParams", "LayerSpec", "build_bare_variants", "build_layer_variants", "overlap_schedules"]
