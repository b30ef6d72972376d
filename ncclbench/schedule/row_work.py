"""Work on rows between the all-to-alls of an expert-parallel layer: gather, scale, weighted sum, counts to the host.

The sources of the rows are ragged and differ from rank to rank. So a phase has a function of the rank, and each rank
makes the plan of its own work only.
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
    """Kinds of work.

    - ``take``: row i written is row ``index[i]`` read; -1 writes zeros.
    - ``scale``: row ``index[i]`` is decoded, multiplied by 2**exponents[i] and written as bfloat16. This stands for
      an expert with almost no computation.
    - ``sum``: row i written is the sum over j of weight[i, j] x row ``index[i, j]``, in float32, written as bfloat16.
    - ``to_host``: received counts become Python numbers, as the splits of an uneven all-to-all must be. This is done
      for its cost only: schedules know all splits beforehand.
    """

    TAKE = "take"
    SCALE = "scale"
    SUM = "sum"
    TO_HOST = "to_host"


@dataclass(frozen=True, eq=False)
class RowPlan:
    """The work of one rank in a phase.

    Attributes:
        index: rows read for each row written, shape (n,) or, for ``sum``, (n, terms); -1 is none.
        exponents: for ``scale``, shape (n,).
    """

    index: Ints
    exponents: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, np.int8))


def no_plan(_rank: int) -> RowPlan:
    """An empty plan, for kernels that need none."""
    return RowPlan(np.zeros(0, np.int64))


@dataclass(frozen=True, eq=False, kw_only=True)
class RowWork:
    """One kernel over the rows of a rank's own buffers.

    Attributes:
        label: name of the phase in samples and records.
        kernel: kind of work.
        read: name of the buffer of rows that are read.
        write: name of the buffer that is written.
        read_row: bytes per row read; for ``to_host``, bytes of the counts of one peer.
        write_row: bytes per row written.
        read_extent: bytes of `read` that are used, on the rank that uses most.
        write_extent: bytes of `write` that are used, on the rank that uses most.
        plan: returns the plan of a rank.
        weights: for ``sum``, the buffer of entries whose weights apply; empty for weights of 1.
        weights_extent: bytes of it that are used.
        format: for ``scale``, the format of the rows read.
        hidden: for ``scale``, elements per row.
        scales: for ``scale``, the buffer of the scales, if they are not at the ends of the rows.
        scales_extent: bytes of it that are used.
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
        """Names of further buffers that are read, and the bytes of each that are used."""
        both = ((self.weights, self.weights_extent), (self.scales, self.scales_extent))
        return [(name, extent) for name, extent in both if name]
