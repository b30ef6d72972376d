"""Element types and reductions, and the range in which each type represents integers exactly."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import UsageError

Array = NDArray[Any]


class Redop(StrEnum):
    """Element-wise reductions, with nccl-tests' names."""

    SUM = "sum"
    PROD = "prod"
    MIN = "min"
    MAX = "max"
    AVG = "avg"


@dataclass(frozen=True, kw_only=True)
class Dtype:
    """An element type.

    Attributes:
        name: as in plans and records.
        numpy: the NumPy type; bfloat16 and 8-bit floats come from ml_dtypes.
        exact: every integer from 0 to this one is represented exactly, here and in float64.
        doublings: 2 ** this is representable, so a product of that many twos is exact.
        epsilon: spacing of the type at 1.0; 0 for integers.
    """

    name: str
    numpy: np.dtype[Any]
    exact: int
    doublings: int
    epsilon: float

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.numpy.itemsize

    @property
    def is_float(self) -> bool:
        """Whether arithmetic on it can round."""
        return self.epsilon > 0

    @property
    def smallest(self) -> tuple[float, float]:
        """The smallest positive number, and the smallest normal one; 1 for integers."""
        if not self.is_float:
            return 1.0, 1.0
        limits = ml_dtypes.finfo(self.numpy)  # type: ignore[no-untyped-call]
        return float(limits.smallest_subnormal), float(limits.smallest_normal)

    @property
    def bits(self) -> np.dtype[Any]:
        """The unsigned integer of the same width; bits compare equal for NaN too, and differ for 0 and -0."""
        return np.dtype(f"u{self.itemsize}")


DTYPES: dict[str, Dtype] = {
    dtype.name: dtype
    for dtype in (
        Dtype(name="float32", numpy=np.dtype("f4"), exact=1 << 24, doublings=127, epsilon=2.0**-23),
        Dtype(name="float16", numpy=np.dtype("f2"), exact=1 << 11, doublings=15, epsilon=2.0**-10),
        Dtype(name="bfloat16", numpy=np.dtype(ml_dtypes.bfloat16), exact=1 << 8, doublings=127, epsilon=2.0**-7),
        Dtype(name="float64", numpy=np.dtype("f8"), exact=1 << 53, doublings=1023, epsilon=2.0**-52),
        Dtype(
            name="float8_e4m3fn", numpy=np.dtype(ml_dtypes.float8_e4m3fn), exact=1 << 4, doublings=8, epsilon=2.0**-3
        ),
        Dtype(name="float8_e5m2", numpy=np.dtype(ml_dtypes.float8_e5m2), exact=1 << 3, doublings=15, epsilon=2.0**-2),
        Dtype(name="int64", numpy=np.dtype("i8"), exact=1 << 53, doublings=62, epsilon=0.0),
        Dtype(name="int32", numpy=np.dtype("i4"), exact=(1 << 31) - 1, doublings=30, epsilon=0.0),
        Dtype(name="int8", numpy=np.dtype("i1"), exact=(1 << 7) - 1, doublings=6, epsilon=0.0),
        Dtype(name="uint64", numpy=np.dtype("u8"), exact=1 << 53, doublings=63, epsilon=0.0),
        Dtype(name="uint32", numpy=np.dtype("u4"), exact=(1 << 32) - 1, doublings=31, epsilon=0.0),
        Dtype(name="uint8", numpy=np.dtype("u1"), exact=(1 << 8) - 1, doublings=7, epsilon=0.0),
    )
}


def dtype_of(name: str) -> Dtype:
    """The element type called `name`.

    Raises:
        UsageError: if there is none, naming the known ones.
    """
    if name not in DTYPES:
        raise UsageError(f"no dtype {name!r}; there are: {', '.join(DTYPES)}")
    return DTYPES[name]


@cache
def reducer(redop: Redop) -> Callable[[Array, Array], Array]:
    """The ufunc that folds two buffers; `Redop.AVG` folds as a sum and is divided once, at the end."""
    table: dict[Redop, Callable[[Array, Array], Array]] = {
        Redop.SUM: np.add,
        Redop.AVG: np.add,
        Redop.PROD: np.multiply,
        Redop.MIN: np.minimum,
        Redop.MAX: np.maximum,
    }
    return table[redop]


def finish_average(total: Array, members: int) -> Array:
    """`total` / `members`: true division for floats, floor division for integers, as in NCCL's ncclAvg."""
    if np.issubdtype(total.dtype, np.integer):
        return np.asarray(total.astype(np.int64) // members).astype(total.dtype)  # `members` may exceed a uint8
    return np.asarray(total / members)
