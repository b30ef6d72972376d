"""Routings as data: which experts each token of each rank chose, and what kinds of routing there are.

Shapes: W ranks, T tokens (of the rank that has most), k choices, E experts.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import UsageError

Ints = NDArray[np.int64]
Choices = NDArray[np.int32]

LARGEST_ALPHA = 20.0


class RoutingKind(StrEnum):
    """How tokens choose their experts."""

    UNIFORM = "uniform"
    GROUP_LIMITED = "group-limited"
    ZIPF = "zipf"
    HOT_EXPERT = "hot-expert"
    HOT_RANK = "hot-rank"
    HOT_RAIL = "hot-rail"
    MAXVIO = "maxvio"
    TRACE = "trace"


KINDS = tuple(kind.value for kind in RoutingKind)
_WITHOUT_VALUE = frozenset({RoutingKind.UNIFORM, RoutingKind.GROUP_LIMITED})


@dataclass(frozen=True, kw_only=True)
class Router:
    """What a layer's router chooses from.

    Attributes:
        experts: E, routed experts.
        top_k: k, choices per token.
        groups: groups of consecutive experts, for group-limited routing.
        groups_kept: how many of them a token may choose from.
    """

    experts: int
    top_k: int
    groups: int = 1
    groups_kept: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers that admit no routing."""
        if self.experts < 1 or self.top_k < 1:
            raise UsageError(f"experts and top_k must be positive, got {self.experts} and {self.top_k}")
        if self.top_k > self.experts:
            raise UsageError(f"top_k = {self.top_k} of {self.experts} experts: a token chooses each at most once")
        if self.groups < 1 or self.experts % self.groups:
            raise UsageError(f"{self.experts} experts are not {self.groups} equal groups")
        if not 1 <= self.groups_kept <= self.groups:
            raise UsageError(f"groups_kept must be 1 to {self.groups}, got {self.groups_kept}")
        if self.groups_kept * (self.experts // self.groups) < self.top_k:
            raise UsageError(f"{self.groups_kept} of {self.groups} groups hold fewer than {self.top_k} experts")


@dataclass(frozen=True)
class RoutingSpec:
    """A kind of routing and its number, as in ``zipf:1.0``; for a trace, the path of the file."""

    kind: RoutingKind
    value: float = 0.0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> "RoutingSpec":
        """Convert the text of a parameter.

        Raises:
            UsageError: naming the known kinds, or the range of the number.
        """
        name, colon, rest = text.partition(":")
        if name not in KINDS:
            raise UsageError(f"no routing {name!r}; there are: {', '.join(KINDS)}")
        kind = RoutingKind(name)
        if kind in _WITHOUT_VALUE:
            if colon:
                raise UsageError(f"routing {kind} takes no value, got {text!r}")
            return cls(kind)
        if not rest:
            raise UsageError(f"routing {kind} needs a value: {kind}:{'FILE' if kind == 'trace' else 'NUMBER'}")
        if kind is RoutingKind.TRACE:
            return cls(kind, path=rest)
        return cls(kind, _number(kind, rest))

    def __str__(self) -> str:
        """The text that `parse` reads."""
        if self.kind is RoutingKind.TRACE:
            return f"trace:{self.path}"
        return str(self.kind) if self.kind in _WITHOUT_VALUE else f"{self.kind}:{self.value:g}"


def _number(kind: RoutingKind, text: str) -> float:
    most = {RoutingKind.ZIPF: LARGEST_ALPHA, RoutingKind.MAXVIO: float("inf")}.get(kind, 1.0)
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"routing {kind} needs a number, got {text!r}") from None
    if not 0 <= value <= most or value == float("inf"):
        limits = f"from 0 to {most:g}" if most < float("inf") else "of at least 0"
        raise UsageError(f"routing {kind} needs a number {limits}, got {text}")
    return value


@dataclass(frozen=True, eq=False)
class Routing:
    """Choices of every token of every rank, in ascending order.

    Attributes:
        experts: shape (W, T, k); -1 throughout for tokens that a rank does not have.
        tokens: tokens per rank, shape (W,).
        router: the experts that were chosen from.
        reached: for a target MaxVio, the alpha that was found.
    """

    experts: Choices
    tokens: Ints
    router: Router
    reached: float | None = None

    def __post_init__(self) -> None:
        """Make the table read-only."""
        self.experts.setflags(write=False)

    @classmethod
    def from_choices(cls, choices: Sequence[Ints], router: Router) -> "Routing":
        """A routing from checked choices: one array of shape (tokens, k) per rank."""
        tokens_W = np.array([len(rows) for rows in choices], np.int64)
        table_WTk = np.full((len(choices), int(tokens_W.max(initial=0)), router.top_k), -1, np.int32)
        for rank, rows in enumerate(choices):
            table_WTk[rank, : len(rows)] = np.sort(np.asarray(rows, np.int32).reshape(-1, router.top_k), axis=1)
        return cls(table_WTk, tokens_W, router)

    @cached_property
    def sha256(self) -> str:
        """Hash of counts and choices, the same for equal tables on any machine."""
        digest = hashlib.sha256(np.asarray(self.experts.shape, "<i8").tobytes())
        digest.update(self.tokens.astype("<i8").tobytes())
        digest.update(self.experts.astype("<i4").tobytes())
        return digest.hexdigest()

    @cached_property
    def load(self) -> Ints:
        """Tokens that chose each expert, shape (E,)."""
        return loads(self.experts, self.router.experts)

    @property
    def max_vio(self) -> float:
        """Max over experts of load / mean - 1. Source: Wang et al., arXiv 2408.15664, section 4.1."""
        mean = self.load.mean()
        return float(self.load.max() / mean - 1.0) if mean else 0.0

    def over_capacity(self, factor: float) -> int:
        """Choices beyond `factor` x the mean load of their expert; a layer of that capacity would drop them."""
        capacity = int(np.ceil(factor * self.load.mean()))
        return int(np.maximum(self.load - capacity, 0).sum())


def loads(experts: Choices | Ints, number: int) -> Ints:
    """How often a table contains each expert, shape (number,); entries of -1 are not counted."""
    return np.bincount(experts[experts >= 0].ravel(), minlength=number).astype(np.int64)


def expert_hosts(experts: int, members: int) -> Ints:
    """The member that each expert is on, shape (E,): floor(e R / E) for expert e of E and R members.

    If E is not a multiple of R, some members have one expert more than others.
    """
    return np.arange(experts, dtype=np.int64) * members // experts


def expected_unique(router: Router, members: int) -> float:
    """Expected number of destinations per token under uniform routing: u(R) = R [1 - C(E - E/R, k) / C(E, k)]."""
    e, k, own = router.experts, router.top_k, router.experts // members
    missed = 1.0
    for i in range(k):
        missed *= max(0, e - own - i) / (e - i)
    return members * (1.0 - missed)
