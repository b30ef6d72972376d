"""Routings sampled from counters: top-k without replacement, by each kind of routing.

A routing depends on (seed, iteration, rank, token) and on nothing else. Every rank of a job samples the whole table
and obtains the same one. The ranks compare its hash before anything is timed.

Shapes: W ranks, B tokens of a block, k choices, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import UsageError
from ncclbench.moe.routing import LARGEST_ALPHA, Choices, Ints, Router, Routing, RoutingKind, RoutingSpec, loads
from ncclbench.schedule.counter_rng import Bits, below, bits, exponential, key_of, unit, zipf_weights

Floats = NDArray[np.float64]

# Tokens sampled at once: E keys of 8 bytes each stay in a cache.
_BLOCK = 512
# A target MaxVio is searched for on this many tokens; the record has the MaxVio of all of them.
_SEARCH_TOKENS = 1 << 14
_SEARCH_STEPS = 30
# How near the busiest expert's load must come to the target.
_TOLERANCE = 0.002
_STREAM_TOKENS, _STREAM_PERMUTATION, _STREAM_HOT, _STREAM_COUNTS = range(4)

# Chooses for a key and for tokens (B,): experts of shape (B, k).
Chooser = Callable[[int, Ints], Ints]


def token_counts(base: int, ranks: int, uneven: float, seed: int, iteration: int) -> Ints:
    """Tokens per rank, shape (ranks,): `base`, or with `uneven` u a sample between base (1 - u) and base."""
    if uneven == 0:
        return np.full(ranks, base, np.int64)
    sampled = unit(bits(key_of(seed, iteration, _STREAM_COUNTS), np.arange(ranks)))
    return np.asarray(np.floor(base * (1.0 - uneven * sampled) + 0.5), np.int64)


@dataclass(frozen=True, kw_only=True)
class RoutingSampler:
    """Everything that a sampled routing depends on.

    Attributes:
        spec: the kind of routing.
        router: the experts to choose from.
        seed: the seed of the routings.
        iteration: number of this routing among those of the case.
        hosts: the member of the expert-parallel group that each expert is on, shape (E,).
        rails: the rail of each member, shape (members,).
    """

    spec: RoutingSpec
    router: Router
    seed: int
    iteration: int
    hosts: Ints = field(repr=False)
    rails: Ints = field(repr=False)

    def sample(self, tokens_W: Ints) -> Routing:
        """The routing of `tokens_W` tokens per rank.

        Raises:
            UsageError: if a target MaxVio cannot be reached.
        """
        chooser, reached = self._chooser(tokens_W)
        most = int(tokens_W.max(initial=0))
        table_WTk = np.full((len(tokens_W), most, self.router.top_k), -1, np.int32)
        for rank, count in enumerate(tokens_W.tolist()):
            table_WTk[rank, :count] = self._of_rank(chooser, rank, count)
        return Routing(table_WTk, tokens_W, self.router, reached)

    def _of_rank(self, chooser: Chooser, rank: int, count: int) -> Choices:
        key = key_of(self.seed, self.iteration, _STREAM_TOKENS, rank)
        blocks = [chooser(key, np.arange(t, min(t + _BLOCK, count))) for t in range(0, count, _BLOCK)]
        chosen = np.concatenate(blocks) if blocks else np.zeros((0, self.router.top_k), np.int64)
        return np.sort(chosen, axis=1).astype(np.int32)

    def _chooser(self, tokens_W: Ints) -> tuple[Chooser, float | None]:
        """How tokens choose and, for a target MaxVio, the alpha that was found."""
        router, kind, value = self.router, self.spec.kind, self.spec.value
        match kind:
            case RoutingKind.UNIFORM:
                return _Uniform(router), None
            case RoutingKind.GROUP_LIMITED:
                return _GroupLimited(router), None
            case RoutingKind.ZIPF:
                return _zipf(router, self.seed, value), None
            case RoutingKind.MAXVIO:
                alpha = self._search(tokens_W)
                return _zipf(router, self.seed, alpha), alpha
            case RoutingKind.HOT_EXPERT | RoutingKind.HOT_RANK | RoutingKind.HOT_RAIL:
                return _Hot(router, value, self._hot_experts()), None
            case RoutingKind.TRACE:
                raise ValueError("the routings of a trace are read, not sampled")
            case _:
                assert_never(kind)

    def _hot_experts(self) -> Ints:
        """The experts of the hot expert, rank or rail, which the seed selects."""
        owner_E = {
            RoutingKind.HOT_EXPERT: np.arange(self.router.experts),
            RoutingKind.HOT_RANK: self.hosts,
            RoutingKind.HOT_RAIL: self.rails[self.hosts],
        }[self.spec.kind]
        present = np.unique(owner_E)
        hot = present[below(bits(key_of(self.seed, _STREAM_HOT), [0]), len(present))[0]]
        return np.flatnonzero(owner_E == hot)

    def _search(self, tokens_W: Ints) -> float:
        """The alpha at which some of the tokens have the target MaxVio."""
        share = -(-_SEARCH_TOKENS // max(1, len(tokens_W)))
        some = tuple(np.minimum(tokens_W, share).tolist())
        return find_alpha(self.spec.value, self.router, self.seed, self.iteration, some)


def _zipf(router: Router, seed: int, alpha: float) -> "_Weighted":
    order = np.argsort(bits(key_of(seed, _STREAM_PERMUTATION), np.arange(router.experts)), kind="stable")
    weights = np.empty(router.experts)
    weights[order] = zipf_weights(router.experts, alpha)
    return _Weighted(router, weights)


# The search takes a second or more. Cases that differ in variant or format share its result.
@lru_cache(maxsize=64)
def find_alpha(target: float, router: Router, seed: int, iteration: int, tokens: tuple[int, ...]) -> float:
    """The alpha of Zipf at which the first `tokens` of each rank have this MaxVio."""
    # The keys are sampled once: only the weights change from one step to the next.
    keys_of_rank = [
        exponential(_lanes(key_of(seed, iteration, _STREAM_TOKENS, rank), np.arange(count), router.experts))
        for rank, count in enumerate(tokens)
    ]

    def max_vio(alpha: float) -> float:
        chooser = _zipf(router, seed, alpha)
        total = np.zeros(router.experts, np.int64)
        for keys_BE in keys_of_rank:
            total += loads(chooser.best(keys_BE), router.experts)
        return float(total.max() / max(float(total.mean()), 1e-300) - 1.0)

    return bisect_alpha(max_vio, target, router)


def bisect_alpha(max_vio: Callable[[float], float], target: float, router: Router) -> float:
    """The alpha at which the growing function `max_vio` reaches `target`.

    Raises:
        UsageError: if it is outside the range of the function.
    """
    lowest, highest = max_vio(0.0), max_vio(LARGEST_ALPHA)
    if target < lowest:
        raise UsageError(f"routing maxvio:{target:g} is below what so few tokens have by chance ({lowest:.3g})")
    if target > highest:
        most = router.experts / router.top_k - 1
        raise UsageError(f"routing maxvio:{target:g} cannot be: {router.experts} experts, top {router.top_k} have at "
                         f"most {most:.4g}")  # fmt: skip
    low, high = 0.0, LARGEST_ALPHA
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        found = max_vio(middle)
        if abs(found - target) <= _TOLERANCE * (1.0 + target):
            return middle
        low, high = (middle, high) if found < target else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class _Uniform:
    """Every set of k experts is equally likely: Floyd's algorithm, k samples per token."""

    router: Router

    def __call__(self, key: int, tokens_B: Ints) -> Ints:
        k = self.router.top_k
        return distinct(key, tokens_B * (k + 1) + 1, self.router.experts, k)


def distinct(key: int, first_counter_B: Ints, number: int, k: int) -> Ints:
    """`k` different numbers below `number` for each counter, shape (B, k); every set is equally likely.

    Source: Bentley and Floyd, A sample of brilliance, CACM 30 (1987).
    """
    chosen_Bk = np.empty((len(first_counter_B), k), np.int64)
    for i, top in enumerate(range(number - k, number)):
        sampled = below(bits(key, first_counter_B + i), top + 1)
        taken = (chosen_Bk[:, :i] == sampled[:, None]).any(axis=1)
        chosen_Bk[:, i] = np.where(taken, top, sampled)
    return chosen_Bk


@dataclass(frozen=True, eq=False)
class _Weighted:
    """Gumbel-top-k: k experts without replacement, each in proportion to the weights of those left.

    The Gumbel keys ln(w) + G are compared as exponential ones, X / w: the k smallest are the same. Source: Kool, van
    Hoof and Welling, ICML 2019; Efraimidis and Spirakis, 2006.
    """

    router: Router
    weights: Floats

    def __call__(self, key: int, tokens_B: Ints) -> Ints:
        return self.best(exponential(_lanes(key, tokens_B, self.router.experts)))

    def best(self, keys_BE: Floats) -> Ints:
        """The k experts whose weighted keys are smallest, shape (B, k)."""
        k = self.router.top_k
        return np.asarray(np.argpartition(keys_BE / self.weights, k - 1, axis=1)[:, :k])


def _lanes(key: int, tokens_B: Ints, experts: int) -> Bits:
    """Random bits for each token and expert, shape (B, E)."""
    return bits(key, tokens_B[:, None] * experts + np.arange(experts))


@dataclass(frozen=True)
class _GroupLimited:
    """The groups with the largest sums of their two best scores are kept; the k best experts of these are chosen.

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2 (node-limited routing), as in its reference gate.
    """

    router: Router

    def __post_init__(self) -> None:
        if self.router.groups == 1:
            raise UsageError("group-limited routing needs a router with 2 groups of experts or more")

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
    """A share of the tokens has one of the hot experts as first choice; all other choices are uniform."""

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
