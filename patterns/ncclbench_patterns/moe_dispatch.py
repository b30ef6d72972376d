"""Tokens go to their experts and the weighted results come back: MoE dispatch and combine, phase by phase.

Every token goes to k of E experts, which are distributed over the ranks. So uneven numbers of rows are sent in an
all-to-all, and partial sums return in the reverse all-to-all. The busiest rank determines the time. `docs/moe.md`
defines phases, bytes and rates.
"""

from collections.abc import Sequence

from ncclbench.moe import LayerParams, LayerSpec, build_layer_variants
from ncclbench.schedule import Case, Schedule
from ncclbench.topology import Topology


class Params(LayerParams, frozen=True, kw_only=True):
    """Parameters of moe_dispatch."""


def size_and_dtype(params: Params) -> tuple[int, str]:
    """Bytes of the tokens per rank, and their element type; parameters determine both, not -b and --dtype."""
    return LayerSpec.of(params).size_and_dtype()


def variants(case: Case, topology: Topology) -> Sequence[Schedule]:
    """One schedule per routing.

    Raises:
        Unable: if this job's ranks cannot share the experts as asked.
    """
    return build_layer_variants(LayerSpec.of(case.read(Params)), topology)
