"""From what is asked of an expert-parallel layer to its schedules, one a routing.

Patterns that move experts' rows share this: which model, how many tokens, which routing, which variant.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from threading import Lock

import msgspec
import numpy as np

from ncclbench.errors import Unable, UsageError
from ncclbench.moe.equal_split_control import build_split_control
from ncclbench.moe.layer_schedule import LayerOptions, build_layer_schedule
from ncclbench.moe.model_presets import ModelPreset, read_model
from ncclbench.moe.routing import Ints, Router, Routing, RoutingSampler, RoutingSpec, expert_hosts, token_counts
from ncclbench.moe.routing_memory import RoutingMemory
from ncclbench.moe.routing_statistics import routing_statistics
from ncclbench.moe.routing_trace import read_trace
from ncclbench.moe.row_routes import ExpertPlacement, Hop, LayerRows
from ncclbench.moe.token_values import refuse_without_values
from ncclbench.schedule.case import Params
from ncclbench.schedule.row_formats import RowFormat, format_of
from ncclbench.schedule.schedule import ForeignRate, Schedule
from ncclbench.topology import Topology

_MOST_ROUTINGS = 256
_MOST_TOKENS = 1 << 24
_DEFAULT_TOKENS = 4096
# DeepSeek-V3's, and half of them are kept.
_DEFAULT_GROUPS = 8
# Elements of a row: whole blocks of NVFP4, and rows on whole words.
_HIDDEN_UNIT = 16


class Variant(StrEnum):
    """How rows are moved."""

    FLAT = "flat"
    HIERARCHICAL = "hierarchical"
    CACHED = "cached"
    PADDED = "padded"
    CONTROL = "control"


class Dedup(StrEnum):
    """Whether a token goes to a rank once, or once for each of its experts there."""

    RANK = "rank"
    SELECTION = "selection"


class Scales(StrEnum):
    """Where the scales of a quantised row travel."""

    PACKED = "packed"
    SEPARATE = "separate"


class Weights(StrEnum):
    """Powers of two, so that sums are exact; or any fractions, with a tolerance."""

    EXACT = "exact"
    FLOAT = "float"


class LayerParams(Params, frozen=True, kw_only=True):
    """Parameters of a pattern that moves experts' rows; 0 and "" mean: as the model has it, or the whole job."""

    model: str = "deepseek-v3"
    hidden: int = 0
    experts: int = 0
    top_k: int = 0
    groups: int = 0
    """of consecutive experts, for routing = group-limited; the model's, or 8 of experts that are given."""
    groups_kept: int = 0
    """groups that a token may choose from; the model's, or half of them."""
    ep: int = 0
    """ranks that share the experts; all of the job by default."""
    tokens: str = ""
    """a rank; or a list such as 100,0,7 with one number for each rank. 4096 by default, or the trace's."""
    uneven: float = 0.0
    """tokens of a rank are drawn from tokens x (1 - uneven) to tokens."""
    routing: str = "uniform"
    """uniform, group-limited, zipf:A, hot-expert:F, hot-rank:F, hot-rail:F, maxvio:V or trace:FILE."""
    routings: int = 4
    """fresh routings that iterations rotate through."""
    seed: int = 0
    """of the routings; values have the run's seed."""
    variant: Variant = Variant.FLAT
    dedup: Dedup = Dedup.RANK
    format: str = "bf16"
    """of rows on their way out: bf16, fp8, mxfp8 or nvfp4; sums come back as bf16."""
    scales: Scales = Scales.PACKED
    weights: Weights = Weights.EXACT
    quad: bool = False
    """the backward twins of both all-to-alls follow."""
    placement: str = ""
    """RANKSxDOMAINS of an expert-parallel group, such as 16x2; by default as the ranks come."""
    capacity: float = 1.25
    """factor of the mean load beyond which tokens count as over capacity; none is dropped."""


@dataclass(frozen=True)
class LayerSpec:
    """Parameters with all defaults filled in.

    Attributes:
        params: as they were given.
        router: what tokens choose from.
        hidden: elements of a token.
        format: how rows travel out.
        spec: the routing.
    """

    params: LayerParams
    router: Router
    hidden: int
    format: RowFormat
    spec: RoutingSpec

    @classmethod
    def of(cls, params: LayerParams) -> "LayerSpec":
        """Whatever can be checked without a topology is checked here.

        Raises:
            UsageError: naming the parameter.
        """
        model = read_model(params.model)
        if not model.experts and not params.experts:
            raise UsageError(f"{params.model} is a dense model: it has no experts to send tokens to")
        for name in ("hidden", "experts", "top_k", "groups", "groups_kept", "ep"):
            if getattr(params, name) < 0:
                raise UsageError(f"{name} must not be negative, got {getattr(params, name)}")
        spec = RoutingSpec.parse(params.routing)
        router = _router(params, model, spec)
        hidden = params.hidden or model.hidden
        if hidden % _HIDDEN_UNIT:
            raise UsageError(f"hidden must be a multiple of {_HIDDEN_UNIT}, got {hidden}")
        format = format_of(params.format)
        if not format.block and params.scales is Scales.SEPARATE:
            raise UsageError(f"scales = separate, but {format.name} rows have no scales")
        _refuse_ranges(params)
        return cls(params, router, hidden, format, spec)

    def size_and_dtype(self) -> tuple[int, str]:
        """Payload bytes of the tokens of the rank that has most, as far as it is known here; element type of rows."""
        given = _listed_tokens(self.params.tokens)
        most = max(given, default=1 if self.spec.kind == "trace" else _DEFAULT_TOKENS)
        return max(1, most) * self.format.row_bytes(self.hidden), "bfloat16" if not self.format.block else "uint8"


def _router(params: LayerParams, model: ModelPreset, spec: RoutingSpec) -> Router:
    """What tokens choose from; groups only where the routing knows them, so that they limit no other."""
    experts, top_k = params.experts or model.experts, params.top_k or model.top_k
    if spec.kind != "group-limited":
        if params.groups or params.groups_kept:
            raise UsageError(f"groups and groups_kept go with routing = group-limited, not with {spec}")
        return Router(experts=experts, top_k=top_k)
    of_model = model.groups if model.groups > 1 else _DEFAULT_GROUPS if params.experts else 0
    groups = params.groups or of_model
    if groups < 2:
        why = "one group limits nothing" if params.groups else f"{params.model} has no groups of experts"
        raise UsageError(f"routing = group-limited: {why}; set groups (2 or more) and groups_kept")
    if experts % groups:
        raise UsageError(f"routing = group-limited: {experts} experts are not {groups} equal groups; set groups")
    kept = params.groups_kept or (model.groups_kept if groups == model.groups else groups // 2)
    return Router(experts=experts, top_k=top_k, groups=groups, groups_kept=kept)


def _refuse_ranges(params: LayerParams) -> None:
    if not 1 <= params.routings <= _MOST_ROUTINGS:
        raise UsageError(f"routings must be 1 to {_MOST_ROUTINGS}, got {params.routings}")
    if not 0 <= params.uneven <= 1:
        raise UsageError(f"uneven must be from 0 to 1, got {params.uneven:g}")
    if not 0 < params.capacity < float("inf"):
        raise UsageError(f"capacity must be positive, got {params.capacity:g}")
    tokens = _listed_tokens(params.tokens)
    if tokens and max(tokens) == 0:
        raise UsageError("tokens are 0 on every rank: nothing would move")
    if tokens and max(tokens) > _MOST_TOKENS:
        raise UsageError(f"tokens must be at most {_MOST_TOKENS} a rank, got {max(tokens)}")
    if params.variant is not Variant.FLAT and params.variant is not Variant.CACHED and params.dedup is Dedup.SELECTION:
        raise UsageError(f"dedup = selection goes with variant = flat or cached, not with {params.variant}")
    if params.quad and params.variant is Variant.CONTROL:
        raise UsageError("quad goes with every variant but control")


def _listed_tokens(text: str) -> list[int]:
    parts = text.split(",") if text else []
    if not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"tokens must be a whole number, or one for each rank such as 100,0,7; got {text!r}")
    return [int(part) for part in parts]


def _tokens(request: LayerSpec, world: int, iteration: int) -> Ints:
    params = request.params
    given = _listed_tokens(params.tokens) or [_DEFAULT_TOKENS]
    if len(given) not in (1, world):
        raise Unable(f"tokens has {len(given)} numbers, and this job {world} ranks")
    if len(given) > 1:
        return np.array(given, np.int64)
    counts = token_counts(given[0], world, params.uneven, params.seed, iteration)
    if not counts.any():
        counts[0] = 1
    return counts


def sample_routings(request: LayerSpec, placement: ExpertPlacement, topology: Topology) -> list[Routing]:
    """All routings of a case, fresh ones for each iteration of a rotation.

    Raises:
        UsageError: if a trace or a target is impossible, or tables of so many tokens do not fit into memory.
        Unable: if a trace or a list of tokens is for another number of ranks.
    """
    params, world = request.params, topology.world_size
    if request.spec.kind == "trace":
        if params.tokens or params.uneven:
            raise UsageError("a trace says itself how many tokens there are: leave tokens and uneven away")
        traced = read_trace(request.spec.path, request.router, world)
        _memory(request, placement, world, traced[0].experts.shape[1], len(traced)).make_room(_built.cache_clear)
        return traced
    tokens_W = [_tokens(request, world, i) for i in range(params.routings)]
    most = max(int(tokens.max()) for tokens in tokens_W)
    _memory(request, placement, world, most, params.routings).make_room(_built.cache_clear)
    members = placement.members
    hosts, rails = expert_hosts(request.router.experts, members), topology.rails[placement.groups[0]]
    return [
        RoutingSampler(
            spec=request.spec, router=request.router, seed=params.seed, iteration=i, hosts=hosts, rails=rails
        ).sample(tokens)
        for i, tokens in enumerate(tokens_W)
    ]


def _memory(request: LayerSpec, placement: ExpertPlacement, world: int, tokens: int, routings: int) -> RoutingMemory:
    return RoutingMemory(
        ranks=world,
        tokens=tokens,
        top_k=request.router.top_k,
        members=placement.members,
        domains=int(placement.domains.max()) + 1,
        routings=routings,
        dedup=request.params.dedup is Dedup.RANK,
        hops=2 if request.params.variant is Variant.HIERARCHICAL else 1,
    )


_building = Lock()


def layer_variants(request: LayerSpec, topology: Topology) -> list[Schedule]:
    """One schedule a routing; asked again for the same, the same ones: to draw them takes seconds.

    Raises:
        UsageError: if a trace or a target is impossible.
        Unable: if the job cannot be divided so.
    """
    written = 0
    if request.spec.kind == "trace":
        with suppress(OSError):
            written = Path(request.spec.path).stat().st_mtime_ns
    with _building:  # ranks that are threads of one process share them
        return list(_built(request, topology, written))


def overlap_variants(request: LayerSpec, topology: Topology) -> list[Schedule]:
    """The bare all-to-alls of each routing, in bf16, for a pattern that runs something else beside them.

    Raises:
        UsageError: if parameters ask for phases that are not run.
        Unable: as `layer_variants`.
    """
    params = request.params
    if request.format.block or params.quad or params.variant is not Variant.FLAT or params.weights is not Weights.EXACT:
        raise UsageError("only bare all-to-alls of bf16 rows run here: leave format, variant, weights and quad away")
    control = LayerSpec(
        msgspec.structs.replace(params, variant=Variant.CONTROL, dedup=params.dedup),
        request.router,
        request.hidden,
        request.format,
        request.spec,
    )
    return [schedule for schedule in layer_variants(control, topology) if "comm_only" in schedule.subtotals]


@lru_cache(maxsize=4)
def _built(request: LayerSpec, topology: Topology, _written: int) -> tuple[Schedule, ...]:
    params = request.params
    refuse_without_values(request.router.top_k, request.format)
    placement = ExpertPlacement.of(topology, params.ep or topology.world_size, params.placement)
    routings = sample_routings(request, placement, topology)
    dedup = params.dedup is Dedup.RANK
    layers = [LayerRows(r.experts, r.router.experts, placement, dedup=dedup) for r in routings]
    capacity = max(int(layer.flat_rows.max()) for layer in layers) if params.variant is Variant.PADDED else 0
    found = []
    for layer, routing in zip(layers, routings, strict=True):
        facts = routing_statistics(
            layer, _hops(request, layer), routing, request.format, request.hidden, params.capacity
        )
        if capacity:
            real = int(layer.flat_rows.sum())
            facts |= {"padded_to": capacity, "padding_ratio": capacity * layer.flat_rows.size / real}
        first, *others = _schedules(request, layer, routing, capacity)
        found += [replace(first, facts=facts, comparable=_comparable(first, layer, request)), *others]
    return tuple(found)


def _schedules(request: LayerSpec, layer: LayerRows, routing: Routing, capacity: int) -> list[Schedule]:
    """What one routing is run as: one schedule, or for the control two that take turns."""
    params = request.params
    options = LayerOptions(
        hidden=request.hidden,
        format=request.format,
        separate_scales=params.scales is Scales.SEPARATE,
        exchange_counts=params.variant in (Variant.FLAT, Variant.HIERARCHICAL),
        exact=params.weights is Weights.EXACT,
        quad=params.quad,
    )
    if params.variant is Variant.CONTROL:
        return [build_split_control(layer, routing, options, equal=equal) for equal in (False, True)]
    return [build_layer_schedule(layer, _hops(request, layer, capacity), routing, options)]


def _hops(request: LayerSpec, layer: LayerRows, capacity: int = 0) -> list[Hop]:
    """The way of the rows; `capacity` pads them."""
    return layer.hierarchical() if request.params.variant is Variant.HIERARCHICAL else layer.flat(capacity)


def _comparable(schedule: Schedule, layer: LayerRows, request: LayerSpec) -> dict[str, ForeignRate]:
    """DeepEP's figures, which count what a rank sends to itself: only beside DeepEP's own."""
    labels = [phase.label for phase in schedule.phases]
    if "dispatch" not in labels or request.params.variant in (Variant.PADDED, Variant.CONTROL):
        return {}
    rows = int(layer.flat_rows.sum(axis=1).max())
    said = "as DeepEP counts: all rows that the busiest rank {}, its own included, over the {} phase"
    return {
        "deepep_dispatch": ForeignRate(
            rows * request.format.row_bytes(request.hidden), "dispatch", said.format("receives", "dispatch")
        ),
        "deepep_combine": ForeignRate(rows * request.hidden * 2, "combine", said.format("sends back", "combine")),
    }
