"""Work on rows between the all-to-alls of an expert-parallel layer: gather, scale, weighted sum, counts to the host.

What a row is taken from differs from rank to rank and is ragged, so a phase holds a function of the rank, and only
the rank that runs it makes its plan.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from ncclbench.schedule.row_formats import FORMATS, RowFormat

Ints = NDArray[np.int64]

# An entry of routing metadata: expert + 1 (0 is none) as int32, and its weight as float32.
ENTRY_BYTES = 8


class RowKernel(StrEnum):
    """What is done.

    - ``take``: row i written is row ``index[i]`` read; -1 writes zeros.
    - ``scale``: row ``index[i]`` is decoded, multiplied by 2**exponents[i] and written as bfloat16: an expert that
      computes almost nothing.
    - ``sum``: row i written is the sum over j of weight[i, j] x row ``index[i, j]``, in float32, written as bfloat16.
    - ``to_host``: received counts become Python numbers, as the splits of an uneven all-to-all must be. It is done for
      its cost: schedules know all splits beforehand.
    """

    TAKE = "take"
    SCALE = "scale"
    SUM = "sum"
    TO_HOST = "to_host"


@dataclass(frozen=True, eq=False)
class RowPlan:
    """What one rank does in a phase.

    Attributes:
        index: rows read for each row written, shape (n,) or, for ``sum``, (n, terms); -1 is none.
        exponents: for ``scale``, shape (n,).
    """

    index: Ints
    exponents: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, np.int8))


def no_plan(_rank: int) -> RowPlan:
    """For a kernel that needs none."""
    return RowPlan(np.zeros(0, np.int64))


@dataclass(frozen=True, eq=False, kw_only=True)
class RowWork:
    """One kernel over the rows of a rank's own buffers.

    Attributes:
        label: the phase's name in samples and records.
        kernel: what is done.
        read: name of the buffer of rows read.
        write: name of the buffer written.
        read_row: bytes of a row read; for ``to_host`` of one peer's counts.
        write_row: bytes of a row written.
        read_extent: bytes of `read` touched on the rank that touches most.
        write_extent: bytes of `write` touched on the rank that touches most.
        plan: a rank's plan.
        weights: for ``sum``, the buffer of entries whose weights apply; empty for weights of 1.
        weights_extent: bytes of it.
        format: for ``scale``, how the rows read are laid out.
        hidden: for ``scale``, elements of a row.
        scales: for ``scale``, the buffer of the scales where they are not at the rows' ends.
        scales_extent: bytes of it.
    """

    label: str
    kernel: RowKernel
    read: str
    write: str
    read_row: int
    write_row: int = 0
    read_extent: int
    write_extent: int = 0
    plan: Callable[[int], RowPlan] = no_plan
    weights: str = ""
    weights_extent: int = 0
    format: RowFormat = FORMATS["bf16"]
    hidden: int = 0
    scales: str = ""
    scales_extent: int = 0

    @property
    def extra(self) -> list[tuple[str, int]]:
        """Further buffers read, and the bytes of each that are touched."""
        both = ((self.weights, self.weights_extent), (self.scales, self.scales_extent))
        return [(name, extent) for name, extent in both if name]
