"""An expert all-to-all at the same time as a data-parallel reduce-scatter and all-gather: the slowdown of each.

Each runs alone, then both run as branches on communicators of their own; the three take turns in one case. `ratios` in
the record has both slowdowns. `docs/moe.md` has the details.
"""

from collections.abc import Sequence

from ncclbench.moe import LayerParams, LayerSpec, build_bare_variants, overlap_schedules
from ncclbench.schedule import Case, Schedule, Unable
from ncclbench.topology import Topology


class Params(LayerParams, frozen=True, kw_only=True):
    """Parameters of moe_overlap: those of the gradients, and those of moe_dispatch, whose bare all-to-alls are run."""

    gradient_bytes: int = 64 << 20
    """bytes of gradients per rank, reduced and gathered again as float32."""
    group: str = "world"
    """ranks that reduce gradients together: world, node, domain, rail, site, or N for blocks of N."""


def size_and_dtype(params: Params) -> tuple[int, str]:
    """Bytes of the tokens per rank, and their element type."""
    return LayerSpec.of(params).size_and_dtype()


def variants(case: Case, topology: Topology) -> Sequence[Schedule]:
    """Three schedules per routing.

    Raises:
        Unable: if this job's ranks cannot share the experts or the gradients as asked.
    """
    params = case.read(Params)
    groups = topology.groups(params.group)
    if params.gradient_bytes < 4 * groups.shape[1]:
        raise Unable(f"gradient_bytes = {params.gradient_bytes} is less than one float32 for each of {groups.shape[1]}")
    layers = build_bare_variants(LayerSpec.of(params), topology)
    return [schedule for bare in layers for schedule in overlap_schedules(bare, groups, params.gradient_bytes)]
