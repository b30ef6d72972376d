"""The schedules of a case that moves experts' rows: one per routing, from the pattern's parameters.

Patterns of expert-parallel layers share this module.
"""

from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from threading import Lock

import msgspec
import numpy as np

from ncclbench.errors import Unable, UsageError
from ncclbench.moe.equal_split_control import build_split_control
from ncclbench.moe.expert_placement import ExpertPlacement
from ncclbench.moe.layer_params import DEFAULT_TOKENS, Dedup, LayerSpec, Scales, Variant, Weights, listed_tokens
from ncclbench.moe.layer_schedule import LayerOptions, build_layer_schedule
from ncclbench.moe.routing import Ints, Routing, RoutingKind, expert_hosts
from ncclbench.moe.routing_memory import RoutingMemory
from ncclbench.moe.routing_sampling import RoutingSampler, token_counts
from ncclbench.moe.routing_statistics import describe_routing
from ncclbench.moe.routing_trace import read_trace
from ncclbench.moe.row_routes import Hop, LayerRows
from ncclbench.moe.token_values import refuse_without_values
from ncclbench.schedule.schedule import ForeignRate, Schedule
from ncclbench.topology import Topology

_building = Lock()


def build_layer_variants(spec: LayerSpec, topology: Topology) -> list[Schedule]:
    """One schedule per routing. The last results are cached, since sampling takes seconds.

    Raises:
        UsageError: if a trace or a target MaxVio is impossible.
        Unable: if the ranks of the job cannot be divided as asked.
    """
    modified_ns = 0
    if spec.routing.kind is RoutingKind.TRACE:
        with suppress(OSError):
            modified_ns = Path(spec.routing.path).stat().st_mtime_ns
    with _building:  # ranks that are threads of one process share the result
        return list(cached_schedules(spec, topology, modified_ns))


def build_bare_variants(spec: LayerSpec, topology: Topology) -> list[Schedule]:
    """The bare all-to-alls of each routing in bf16, for a pattern that runs other phases beside them.

    Raises:
        UsageError: if parameters ask for phases that are not run.
        Unable: as `build_layer_variants`.
    """
    params = spec.params
    if spec.format.block or params.quad or params.variant is not Variant.FLAT or params.weights is not Weights.EXACT:
        raise UsageError("only bare all-to-alls of bf16 rows run here: leave format, variant, weights and quad away")
    control = replace(spec, params=msgspec.structs.replace(params, variant=Variant.CONTROL))
    return [schedule for schedule in build_layer_variants(control, topology) if "comm_only" in schedule.subtotals]


@lru_cache(maxsize=4)
def cached_schedules(spec: LayerSpec, topology: Topology, _modified_ns: int) -> tuple[Schedule, ...]:
    """See `build_layer_variants`; the time of the trace file's last change is a part of the key."""
    params = spec.params
    refuse_without_values(spec.router.top_k, spec.format)
    placement = ExpertPlacement.of(topology, params.ep or topology.world_size, params.placement)
    routings = sample_routings(spec, placement, topology)
    dedup = params.dedup is Dedup.RANK
    layers = [LayerRows(r.experts, r.router.experts, placement, dedup=dedup) for r in routings]
    capacity = max(int(layer.flat_rows.max()) for layer in layers) if params.variant is Variant.PADDED else 0
    found = []
    for layer, routing in zip(layers, routings, strict=True):
        facts = describe_routing(layer, _hops(spec, layer), routing, spec.format, spec.hidden, params.capacity)
        if capacity:
            real = int(layer.flat_rows.sum())
            facts |= {"padded_to": capacity, "padding_ratio": capacity * layer.flat_rows.size / real}
        first, *others = _schedules(spec, layer, routing, capacity)
        found += [replace(first, facts=facts, comparable=_comparable(first, layer, spec)), *others]
    return tuple(found)


def sample_routings(spec: LayerSpec, placement: ExpertPlacement, topology: Topology) -> list[Routing]:
    """All routings of a case: one per schedule that iterations rotate through.

    Raises:
        UsageError: if a trace or a target MaxVio is impossible.
        TooLarge: if the tables of so many tokens do not fit into memory.
        Unable: if a trace or a list of tokens is for another number of ranks.
    """
    params, world = spec.params, topology.world_size
    if spec.routing.kind is RoutingKind.TRACE:
        if params.tokens or params.uneven:
            raise UsageError("a trace says itself how many tokens there are: leave tokens and uneven away")
        traced = read_trace(spec.routing.path, spec.router, world)
        memory = _memory(spec, placement, world, traced[0].experts.shape[1], len(traced))
        memory.refuse_if_too_large(cached_schedules.cache_clear)
        return traced
    tokens_of_routing = [_tokens(spec, world, i) for i in range(params.routings)]
    most = max(int(tokens_W.max()) for tokens_W in tokens_of_routing)
    _memory(spec, placement, world, most, params.routings).refuse_if_too_large(cached_schedules.cache_clear)
    hosts = expert_hosts(spec.router.experts, placement.members)
    rails = topology.rails[placement.groups[0]]
    samplers = [
        RoutingSampler(spec=spec.routing, router=spec.router, seed=params.seed, iteration=i, hosts=hosts, rails=rails)
        for i in range(params.routings)
    ]
    return [sampler.sample(tokens_W) for sampler, tokens_W in zip(samplers, tokens_of_routing, strict=True)]


def _tokens(spec: LayerSpec, world: int, iteration: int) -> Ints:
    params = spec.params
    given = listed_tokens(params.tokens) or [DEFAULT_TOKENS]
    if len(given) not in (1, world):
        raise Unable(f"tokens has {len(given)} numbers, and this job {world} ranks")
    if len(given) > 1:
        return np.array(given, np.int64)
    counts_W = token_counts(given[0], world, params.uneven, params.seed, iteration)
    if not counts_W.any():
        counts_W[0] = 1
    return counts_W


def _memory(spec: LayerSpec, placement: ExpertPlacement, world: int, tokens: int, routings: int) -> RoutingMemory:
    return RoutingMemory(
        ranks=world,
        tokens=tokens,
        top_k=spec.router.top_k,
        members=placement.members,
        domains=int(placement.domains.max()) + 1,
        routings=routings,
        dedup=spec.params.dedup is Dedup.RANK,
        hops=2 if spec.params.variant is Variant.HIERARCHICAL else 1,
    )


def _schedules(spec: LayerSpec, layer: LayerRows, routing: Routing, capacity: int) -> list[Schedule]:
    """The schedules of one routing: one, or for the control two that take turns."""
    params = spec.params
    options = LayerOptions(
        hidden=spec.hidden,
        format=spec.format,
        separate_scales=params.scales is Scales.SEPARATE,
        exchange_counts=params.variant in (Variant.FLAT, Variant.HIERARCHICAL),
        exact=params.weights is Weights.EXACT,
        quad=params.quad,
    )
    if params.variant is Variant.CONTROL:
        return [build_split_control(layer, routing, options, equal=equal) for equal in (False, True)]
    return [build_layer_schedule(layer, _hops(spec, layer, capacity), routing, options)]


def _hops(spec: LayerSpec, layer: LayerRows, capacity: int = 0) -> list[Hop]:
    """The route of the rows; `capacity` pads them."""
    return layer.hierarchical() if spec.params.variant is Variant.HIERARCHICAL else layer.flat(capacity)


def _comparable(schedule: Schedule, layer: LayerRows, spec: LayerSpec) -> dict[str, ForeignRate]:
    """DeepEP's rates, which count rows that a rank sends to itself; to be compared with DeepEP's output only."""
    labels = [phase.label for phase in schedule.phases]
    if "dispatch" not in labels or spec.params.variant in (Variant.PADDED, Variant.CONTROL):
        return {}
    rows = int(layer.flat_rows.sum(axis=1).max())
    definition = "as DeepEP counts: all rows that the busiest rank {}, its own included, over the {} phase"
    return {
        "deepep_dispatch": ForeignRate(
            rows * spec.format.row_bytes(spec.hidden), "dispatch", definition.format("receives", "dispatch")
        ),
        "deepep_combine": ForeignRate(rows * spec.hidden * 2, "combine", definition.format("sends back", "combine")),
    }
