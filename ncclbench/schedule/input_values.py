"""Input values: small integers that depend on rank and position, chosen so that no reduction rounds.

A buffer repeats a vector of P values. P is a prime, several times the world size, that divides no shard. So neighboring
shards of a rank differ, and P numbers describe a rank's expected buffer of any size. Another `salt` gives other values,
so that data left from an earlier iteration are detected.

Exactness: let F be the fan-in, the number of inputs that can meet in one element. Sums are exact in any order if
F x (largest value) is at most the largest integer up to which the type has no gap (256 for bfloat16). If F itself is
larger, only one rank has a value at each position, and the others have 0 (1 for products). The same holds for minima
and maxima over many ranks in a type of few values, where a lost rank would otherwise not be detected.

Averages are exact for integers, which floor, and for groups of a power of two; otherwise the expectation has a
tolerance. An average is refused if the type cannot represent the share of one rank.
"""

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import Unable
from ncclbench.schedule.counter_rng import mix
from ncclbench.schedule.dtypes import Dtype, Redop
from ncclbench.schedule.phases import REDUCING, AllToAllV, Collective, Exchange, Kernel, Local, SimplePhase, flatten
from ncclbench.schedule.row_work import RowWork
from ncclbench.schedule.schedule import Schedule

Floats = NDArray[np.float64]

# Primes. The period is the first that is large enough for the world and divides no shard.
_PERIODS = (8191, 8179, 65537, 65539, 1048583, 1048589)
_LARGEST_VALUE = 65535
_FEWEST_VALUES = 3
# For a type of L values, a minimum over more than this times L ranks has few positions that show a missing rank: for
# 510 ranks of uint8 about 5 of 8,191.
_MOST_RANKS_PER_VALUE = 2
# Positions per rank in a period, so that each rank owns some if only one rank has a value at a position; and the length
# of a period up to which this is required.
_POSITIONS_PER_RANK, _SUFFICIENT_PERIOD = 8, 1 << 16


class Spread(Enum):
    """How the values are distributed over the ranks."""

    MOVED = "moved"  # nothing is reduced: any value of the type
    ADDED = "added"  # every rank has a value, small enough for the sum of all
    OWNED = "owned"  # one rank has a value at each position, the others the neutral element
    DOUBLED = "doubled"  # ones and twos, for products


def reductions(phases: tuple[SimplePhase, ...]) -> list[tuple[Redop, int]]:
    """The reductions of a schedule, and the number of inputs of each."""
    found = [_reduction(phase) for phase in phases]
    return [reduction for reduction in found if reduction is not None]


def _reduction(phase: SimplePhase) -> tuple[Redop, int] | None:
    match phase:
        case Collective():
            return (phase.redop, phase.members) if phase.op in REDUCING else None
        case Local():
            return (Redop.SUM, phase.chunks) if phase.kernel is Kernel.REDUCE_CHUNKS else None
        case AllToAllV() | Exchange() | RowWork():  # sums of row work are checked by the schedule's own contents
            return None
        case _:
            assert_never(phase)


@dataclass(frozen=True)
class Fill:
    """The values of one validation pass.

    Attributes:
        dtype: element type.
        world_size: R.
        period: P.
        spread: how values are distributed over ranks.
        limit: the largest value.
        neutral: the value of a rank at positions that it does not own.
        terms: the largest number of non-neutral values that meet in one element.
        salt: selects a set of values.
    """

    dtype: Dtype
    world_size: int
    period: int
    spread: Spread
    limit: int
    neutral: int
    terms: int
    salt: int

    @classmethod
    def of(cls, schedule: Schedule, salt: int) -> "Fill":
        """The fill that makes `schedule` exact.

        Raises:
            ValueError: if it mixes products with other reductions, for which no exact fill is known.
        """
        found = reductions(flatten(schedule.phases))
        spread, limit, terms = _choose(schedule.dtype, found)
        kinds = {redop for redop, _ in found}
        neutral = 1 if Redop.PROD in kinds else limit if kinds == {Redop.MIN} else 0
        period = _period(schedule)
        return cls(schedule.dtype, schedule.world_size, period, spread, limit, neutral, terms, salt)

    def values(self, rank: int, buffer: int = 0) -> Floats:
        """One period of the values of `rank` in the buffer of index `buffer`, exact integers, shape (P,)."""
        return _values(self, rank, buffer)


def rounding(dtype: Dtype, found: list[tuple[Redop, int]]) -> list[int]:
    """The group sizes of the averages that are not exact."""
    return [n for redop, n in found if redop is Redop.AVG and dtype.is_float and n & (n - 1)]


def tolerance(dtype: Dtype, found: list[tuple[Redop, int]], terms: int) -> float:
    """Largest error relative to an average of `terms` non-neutral inputs.

    A library may average by scaling each input by 1/n first. Then 1/n, the product and the expectation are rounded once
    per average, and so is every sum of two non-neutral inputs. Each rounding adds half an epsilon.
    """
    rounded = rounding(dtype, found)
    return (terms + 3 * len(rounded)) * dtype.epsilon / 2 if rounded else 0.0


def refuse_blind_averages(schedule: Schedule) -> None:
    """Refuse averages that no values can check.

    The average over n integers floors to 0 if n exceeds the largest exact integer. For floats, a library may multiply
    every input by 1/n in the type itself, and the type may not represent 1/n.

    Raises:
        Unable: naming the type and the number of ranks.
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
    """The distribution of the values, the largest value, and the largest number of terms of an element."""
    kinds = {redop for redop, _ in found}
    fan_in = int(np.prod([members for _, members in found], dtype=object))
    if kinds <= {Redop.MIN, Redop.MAX}:
        limit = min(dtype.exact, _LARGEST_VALUE)
        # Minima of maxima have no neutral element.
        return Spread.OWNED if len(kinds) == 1 and fan_in > _MOST_RANKS_PER_VALUE * limit else Spread.MOVED, limit, 1
    # A value may still meet itself: an all_reduce of an all_reduce counts it once per member.
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
    """The largest value of which `fan_in` can be added exactly; 0 if it is too small to be useful."""
    limit = min(dtype.exact // fan_in, _LARGEST_VALUE)
    if not dtype.is_float and any(redop is Redop.AVG for redop, _ in found):
        return limit if limit >= _FEWEST_VALUES else 0  # ones and zeros of all ranks have an average of 0
    if rounding(dtype, found):
        # One unit missing from the sum must exceed the tolerance, or a lost rank would look like rounding.
        limit = min(limit, int(0.5 / (fan_in * tolerance(dtype, found, fan_in))))
        return limit if limit >= _FEWEST_VALUES else 0
    return limit


def _strides(schedule: Schedule) -> set[int]:
    """Elements between the starts of neighboring shards, rows or flows, which must differ in their values."""
    itemsize = schedule.dtype.itemsize
    return {stride for phase in flatten(schedule.phases) for stride in _phase_strides(phase, itemsize)} - {0}


def _phase_strides(phase: SimplePhase, itemsize: int) -> list[int]:
    match phase:
        case Collective() | Local():
            return [phase.count]
        case AllToAllV():
            return [phase.row_bytes // itemsize]
        case Exchange():
            strides: list[int] = (np.unique(phase.nbytes) // itemsize).tolist()
            return strides
        case RowWork():  # rows have values of their own: see `Schedule.contents`
            return []
        case _:
            assert_never(phase)


def _period(schedule: Schedule) -> int:
    strides, world = _strides(schedule), schedule.world_size
    least = max(world, min(_POSITIONS_PER_RANK * world, _SUFFICIENT_PERIOD))
    for prime in _PERIODS:
        if prime > least and all(stride % prime for stride in strides):
            return prime
    raise ValueError(f"no period for a world of {world} and shards of {sorted(strides)}")


@lru_cache(maxsize=256)
def _values(fill: Fill, rank: int, buffer: int) -> Floats:
    position = np.arange(fill.period, dtype=np.uint64)
    stream = np.uint64((fill.salt * 0x9E3779B97F4A7C15 + buffer * 0xD1342543DE82EF95 + 1) % (1 << 64))
    # One random number per position that all ranks share, and one of their own.
    shared = mix(position * np.uint64(0x2545F4914F6CDD1D) + stream)
    own = mix(shared + np.uint64((rank + 1) * 0x9E3779B97F4A7C15 % (1 << 64)))
    ones_and_twos = fill.spread is Spread.DOUBLED
    sampled = own % np.uint64(2) + np.uint64(1) if ones_and_twos else own % np.uint64(fill.limit + 1)
    values = sampled.astype(np.float64)
    if fill.spread is Spread.OWNED:
        owner = (shared % np.uint64(fill.world_size)).astype(np.int64)
        # An own value is never the neutral one, which is the largest value for a minimum, and otherwise 0 or 1.
        mine = np.minimum(values, fill.limit - 1.0) if fill.neutral == fill.limit else np.maximum(values, 1.0)
        values = np.where(owner == rank, mine, float(fill.neutral))
    values.setflags(write=False)
    return values
