"""What every buffer of an expert-parallel layer must hold, stated from the meaning of the routing.

A buffer's rows are named by (rank, token) and by what was done to them; the bits follow from `TokenValues`. The index
tables by which rows are moved are not used here. The exception is the order of rows on arrival, which the all-to-all
itself fixes.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

from ncclbench.moe.token_values import Bytes, Floats, Ints, TokenValues
from ncclbench.schedule.dtypes import Array
from ncclbench.schedule.expected_contents import ExpectedBytes

# Bytes of expected rows made at once. Four times as many take twice as long: what is worked on leaves the cache, and
# memory is taken from the kernel and given back for every array.
_CHUNK_BYTES = 1 << 20
# Threads of a process that make them: a layer of 4,096 tokens holds more than a gigabyte of rows.
_MOST_THREADS = 8


@dataclass(frozen=True, eq=False)
class ExpectedRows:
    """Rows of a buffer by name, with what the buffer needs of each.

    Attributes:
        rank: whose token, shape (n,); -1 for a row of zeros.
        tok: which token, shape (n,).
        slots: choices carried, shape (n, S), for entries.
        factor: what some of the rows are multiplied by, from the weights (m, k) of their tokens, shape (m,).
        choices: experts of the tokens, shape (n, k).
    """

    rank: Ints
    tok: Ints
    choices: Ints
    slots: Ints = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    factor: Callable[[Floats, slice], Floats] | None = None


# What a chunk of rows looks like in memory: shape (n, row) of uint8, or of uint16 for bfloat16.
Render = Callable[[TokenValues, ExpectedRows, slice], Array]


def payload(values: TokenValues, rows: ExpectedRows, part: slice) -> Bytes:
    """Rows as they travel, without their scales."""
    return values.raw(rows.rank[part], rows.tok[part])[0]


def scales(values: TokenValues, rows: ExpectedRows, part: slice) -> Bytes:
    """The scales alone."""
    return values.raw(rows.rank[part], rows.tok[part])[1]


def packed(values: TokenValues, rows: ExpectedRows, part: slice) -> Bytes:
    """Payload and scales of each row behind each other."""
    return np.concatenate(values.raw(rows.rank[part], rows.tok[part]), axis=1)


def entries(values: TokenValues, rows: ExpectedRows, part: slice) -> Bytes:
    """Routing metadata."""
    return values.entries(rows.rank[part], rows.tok[part], rows.choices[part], rows.slots[part])


def numbers(values: TokenValues, rows: ExpectedRows, part: slice) -> NDArray[np.uint16]:
    """bfloat16 rows, multiplied."""
    rank, tok = rows.rank[part], rows.tok[part]
    factor = np.ones(len(rank), np.float32) if rows.factor is None else rows.factor(values.weights(rank, tok), part)
    return values.weighted(rank, tok, factor)


@dataclass(frozen=True, eq=False)
class RowBuffer:
    """What a buffer holds: rows of a rank, and how they are laid out."""

    rows: Callable[[int], ExpectedRows]
    render: Render
    row_bytes: int
    tolerance: float = 0.0
    backward: bool = False


@dataclass(frozen=True, eq=False)
class CountBuffer:
    """Exchanged counts: for each peer a stamp, the rows that it gets, and what its experts get; shape (N, m)."""

    numbers: Callable[[int], NDArray[np.int32]]


@dataclass(frozen=True, eq=False)
class LayerContents:
    """See `Contents`.

    Attributes:
        held: what each buffer of rows holds.
        counts: what each buffer of counts holds.
        values: the values of a pass by its salt; of the rows themselves, and of the gradients.
        allowed: tolerance of sums that are not exact; 0 where weights are powers of two.
    """

    held: Mapping[str, RowBuffer]
    counts: Mapping[str, CountBuffer]
    values: Callable[[int, bool], TokenValues]
    allowed: float

    @property
    def tolerance(self) -> float:
        """The largest of any stretch."""
        return self.allowed

    @property
    def why(self) -> str | None:
        """Why it is not zero."""
        return "fractional weights round in bfloat16 at every partial sum" if self.allowed else None

    def before(self, rank: int, buffer: str, salt: int) -> Iterator[ExpectedBytes]:
        """Inputs hold before what they hold after."""
        yield from self.after(rank, buffer, salt)

    def after(self, rank: int, buffer: str, salt: int) -> Iterator[ExpectedBytes]:
        """The rows of a buffer, some at a time."""
        if buffer in self.counts:
            table = self.counts[buffer].numbers(rank).copy()
            table[:, 0] = salt + 1  # the stamp tells counts of this pass from those of another
            yield ExpectedBytes(0, table.view(np.uint8).reshape(-1))
            return
        held = self.held.get(buffer)
        if held is None:
            return
        rows, values = held.rows(rank), self.values(salt, held.backward)
        step = max(1, _CHUNK_BYTES // max(1, held.row_bytes))
        firsts = range(0, len(rows.rank), step)
        parts = (slice(first, min(first + step, len(rows.rank))) for first in firsts)
        made = _ahead(partial(held.render, values, rows, part) for part in parts)
        for first, expected in zip(firsts, made, strict=True):
            yield ExpectedBytes(first * held.row_bytes, expected, held.tolerance)


@cache
def _threads() -> tuple[ThreadPoolExecutor, int]:
    """What makes rows beside the thread that wants them, and how many at a time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(min(cores, _MOST_THREADS), "expected-rows"), min(cores, _MOST_THREADS)


def _ahead(calls: Iterable[Callable[[], Array]]) -> Iterator[Array]:
    """What the calls return, in their order; as many as there are threads are under way at a time.

    NumPy lets go of the interpreter's lock in all that takes long here.
    """
    pool, most = _threads()
    under_way: deque[Future[Array]] = deque()
    for call in calls:
        under_way.append(pool.submit(call))
        if len(under_way) > most:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()
