"""Which experts each token chooses: top-k without replacement, drawn from counters.

A routing depends on (seed, iteration, rank, token) and on nothing else, so every rank of a job draws the whole table
by itself and all get the same one; its hash is compared before anything is timed.

Shapes: W ranks, T tokens (of the rank that has most), k choices, E experts.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import UsageError
from ncclbench.schedule.counter_rng import Bits, below, bits, exponential, key_of, unit, zipf_weights

Ints = NDArray[np.int64]
Choices = NDArray[np.int32]
Floats = NDArray[np.float64]

# Tokens drawn at once: E keys of 8 bytes each stay in a cache.
_BLOCK = 512
# A target MaxVio is searched for on so many tokens; what all of them reach is in the record.
_SEARCH_TOKENS = 1 << 14
_SEARCH_STEPS = 30
# How near the busiest expert's load must come to the one asked for.
_CLOSE = 0.002
_LARGEST_ALPHA = 20.0
KINDS = ("uniform", "group-limited", "zipf", "hot-expert", "hot-rank", "hot-rail", "maxvio", "trace")
_STREAM_TOKENS, _STREAM_PERMUTATION, _STREAM_HOT, _STREAM_COUNTS = range(4)


@dataclass(frozen=True, kw_only=True)
class Router:
    """What a layer's router chooses from.

    Attributes:
        experts: E, routed experts.
        top_k: k, choices a token.
        groups: groups of consecutive experts, for group-limited routing.
        groups_kept: how many of them a token may choose from.
    """

    experts: int
    top_k: int
    groups: int = 1
    groups_kept: int = 1

    def __post_init__(self) -> None:
        """Refuse what nobody can route."""
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
    """A kind of routing and its number, as in ``zipf:1.0``."""

    kind: str
    value: float = 0.0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> "RoutingSpec":
        """From the command line's text.

        Raises:
            UsageError: naming the kinds there are, or the range of the number.
        """
        kind, colon, rest = text.partition(":")
        if kind not in KINDS:
            raise UsageError(f"no routing {kind!r}; there are: {', '.join(KINDS)}")
        if kind in ("uniform", "group-limited"):
            if colon:
                raise UsageError(f"routing {kind} takes no value, got {text!r}")
            return cls(kind)
        if not rest:
            raise UsageError(f"routing {kind} needs a value: {kind}:{'FILE' if kind == 'trace' else 'NUMBER'}")
        if kind == "trace":
            return cls(kind, path=rest)
        return cls(kind, _number(kind, rest))

    def __str__(self) -> str:
        """As on the command line."""
        if self.kind == "trace":
            return f"trace:{self.path}"
        return self.kind if self.kind in ("uniform", "group-limited") else f"{self.kind}:{self.value:g}"


def _number(kind: str, text: str) -> float:
    most = {"zipf": _LARGEST_ALPHA, "maxvio": float("inf")}.get(kind, 1.0)
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
        tokens: tokens of each rank, shape (W,).
        router: what was chosen from.
        reached: for a target MaxVio, the alpha that was found.
    """

    experts: Choices
    tokens: Ints
    router: Router
    reached: float | None = None

    def __post_init__(self) -> None:
        """Freeze."""
        self.experts.setflags(write=False)

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
        """Choices beyond `factor` x the mean load of their expert: what a layer with that capacity would drop."""
        capacity = int(np.ceil(factor * self.load.mean()))
        return int(np.maximum(self.load - capacity, 0).sum())


def loads(experts: Choices | Ints, number: int) -> Ints:
    """How often each expert stands in a table, shape (number,); -1 is nobody."""
    return np.bincount(experts[experts >= 0].ravel(), minlength=number).astype(np.int64)


def token_counts(base: int, ranks: int, uneven: float, seed: int, iteration: int) -> Ints:
    """Tokens of each rank: `base`, or with `uneven` u a draw from base (1 - u) to base. Shape (ranks,)."""
    if uneven == 0:
        return np.full(ranks, base, np.int64)
    drawn = unit(bits(key_of(seed, iteration, _STREAM_COUNTS), np.arange(ranks)))
    return np.asarray(np.floor(base * (1.0 - uneven * drawn) + 0.5), np.int64)


@dataclass(frozen=True, kw_only=True)
class RoutingSampler:
    """Everything a routing is drawn from.

    Attributes:
        spec: which kind.
        router: what is chosen from.
        seed: of the run.
        iteration: which of its routings.
        hosts: the rank, counted inside its expert-parallel group, that each expert lives on; shape (E,).
        rails: the rail of each of those, shape (members,).
    """

    spec: RoutingSpec
    router: Router
    seed: int
    iteration: int
    hosts: Ints = field(repr=False)
    rails: Ints = field(repr=False)

    def sample(self, tokens_W: Ints) -> Routing:
        """The table for these ranks.

        Raises:
            UsageError: if a target MaxVio cannot be reached.
        """
        chooser, reached = self._chooser(tokens_W)
        most = int(tokens_W.max(initial=0))
        table = np.full((len(tokens_W), most, self.router.top_k), -1, np.int32)
        for rank, count in enumerate(tokens_W.tolist()):
            table[rank, :count] = self._of_rank(chooser, rank, count)
        return Routing(table, tokens_W, self.router, reached)

    def _of_rank(self, chooser: "Chooser", rank: int, count: int) -> Choices:
        key = self._key(rank)
        blocks = [chooser(key, np.arange(t, min(t + _BLOCK, count))) for t in range(0, count, _BLOCK)]
        chosen = np.concatenate(blocks) if blocks else np.zeros((0, self.router.top_k), np.int64)
        return np.sort(chosen, axis=1).astype(np.int32)

    def _key(self, rank: int) -> int:
        return key_of(self.seed, self.iteration, _STREAM_TOKENS, rank)

    def _chooser(self, tokens_W: Ints) -> tuple["Chooser", float | None]:
        router, spec = self.router, self.spec
        if spec.kind == "uniform":
            return _Uniform(router), None
        if spec.kind == "group-limited":
            if router.groups == 1:
                raise UsageError("group-limited routing needs a router with 2 groups of experts or more")
            return _GroupLimited(router), None
        if spec.kind == "zipf":
            return _zipf(router, self.seed, spec.value), None
        if spec.kind == "maxvio":
            alpha = self._search(tokens_W)
            return _zipf(router, self.seed, alpha), alpha
        return _Hot(router, spec.value, self._hot_experts()), None

    def _hot_experts(self) -> Ints:
        """The experts of the hot expert, rank or rail; which one is drawn from the seed."""
        owner = {
            "hot-expert": np.arange(self.router.experts),
            "hot-rank": self.hosts,
            "hot-rail": self.rails[self.hosts],
        }[self.spec.kind]
        present = np.unique(owner)
        hot = present[below(bits(key_of(self.seed, _STREAM_HOT), [0]), len(present))[0]]
        return np.flatnonzero(owner == hot)

    def _search(self, tokens_W: Ints) -> float:
        """The alpha at which some of the tokens have the MaxVio asked for."""
        share = -(-_SEARCH_TOKENS // max(1, len(tokens_W)))
        some = tuple(np.minimum(tokens_W, share).tolist())
        return _alpha_of(self.spec.value, self.router, self.seed, self.iteration, some)


def _zipf(router: Router, seed: int, alpha: float) -> "_Weighted":
    order = np.argsort(bits(key_of(seed, _STREAM_PERMUTATION), np.arange(router.experts)), kind="stable")
    weights = np.empty(router.experts)
    weights[order] = zipf_weights(router.experts, alpha)
    return _Weighted(router, weights)


# Searched for a second or more; cases that differ in variant or format, and the check of their memory, have the same.
@lru_cache(maxsize=64)
def _alpha_of(target: float, router: Router, seed: int, iteration: int, tokens: tuple[int, ...]) -> float:
    """The alpha of Zipf at which the first `tokens` of each rank have this MaxVio."""
    # The keys are drawn once: only the weights change from one step to the next.
    held = [
        exponential(_lanes(key_of(seed, iteration, _STREAM_TOKENS, rank), np.arange(count), router.experts))
        for rank, count in enumerate(tokens)
    ]

    def max_vio(alpha: float) -> float:
        chooser = _zipf(router, seed, alpha)
        total = np.zeros(router.experts, np.int64)
        for keys in held:
            total += loads(chooser.best(keys), router.experts)
        return float(total.max() / max(float(total.mean()), 1e-300) - 1.0)

    return _bisect(max_vio, target, router)


def _bisect(max_vio: Callable[[float], float], target: float, router: Router) -> float:
    lowest, highest = max_vio(0.0), max_vio(_LARGEST_ALPHA)
    if target < lowest:
        raise UsageError(f"routing maxvio:{target:g} is below what so few tokens have by chance ({lowest:.3g})")
    if target > highest:
        most = router.experts / router.top_k - 1
        raise UsageError(f"routing maxvio:{target:g} cannot be: {router.experts} experts, top {router.top_k} have at "
                         f"most {most:.4g}")  # fmt: skip
    low, high = 0.0, _LARGEST_ALPHA
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        found = max_vio(middle)
        if abs(found - target) <= _CLOSE * (1.0 + target):
            return middle
        low, high = (middle, high) if found < target else (low, middle)
    return (low + high) / 2


Chooser = Callable[[int, Ints], Ints]


@dataclass(frozen=True)
class _Uniform:
    """Every set of k experts is equally likely: Floyd's algorithm, k draws a token."""

    router: Router

    def __call__(self, key: int, tokens_B: Ints) -> Ints:
        k = self.router.top_k
        return distinct(key, tokens_B * (k + 1) + 1, self.router.experts, k)


def distinct(key: int, first_counter_B: Ints, number: int, k: int) -> Ints:
    """`k` different numbers below `number` for each counter, shape (B, k); every set is equally likely.

    Source: Bentley and Floyd, A sample of brilliance, CACM 30 (1987).
    """
    chosen = np.empty((len(first_counter_B), k), np.int64)
    for i, top in enumerate(range(number - k, number)):
        drawn = below(bits(key, first_counter_B + i), top + 1)
        taken = (chosen[:, :i] == drawn[:, None]).any(axis=1)
        chosen[:, i] = np.where(taken, top, drawn)
    return chosen


@dataclass(frozen=True, eq=False)
class _Weighted:
    """Gumbel-top-k: k experts without replacement, each draw in proportion to the weights of those left.

    The Gumbel keys ln(w) + G are compared as exponential ones, X / w: the k smallest are the same. Source: Kool, van
    Hoof and Welling, ICML 2019; Efraimidis and Spirakis, 2006.
    """

    router: Router
    weights: Floats

    def __call__(self, key: int, tokens_B: Ints) -> Ints:
        return self.best(exponential(_lanes(key, tokens_B, self.router.experts)))

    def best(self, keys_BE: Floats) -> Ints:
        """The k experts whose keys are smallest once weighted, shape (B, k)."""
        k = self.router.top_k
        return np.asarray(np.argpartition(keys_BE / self.weights, k - 1, axis=1)[:, :k])


def _lanes(key: int, tokens_B: Ints, experts: int) -> Bits:
    """Random bits for each token and expert, shape (B, E)."""
    return bits(key, tokens_B[:, None] * experts + np.arange(experts))


@dataclass(frozen=True)
class _GroupLimited:
    """The groups with the largest sums of their two best scores are kept; the k best of those are chosen.

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2 (node-limited routing), as in its reference gate.
    """

    router: Router

    def __call__(self, key: int, tokens_B: Ints) -> Ints:
        e, k, groups, kept = self.router.experts, self.router.top_k, self.router.groups, self.router.groups_kept
        size, number = e // groups, len(tokens_B)
        scores = unit(_lanes(key, tokens_B, e))
        grouped = scores.reshape(number, groups, size)
        best = np.partition(grouped, size - 2, axis=2)[:, :, size - 2 :].sum(axis=2) if size > 1 else grouped[:, :, 0]
        dropped = np.argsort(best, axis=1, kind="stable")[:, : groups - kept]
        np.put_along_axis(grouped, dropped[:, :, None], -1.0, axis=1)
        return np.asarray(np.argpartition(-grouped.reshape(number, e), k - 1, axis=1)[:, :k])


@dataclass(frozen=True, eq=False)
class _Hot:
    """A share of the tokens has one of the hot experts for its first choice; all other choices are uniform."""

    router: Router
    share: float
    hot: Ints

    def __call__(self, key: int, tokens_B: Ints) -> Ints:
        e, k = self.router.experts, self.router.top_k
        counters = tokens_B * (k + 3)
        hit = unit(bits(key, counters)) <= self.share
        first = np.where(hit, self.hot[below(bits(key, counters + 1), len(self.hot))],
                         below(bits(key, counters + 1), e))  # fmt: skip
        if k == 1:
            return np.asarray(first[:, None])
        others = distinct(key, counters + 2, e - 1, k - 1)
        return np.concatenate([first[:, None], others + (others >= first[:, None])], axis=1)


def expert_hosts(experts: int, members: int) -> Ints:
    """Expert e lives on member floor(e R / E); with E not a multiple of R some have one expert more. Shape (E,)."""
    return np.arange(experts, dtype=np.int64) * members // experts


def expected_unique(router: Router, members: int) -> float:
    """u(R) = R [1 - C(E - E/R, k) / C(E, k)]: unique destinations a token under uniform routing."""
    e, k, own = router.experts, router.top_k, router.experts // members
    missed = 1.0
    for i in range(k):
        missed *= max(0, e - own - i) / (e - i)
    return members * (1.0 - missed)


def from_trace(choices: Sequence[Any], router: Router) -> Routing:
    """A routing from choices read elsewhere: one array of shape (tokens, k) a rank, already checked."""
    tokens_W = np.array([len(rows) for rows in choices], np.int64)
    table = np.full((len(choices), int(tokens_W.max(initial=0)), router.top_k), -1, np.int32)
    for rank, rows in enumerate(choices):
        table[rank, : len(rows)] = np.sort(np.asarray(rows, np.int32).reshape(-1, router.top_k), axis=1)
    return Routing(table, tokens_W, router)
