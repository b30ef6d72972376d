"""Parameters of an expert-parallel layer, as a pattern takes them, and checked with all defaults filled in."""

from dataclasses import dataclass
from enum import StrEnum

from ncclbench.errors import UsageError
from ncclbench.moe.model_presets import ModelPreset, read_model
from ncclbench.moe.routing import Router, RoutingSpec
from ncclbench.schedule.case import Params
from ncclbench.schedule.row_formats import RowFormat, format_of

_MOST_ROUTINGS = 256
_MOST_TOKENS = 1 << 24
DEFAULT_TOKENS = 4096
# As DeepSeek-V3 has; half of them are kept.
_DEFAULT_GROUPS = 8
# A row has a multiple of this many elements: whole blocks of NVFP4, and whole machine words.
_HIDDEN_UNIT = 16


class Variant(StrEnum):
    """How rows are moved."""

    FLAT = "flat"
    HIERARCHICAL = "hierarchical"
    CACHED = "cached"
    PADDED = "padded"
    CONTROL = "control"


class Dedup(StrEnum):
    """Whether a token is sent to a rank once, or once for each of its experts there."""

    RANK = "rank"
    SELECTION = "selection"


class Scales(StrEnum):
    """Whether the scales of a quantised row travel in the row, or in a message of their own."""

    PACKED = "packed"
    SEPARATE = "separate"


class Weights(StrEnum):
    """Powers of two, so that sums are exact; or any fractions, so that results have a tolerance."""

    EXACT = "exact"
    FLOAT = "float"


class LayerParams(Params, frozen=True, kw_only=True):
    """Parameters of a pattern that moves experts' rows; 0 and "" stand for the model's value, or for the whole job."""

    model: str = "deepseek-v3"
    hidden: int = 0
    experts: int = 0
    top_k: int = 0
    groups: int = 0
    """groups of consecutive experts, for routing = group-limited; by default the model's, or 8 with `experts`."""
    groups_kept: int = 0
    """groups that a token may choose from; by default the model's, or half of them."""
    ep: int = 0
    """ranks that share the experts; all of the job by default."""
    tokens: str = ""
    """tokens per rank, or a list such as 100,0,7 with one number per rank; by default 4096, or as in the trace."""
    uneven: float = 0.0
    """tokens per rank are sampled between tokens x (1 - uneven) and tokens."""
    routing: str = "uniform"
    """uniform, group-limited, zipf:A, hot-expert:F, hot-rank:F, hot-rail:F, maxvio:V or trace:FILE."""
    routings: int = 4
    """fresh routings that iterations rotate through."""
    seed: int = 0
    """seed of the routings; the values of the rows use the run's seed."""
    variant: Variant = Variant.FLAT
    dedup: Dedup = Dedup.RANK
    format: str = "bf16"
    """format of dispatched rows: bf16, fp8, mxfp8 or nvfp4; sums come back as bf16."""
    scales: Scales = Scales.PACKED
    weights: Weights = Weights.EXACT
    quad: bool = False
    """add the backward counterparts of both all-to-alls."""
    placement: str = ""
    """RANKSxDOMAINS of an expert-parallel group, such as 16x2; by default in rank order."""
    capacity: float = 1.25
    """factor of the mean load above which tokens count as over capacity; none is dropped."""


@dataclass(frozen=True)
class LayerSpec:
    """Parameters with all defaults filled in.

    Attributes:
        params: the parameters as given.
        router: the experts that tokens choose from.
        hidden: elements per token.
        format: format of dispatched rows.
        routing: the kind of routing.
    """

    params: LayerParams
    router: Router
    hidden: int
    format: RowFormat
    routing: RoutingSpec

    @classmethod
    def of(cls, params: LayerParams) -> "LayerSpec":
        """Check all that can be checked without a topology, and fill in defaults.

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
        """Row bytes of the rank that has most tokens, and the element type; for a trace, of one token."""
        given = listed_tokens(self.params.tokens)
        most = max(given, default=1 if self.routing.kind == "trace" else DEFAULT_TOKENS)
        return max(1, most) * self.format.row_bytes(self.hidden), "bfloat16" if not self.format.block else "uint8"


def _router(params: LayerParams, model: ModelPreset, spec: RoutingSpec) -> Router:
    """The experts to choose from; with groups only for group-limited routing."""
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
    tokens = listed_tokens(params.tokens)
    if tokens and max(tokens) == 0:
        raise UsageError("tokens are 0 on every rank: nothing would move")
    if tokens and max(tokens) > _MOST_TOKENS:
        raise UsageError(f"tokens must be at most {_MOST_TOKENS} per rank, got {max(tokens)}")
    if params.variant is not Variant.FLAT and params.variant is not Variant.CACHED and params.dedup is Dedup.SELECTION:
        raise UsageError(f"dedup = selection goes with variant = flat or cached, not with {params.variant}")
    if params.quad and params.variant is Variant.CONTROL:
        raise UsageError("quad goes with every variant but control")


def listed_tokens(text: str) -> list[int]:
    """The numbers of the parameter `tokens`: one, or one per rank; empty if it is not given.

    Raises:
        UsageError: if they are not whole numbers.
    """
    parts = text.split(",") if text else []
    if not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"tokens must be a whole number, or one for each rank such as 100,0,7; got {text!r}")
    return [int(part) for part in parts]
