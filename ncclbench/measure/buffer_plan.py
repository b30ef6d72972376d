"""Planning of buffers on GPUs: the number of buffer sets that each case rotates over, the same on all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ncclbench.buffers.arrays import WARM, Rotation, budget_of_one_rank, l2_bytes, memory_limits, rotation
from ncclbench.buffers.kinds import Cache, Kind, is_registered
from ncclbench.buffers.nccl_mem_alloc import widened
from ncclbench.transports.base import Transport


@dataclass(frozen=True)
class MemoryDemand:
    """The memory that a case needs.

    Attributes:
        sizes: bytes of each buffer of one set.
        variants: number of schedules that share the buffers.
        kind: the allocator.
        cache: ``cold`` if iterations must rotate over sets.
    """

    sizes: tuple[int, ...]
    variants: int
    kind: Kind
    cache: Cache

    @property
    def nbytes(self) -> int:
        """Bytes of one set."""
        return sum(self.sizes)


class HeldMemory(NamedTuple):
    """Memory of a GPU that one rank holds after a sequence of cases.

    Attributes:
        blocks: sizes of blocks from ncclMemAlloc, all of which are kept.
        other: bytes of the largest of the other cases, which pools keep for the next.
    """

    blocks: tuple[int, ...] = ()
    other: int = 0

    @property
    def nbytes(self) -> int:
        """All bytes."""
        return sum(self.blocks) + self.other

    def after(self, one: MemoryDemand, copies: int = 1) -> "HeldMemory":
        """The memory held after one more case with `copies` sets of buffers."""
        if is_registered(one.kind):
            return self._replace(blocks=widened(self.blocks, one.sizes * copies))
        return self._replace(other=max(self.other, one.nbytes * copies))


def rotations(demands: Sequence[MemoryDemand], budget: int, l2: int) -> tuple[list[Rotation], HeldMemory]:
    """The rotation of each case, and the memory held after all cases.

    One set of each case fits, since the plan was not refused. A case gets the sets that it needs to be cold if they fit
    into `budget` bytes together with the memory held by other cases. Otherwise the case is warm.
    """
    each, held = [], HeldMemory()
    for one in demands:
        held = held.after(one)
    for one in demands:
        wanted = rotation(one.nbytes, l2, one.cache, one.variants)
        grown = held.after(one, wanted.copies)
        fits = wanted.copies == 1 or grown.nbytes <= budget
        each.append(wanted if fits else WARM)
        held = grown if fits else held
    return each, held


def agreed_budget(transport: Transport, budget: int | None = None) -> tuple[int, int]:
    """The smallest budget of all ranks in bytes, and the largest L2; all ranks call it.

    This rank's budget is `budget`, or the free memory of its GPU.
    """
    if budget is None:
        budget = budget_of_one_rank(memory_limits("cuda", None, 1, transport.ranks_per_gpu))
    least = transport.control.all_gather(np.array([budget, -l2_bytes()], np.int64)).min(axis=0)
    return int(least[0]), -int(least[1])
