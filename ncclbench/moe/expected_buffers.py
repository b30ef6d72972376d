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

# Bytes of expected rows computed at once. Four times as many take twice as long: the data leave the cache, and every
# array is allocated by the kernel and freed again.
CHUNK_BYTES = 1 << 20
# Threads per process that compute them: a layer of 4,096 tokens has more than a gigabyte of rows.
_MOST_THREADS = 8


@dataclass(frozen=True, eq=False)
class ExpectedRows:
    """The rows of a buffer by name, with the data from which their contents follow.

    Attributes:
        rank: the rank that owns the token, shape (n,); -1 for a row of zeros.
        tok: index of the token on that rank, shape (n,).
        choices: experts of the tokens, shape (n, k).
        slots: choices carried, shape (n, S), for metadata entries.
        factor: computes the factors (m,) of a slice of the rows from the weights (m, k) of their tokens.
    """

    rank: Ints
    tok: Ints
    choices: Ints
    slots: Ints = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    factor: Callable[[Floats, slice], Floats] | None = None


# Computes the bytes of a slice of the rows: shape (n, row) of uint8, or of uint16 for bfloat16.
Render = Callable[[TokenValues, ExpectedRows, slice], Array]


def render_payload(values: TokenValues, rows: ExpectedRows, part: slice) -> Bytes:
    """Rows as they are sent, without their scales."""
    return values.raw(rows.rank[part], rows.tok[part])[0]


def render_scales(values: TokenValues, rows: ExpectedRows, part: slice) -> Bytes:
    """The scales of the rows."""
    return values.raw(rows.rank[part], rows.tok[part])[1]


def render_packed(values: TokenValues, rows: ExpectedRows, part: slice) -> Bytes:
    """Payload and scales of each row, one after the other."""
    return np.concatenate(values.raw(rows.rank[part], rows.tok[part]), axis=1)


def render_entries(values: TokenValues, rows: ExpectedRows, part: slice) -> Bytes:
    """Routing metadata of the rows."""
    return values.entries(rows.rank[part], rows.tok[part], rows.choices[part], rows.slots[part])


def render_bfloat16(values: TokenValues, rows: ExpectedRows, part: slice) -> NDArray[np.uint16]:
    """Rows as bfloat16, multiplied by their factors."""
    rank, tok = rows.rank[part], rows.tok[part]
    factor = np.ones(len(rank), np.float32) if rows.factor is None else rows.factor(values.weights(rank, tok), part)
    return values.weighted(rank, tok, factor)


@dataclass(frozen=True, eq=False)
class RowBuffer:
    """A buffer of rows: the rows on each rank, and their layout.

    Attributes:
        rows: the rows on a rank.
        render: computes their bytes.
        row_bytes: bytes per row.
        tolerance: allowed error relative to the expected value.
        backward: whether the rows are gradients.
    """

    rows: Callable[[int], ExpectedRows]
    render: Render
    row_bytes: int
    tolerance: float = 0.0
    backward: bool = False


@dataclass(frozen=True, eq=False)
class CountBuffer:
    """A buffer of exchanged counts.

    Attributes:
        numbers: shape (N, m) on a rank: for each peer a stamp, the rows that it gets, and the rows per expert.
    """

    numbers: Callable[[int], NDArray[np.int32]]


@dataclass(frozen=True, eq=False)
class LayerContents:
    """The contents of all buffers of a layer; implements `Contents`.

    Attributes:
        row_buffers: the buffers of rows by name.
        count_buffers: the buffers of counts by name.
        values: the values of a pass from its salt, of the tokens (False) or of the gradients (True).
        allowed: tolerance of sums that are not exact; 0 if weights are powers of two.
    """

    row_buffers: Mapping[str, RowBuffer]
    count_buffers: Mapping[str, CountBuffer]
    values: Callable[[int, bool], TokenValues]
    allowed: float

    @property
    def tolerance(self) -> float:
        """The largest tolerance of any buffer."""
        return self.allowed

    @property
    def tolerance_reason(self) -> str | None:
        """Why the tolerance is not zero; None if it is."""
        return "fractional weights round in bfloat16 at every partial sum" if self.allowed else None

    def before(self, rank: int, buffer: str, salt: int) -> Iterator[ExpectedBytes]:
        """No phase changes an input, so its contents are those of `after`."""
        yield from self.after(rank, buffer, salt)

    def after(self, rank: int, buffer: str, salt: int) -> Iterator[ExpectedBytes]:
        """The contents of a buffer, about a megabyte at a time."""
        if buffer in self.count_buffers:
            table = self.count_buffers[buffer].numbers(rank).copy()
            table[:, 0] = salt + 1  # the stamp distinguishes this pass from others
            yield ExpectedBytes(0, table.view(np.uint8).reshape(-1))
            return
        found = self.row_buffers.get(buffer)
        if found is None:
            return
        rows, values = found.rows(rank), self.values(salt, found.backward)
        step = max(1, CHUNK_BYTES // max(1, found.row_bytes))
        firsts = range(0, len(rows.rank), step)
        parts = (slice(first, min(first + step, len(rows.rank))) for first in firsts)
        rendered = compute_ahead(partial(found.render, values, rows, part) for part in parts)
        for first, expected in zip(firsts, rendered, strict=True):
            yield ExpectedBytes(first * found.row_bytes, expected, found.tolerance)


@cache
def row_threads() -> tuple[ThreadPoolExecutor, int]:
    """The thread pool that computes rows, and its number of threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(min(cores, _MOST_THREADS), "expected-rows"), min(cores, _MOST_THREADS)


def compute_ahead(calls: Iterable[Callable[[], Array]]) -> Iterator[Array]:
    """The results of the calls, in order. As many calls as there are threads run ahead of the caller.

    NumPy releases the interpreter's lock in all long operations here.
    """
    pool, most = row_threads()
    under_way: deque[Future[Array]] = deque()
    for call in calls:
        under_way.append(pool.submit(call))
        if len(under_way) > most:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()
