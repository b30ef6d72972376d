"""Ready calls for the kernels of `RowWork`: on NumPy arrays here, on a GPU in `cuda.row_kernels`.

Rows are processed in chunks, so that the decoded float32 values stay in a cache.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ncclbench.buffers.arrays import Buffers, pinned_bytes
from ncclbench.schedule.dtypes import Array
from ncclbench.schedule.row_formats import bf16_to_float, float_to_bf16
from ncclbench.schedule.row_work import ENTRY_BYTES, Ints, RowKernel, RowPlan, RowWork
from ncclbench.transports.base import Call, nothing
from ncclbench.transports.cuda.row_kernels import CupyEngine, kernel_call

# Target rows (None: all), source rows that are added to them, and the weights of all target rows or None.
Term: TypeAlias = tuple[Ints | None, Ints, NDArray[np.float32] | None]

# Bytes of float32 values per chunk on the host.
_CHUNK_BYTES = 1 << 20


def row_call(phase: RowWork, rank: int, buffers: Buffers) -> Call:
    """The ready call of `phase` on this rank."""
    if phase.kernel is RowKernel.TO_HOST:
        return CountsToHost(buffers[phase.read].view(np.uint8)[: phase.read_extent], phase.read_row)
    plan = phase.plan(rank)
    if not len(plan.index):
        return nothing
    if not is_on_host(buffers[phase.write]):
        return kernel_call(phase, plan, buffers, CupyEngine())
    source, target = _rows(buffers[phase.read], phase.read_row), _rows(buffers[phase.write], phase.write_row)
    if phase.kernel is RowKernel.TAKE:
        return _take_call(source, target[: len(plan.index)], plan.index)
    if phase.kernel is RowKernel.SCALE:
        return _scale_call(phase, plan, source, target, buffers)
    return _sum_call(phase, plan, source.view(np.uint16), target.view(np.uint16), buffers)


def is_on_host(array: object) -> bool:
    """Whether an array is NumPy's, and not CuPy's."""
    return isinstance(array, np.ndarray)


def _rows(array: Array, row_bytes: int) -> NDArray[np.uint8]:
    """A buffer as bytes, shape (rows, row_bytes)."""
    raw = array.view(np.uint8)
    return raw[: len(raw) // row_bytes * row_bytes].reshape(-1, row_bytes)


def _take_call(source: NDArray[np.uint8], target: NDArray[np.uint8], index: Ints) -> Call:
    width = next(w for w in (8, 4, 2, 1) if source.shape[1] % w == 0)
    wide, out = source.view(f"u{width}"), target.view(f"u{width}")
    blank = np.flatnonzero(index < 0)
    return partial(_take, wide, out, np.maximum(index, 0), blank if len(blank) else None)


def _take(source: Array, target: Array, index: Ints, blank: Ints | None) -> None:
    if len(source):
        source.take(index, axis=0, out=target, mode="clip")  # the default mode makes another copy
    if blank is not None:
        target[blank] = 0


def _scale_call(
    phase: RowWork, plan: RowPlan, source: NDArray[np.uint8], target: NDArray[np.uint8], buffers: Buffers
) -> Call:
    format, hidden = phase.format, phase.hidden
    payload_bytes = format.payload_bytes(hidden)
    scales = _rows(buffers[phase.scales], format.scale_bytes(hidden)) if phase.scales else source[:, payload_bytes:]
    payload, tables = source[:, :payload_bytes], format.tables()
    factors = np.ldexp(np.float32(1), plan.exponents).astype(np.float32)
    parts = [
        (target[part].view(np.uint16), plan.index[part], factors[part][:, None])
        for part in _parts(len(plan.index), hidden)
    ]

    def scale() -> None:
        for out, index, factor in parts:
            values = format.decode(payload[index], scales[index] if format.block else None, hidden, tables)
            out[:] = float_to_bf16(values * factor)

    return scale


def _sum_call(
    phase: RowWork, plan: RowPlan, source: NDArray[np.uint16], target: NDArray[np.uint16], buffers: Buffers
) -> Call:
    hidden, weights = source.shape[1], None
    if phase.weights:
        count, slots = plan.index.shape
        entries = buffers[phase.weights].view(np.uint8)[: count * slots * ENTRY_BYTES].view(np.float32)
        weights = entries.reshape(count, slots, 2)[:, :, 1]
    parts = []
    for part in _parts(len(plan.index), hidden):
        terms = []
        for j in range(plan.index.shape[1]):
            column = plan.index[part, j]
            there = np.flatnonzero(column >= 0)
            if len(there):
                # Usually all rows have a term; then no second gather is needed.
                rows = None if len(there) == len(column) else there
                own = weights[part, j] if weights is not None else None
                terms.append((rows, column[there], own))
        parts.append((target[part], terms))

    def weighted_sum() -> None:
        for out, terms in parts:
            _sum_into(out, source, terms)

    return weighted_sum


def _sum_into(out: NDArray[np.uint16], source: NDArray[np.uint16], terms: Sequence[Term]) -> None:
    """Write the sum of the terms to `out`; the terms' rows are in `source`."""
    total: NDArray[np.float32] | None = None
    for rows, index, weights in terms:
        values = bf16_to_float(source[index])
        if weights is not None:
            values *= (weights if rows is None else weights[rows])[:, None]
        if rows is None:
            # Starting from +0 gives a sum of only -0 the same sign on both paths.
            total = np.add(values, np.float32(0) if total is None else total, out=values)
        else:
            if total is None:
                total = np.zeros(out.shape, np.float32)
            total[rows] += values
    out[:] = 0 if total is None else float_to_bf16(total)


def _parts(count: int, hidden: int) -> Iterator[slice]:
    step = max(1, _CHUNK_BYTES // (4 * hidden))
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


class CountsToHost:
    """Received counts as Python numbers; on a device this waits for everything launched before.

    A real layer would launch its all-to-all with these counts. Here no call reads them: calls are compiled beforehand
    with the splits of the routing. The call exists to measure the cost of fetching the counts.

    Attributes:
        splits: rows to receive from each peer, as of the last call.
    """

    def __init__(self, counts: Any, row_bytes: int) -> None:
        """`counts` has one row of int32 per peer; its second number is the count of received rows."""
        self._counts = counts.view(np.int32).reshape(-1, row_bytes // 4)
        self._landed = (
            None if is_on_host(counts) else pinned_bytes(counts.nbytes).view(np.int32).reshape(self._counts.shape)
        )
        self.splits: list[int] = []

    def __call__(self) -> None:
        """Fetch the counts."""
        # All columns are copied: a single column would need a further kernel to pack it, and a further copy.
        counts = self._counts if self._landed is None else self._counts.get(out=self._landed)
        self.splits = counts[:, 1].tolist()
