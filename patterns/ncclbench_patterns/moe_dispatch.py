"""Tokens go to their experts and the weighted results come back: MoE dispatch and combine, phase by phase.

Every token goes to k of E experts, which are spread over the ranks, so rows of uneven number leave in an all-to-all
and partial sums return in its mirror image. The busiest rank decides. `docs/moe.md` defines phases, bytes and figures.
"""

from collections.abc import Sequence

from ncclbench.moe import LayerParams, LayerSpec, build_layer_variants
from ncclbench.schedule import Case, Schedule
from ncclbench.topology import Topology


class Params(LayerParams, frozen=True, kw_only=True):
    """Parameters of moe_dispatch."""


def size_and_dtype(params: Params) -> tuple[int, str]:
    """Bytes of the tokens of a rank, and the type of their elements: parameters say both, not -b and --dtype."""
    return LayerSpec.of(params).size_and_dtype()


def variants(case: Case, topology: Topology) -> Sequence[Schedule]:
    """One schedule for each of `routings` fresh routings.

    Raises:
        Unable: if this job's ranks cannot share the experts so.
    """
    return build_layer_variants(LayerSpec.of(case.read(Params)), topology)
