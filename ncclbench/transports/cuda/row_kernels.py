"""The kernels of `RowWork` on a GPU: one launch per phase, without allocation and without waiting for the host.

The CUDA source is in ``row_kernels.cu``. Index tables and factors are copied to the device when a phase is compiled.
The call itself only launches, on the current stream, so it can be behind a gate or in a graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np

from ncclbench.buffers.arrays import Buffers
from ncclbench.errors import Unable
from ncclbench.schedule.dtypes import Array
from ncclbench.schedule.row_work import ENTRY_BYTES, RowKernel, RowPlan, RowWork
from ncclbench.transports.base import Call
from ncclbench.transports.cuda.cupy_protocols import RawModule

SOURCE = Path(__file__).with_name("row_kernels.cu")
NAMES = (
    *(f"take_{width}" for width in (16, 8, 4, 2, 1)),
    *("sum_plain", "sum_weighted", "scale_bf16", "scale_fp8", "scale_mxfp8", "scale_nvfp4"),
)

# Maximum threads per block. Along a wide row the number of threads is a whole number of warps.
_THREADS, _WARP = 256, 32
_FEWEST_THREADS = 128
# Kernels number rows and entries by int32, and a block may extend past the last row.
_MOST_INDEX = 2**31 - 1 - _THREADS
# Bytes of a word of bfloat16 results, and its elements.
_WORD, _ELEMENTS = 16, 8


class Engine(Protocol):
    """Launches the kernels; tests have one that runs them on the host."""

    def put(self, array: Array) -> Array:
        """A copy of `array` that the kernels can read."""

    def launcher(self, name: str, grid: int, block: tuple[int, int], arguments: Sequence[object]) -> Call:
        """A call that launches the kernel `name` with arrays, and NumPy scalars of the types in the source."""


class CupyEngine:
    """Launches on the current GPU."""

    def put(self, array: Array) -> Array:
        """A copy on the device."""
        import cupy

        copy: Array = cupy.asarray(array)
        return copy

    def launcher(self, name: str, grid: int, block: tuple[int, int], arguments: Sequence[object]) -> Call:
        """A launch on the stream that is current when it is called."""
        import cupy

        function = _module(cupy.cuda.runtime.getDevice()).get_function(name)
        return partial(function, (grid,), block, tuple(arguments))


@cache
def _module(_device: int) -> RawModule:
    """The compiled source; compiled once per device, and loaded before anything is timed."""
    import cupy

    module: RawModule = cupy.RawModule(code=SOURCE.read_text(), options=("-std=c++17",))
    return module


@dataclass(frozen=True)
class Shape:
    """The number of blocks, and the threads of a block along a row and over rows."""

    grid: int
    block: tuple[int, int]

    @classmethod
    def over(cls, rows: int, words: int) -> "Shape":
        """One block per wide row, or per as many narrow rows as fill it.

        Along wide rows, the number of threads leaves the fewest idle in the last round.
        """
        if words < _FEWEST_THREADS:
            along = 1 << max(0, words - 1).bit_length()
        else:
            along = min(range(_THREADS, _FEWEST_THREADS - 1, -_WARP), key=lambda n: -words % n)
        down = max(1, _THREADS // along)
        return cls(-(-rows // down), (along, down))


def kernel_call(phase: RowWork, plan: RowPlan, buffers: Buffers, engine: Engine) -> Call:
    """The ready call of `phase` on device buffers.

    Raises:
        Unable: with more rows than an int32 counts.
    """
    if max(int(plan.index.max()), plan.index.size) > _MOST_INDEX:
        raise Unable(
            f"{phase.label}: more than {_MOST_INDEX} rows or entries on a rank: GPU kernels number them by int32"
        )
    index = engine.put(np.ascontiguousarray(plan.index, dtype=np.int32))
    make = {RowKernel.TAKE: _take, RowKernel.SCALE: _scale, RowKernel.SUM: _sum}[phase.kernel]
    return make(phase, plan, index, buffers, engine)


def _raw(buffers: Buffers, name: str) -> Array:
    return buffers[name].view(np.uint8)


def _take(phase: RowWork, plan: RowPlan, index: Array, buffers: Buffers, engine: Engine) -> Call:
    width = next(w for w in (16, 8, 4, 2, 1) if phase.read_row % w == 0)
    rows, words = len(plan.index), phase.read_row // width
    shape = Shape.over(rows, words)
    arguments = (_raw(buffers, phase.write), _raw(buffers, phase.read), index, np.int32(rows), np.int32(words))
    return engine.launcher(f"take_{width}", shape.grid, shape.block, arguments)


def _sum(phase: RowWork, plan: RowPlan, index: Array, buffers: Buffers, engine: Engine) -> Call:
    rows, terms = plan.index.shape
    words = phase.write_row // _WORD
    shape = Shape.over(rows, words)
    weights = [_raw(buffers, phase.weights)[: rows * terms * ENTRY_BYTES]] if phase.weights else []
    sizes = np.int32(rows), np.int32(terms), np.int32(words)
    arguments = (_raw(buffers, phase.write), _raw(buffers, phase.read), index, *weights, *sizes)
    return engine.launcher("sum_weighted" if weights else "sum_plain", shape.grid, shape.block, arguments)


def _scale(phase: RowWork, plan: RowPlan, index: Array, buffers: Buffers, engine: Engine) -> Call:
    format, rows, words = phase.format, len(plan.index), phase.write_row // _WORD
    payload = _raw(buffers, phase.read)
    payload_bytes = format.payload_bytes(phase.hidden)
    if phase.scales:
        scales, scales_row = _raw(buffers, phase.scales), format.scale_bytes(phase.hidden)
    else:
        # Without scales the kernel does not read this argument.
        scales, scales_row = payload[payload_bytes if format.block else 0 :], phase.read_row
    factors = engine.put(np.ldexp(np.float32(1), plan.exponents).astype(np.float32))
    whole = phase.read_row % (_ELEMENTS * format.bits // 8) == 0
    shape = Shape.over(rows, words)
    sizes = np.int32(rows), np.int32(words), np.int64(phase.read_row), np.int64(scales_row), np.int32(whole)
    arguments = (_raw(buffers, phase.write), payload, scales, index, factors, *sizes)
    return engine.launcher(f"scale_{format.name}", shape.grid, shape.block, arguments)
