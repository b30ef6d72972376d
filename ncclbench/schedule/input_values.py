"""Fill values: small integers that depend on rank and position, chosen so that no reduction ever rounds.

A buffer repeats a vector of P values, and P is a prime several times the world that divides no shard: so neighbouring
shards of one rank differ, and a rank's expected buffer is described by P numbers however large it is. Another
`salt` gives other values, which is how data left over from an earlier iteration is found out.

Exactness. Let F be the fan-in: how many inputs can meet in one element. Sums stay exact in any order if
F x (largest value) is at most the largest integer the type holds without a gap (256 for bfloat16). Where F itself is
larger than that, only one rank has a value at each position and the others have 0 (1 for products). So it is with
minima and maxima of many ranks in a type of few values, where a rank that is lost would otherwise never be missed.
Averages are exact for integers, which floor, and where the group is a power of two; otherwise the expectation carries a
tolerance. Averages of more ranks than a type can tell from nothing are refused.
"""

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import Unable
from ncclbench.schedule.dtypes import Dtype, Redop
from ncclbench.schedule.phases import REDUCING, AllToAllV, Collective, Exchange, Kernel, Local, SimplePhase, flatten
from ncclbench.schedule.schedule import Schedule

Floats = NDArray[np.float64]

# Primes; the first that is larger than the world, some times over where it can be, and divides no shard is the period.
_PERIODS = (8191, 8179, 65537, 65539, 1048583, 1048589)
_LARGEST_VALUE = 65535
_FEWEST_VALUES = 3
# Of a type with L values, in a minimum over more than this times L ranks, few positions would show that one is missing:
# over 510 ranks of uint8 some 5 of 8,191.
_MOST_A_VALUE = 2
# In a period, so that each rank has some of its own where only one has a value at a position; and up to which length.
_POSITIONS_A_RANK, _LONG_ENOUGH = 8, 1 << 16


class Spread(Enum):
    """How the values are spread over the ranks."""

    MOVED = "moved"  # nothing is reduced: any value the type holds
    ADDED = "added"  # every rank has a value, small enough for the sum of all
    OWNED = "owned"  # one rank has a value at each position, the others the neutral element
    DOUBLED = "doubled"  # ones and twos, for products


def reductions(phases: tuple[SimplePhase, ...]) -> list[tuple[Redop, int]]:
    """The reductions of a schedule and how many inputs each joins."""
    found = []
    for phase in phases:
        if isinstance(phase, Collective) and phase.op in REDUCING:
            found.append((phase.redop, phase.members))
        elif isinstance(phase, Local) and phase.kernel is Kernel.REDUCE_CHUNKS:
            found.append((Redop.SUM, phase.chunks))
    return found


@dataclass(frozen=True)
class Fill:
    """The values of one validation pass.

    Attributes:
        dtype: element type.
        world_size: R.
        period: P.
        spread: how values are spread over ranks.
        limit: the largest value.
        neutral: what a rank holds where it has no value of its own.
        meeting: how many values other than the neutral one can meet in one element.
        salt: which set of values.
    """

    dtype: Dtype
    world_size: int
    period: int
    spread: Spread
    limit: int
    neutral: int
    meeting: int
    salt: int

    @classmethod
    def of(cls, schedule: Schedule, salt: int) -> "Fill":
        """The fill that makes `schedule` exact.

        Raises:
            ValueError: if it mixes products with other reductions, for which no exact fill is known.
        """
        found = reductions(flatten(schedule.phases))
        spread, limit, meeting = _choose(schedule.dtype, found)
        kinds = {redop for redop, _ in found}
        neutral = 1 if Redop.PROD in kinds else limit if kinds == {Redop.MIN} else 0
        period = _period(schedule)
        return cls(schedule.dtype, schedule.world_size, period, spread, limit, neutral, meeting, salt)

    def values(self, rank: int, buffer: int = 0) -> Floats:
        """One period of what `rank` is filled with, as exact integers, shape (P,)."""
        return _values(self, rank, buffer)


def rounding(dtype: Dtype, found: list[tuple[Redop, int]]) -> list[int]:
    """The group sizes of the averages that cannot be exact."""
    return [n for redop, n in found if redop is Redop.AVG and dtype.is_float and n & (n - 1)]


def tolerance(dtype: Dtype, found: list[tuple[Redop, int]], meeting: int) -> float:
    """Largest error relative to an average, where `meeting` inputs that are not neutral meet in an element.

    A library may average by scaling each input by 1/n first: 1/n, the product and the expectation are rounded once
    an average, and every sum of two inputs that are not neutral: half an epsilon each.
    """
    rounded = rounding(dtype, found)
    return (meeting + 3 * len(rounded)) * dtype.epsilon / 2 if rounded else 0.0


def refuse_blind_averages(schedule: Schedule) -> None:
    """Refuse averages whose results say nothing: whole numbers below 1, and shares that a float cannot hold.

    A library may multiply every input by 1/n, in the type itself.

    Raises:
        Unable: naming the type and how many ranks are too many for it.
    """
    dtype = schedule.dtype
    for redop, n in reductions(flatten(schedule.phases)):
        if redop is not Redop.AVG or n == 1:
            continue
        smallest, normal = dtype.smallest
        few = n > dtype.exact if not dtype.is_float else 1 / n < (normal if n & (n - 1) else smallest)
        if few:
            raise Unable(f"no values of {dtype.name} show whether an average over {n} ranks is right")


def _choose(dtype: Dtype, found: list[tuple[Redop, int]]) -> tuple[Spread, int, int]:
    """How to spread the values, the largest, and how many of them can meet."""
    kinds = {redop for redop, _ in found}
    fan_in = int(np.prod([members for _, members in found], dtype=object))
    if kinds <= {Redop.MIN, Redop.MAX}:
        limit = min(dtype.exact, _LARGEST_VALUE)
        # Minima of maxima have no neutral element.
        return Spread.OWNED if len(kinds) == 1 and fan_in > _MOST_A_VALUE * limit else Spread.MOVED, limit, 1
    # A value may still meet itself: an all_reduce of an all_reduce counts it once a member.
    repeats = fan_in // max(members for _, members in found)
    if Redop.PROD in kinds:
        if len(kinds) > 1:
            raise ValueError("no exact fill for a schedule that mixes products with other reductions")
        if fan_in <= dtype.doublings:
            return Spread.DOUBLED, 2, fan_in
        return Spread.OWNED, 2, repeats
    limit = _limit(dtype, found, fan_in)
    if limit:
        return Spread.ADDED, limit, fan_in
    return Spread.OWNED, max(1, min(dtype.exact // repeats, _LARGEST_VALUE)), repeats


def _limit(dtype: Dtype, found: list[tuple[Redop, int]], fan_in: int) -> int:
    """The largest value of which `fan_in` can be added; 0 if there is none that is worth it."""
    limit = min(dtype.exact // fan_in, _LARGEST_VALUE)
    if not dtype.is_float and any(redop is Redop.AVG for redop, _ in found):
        return limit if limit >= _FEWEST_VALUES else 0  # ones and zeros of all ranks are 0 on average
    if rounding(dtype, found):
        # One unit missing from the sum must exceed the tolerance, or a lost rank would pass as rounding.
        limit = min(limit, int(0.5 / (fan_in * tolerance(dtype, found, fan_in))))
        return limit if limit >= _FEWEST_VALUES else 0
    return limit


def _strides(schedule: Schedule) -> set[int]:
    """After how many elements the next shard, row or flow begins; it must not look like the one before."""
    found: set[int] = set()
    for phase in flatten(schedule.phases):
        if isinstance(phase, Collective | Local):
            found.add(phase.count)
        elif isinstance(phase, AllToAllV):
            found.add(phase.row_bytes // schedule.dtype.itemsize)
        elif isinstance(phase, Exchange):
            found |= set((np.unique(phase.nbytes) // schedule.dtype.itemsize).tolist())
    return found - {0}


def _period(schedule: Schedule) -> int:
    strides, world = _strides(schedule), schedule.world_size
    least = max(world, min(_POSITIONS_A_RANK * world, _LONG_ENOUGH))
    for prime in _PERIODS:
        if prime > least and all(stride % prime for stride in strides):
            return prime
    raise ValueError(f"no period for a world of {world} and shards of {sorted(strides)}")


def _mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a fixed, well-mixed number for each number, the same on every machine."""
    z = numbers.copy()
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


@lru_cache(maxsize=256)
def _values(fill: Fill, rank: int, buffer: int) -> Floats:
    position = np.arange(fill.period, dtype=np.uint64)
    stream = np.uint64((fill.salt * 0x9E3779B97F4A7C15 + buffer * 0xD1342543DE82EF95 + 1) % (1 << 64))
    # One draw of a position that all ranks share, one of their own.
    shared = _mix(position * np.uint64(0x2545F4914F6CDD1D) + stream)
    own = _mix(shared + np.uint64((rank + 1) * 0x9E3779B97F4A7C15 % (1 << 64)))
    ones_and_twos = fill.spread is Spread.DOUBLED
    drawn = own % np.uint64(2) + np.uint64(1) if ones_and_twos else own % np.uint64(fill.limit + 1)
    values = drawn.astype(np.float64)
    if fill.spread is Spread.OWNED:
        owner = (shared % np.uint64(fill.world_size)).astype(np.int64)
        # No rank's own value is the neutral one: a minimum's is the largest of all, others' are 0 and 1.
        mine = np.minimum(values, fill.limit - 1.0) if fill.neutral == fill.limit else np.maximum(values, 1.0)
        values = np.where(owner == rank, mine, float(fill.neutral))
    values.setflags(write=False)
    return values
