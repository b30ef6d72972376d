"""Memory for buffers on GPUs: over how many sets of them each case of a plan can rotate; the same on all ranks."""

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
    """What a case asks of memory.

    Attributes:
        sizes: bytes of each buffer of one set.
        variants: schedules that share them.
        kind: whose memory it is to be.
        cache: whether sets are to be rotated over.
    """

    sizes: tuple[int, ...]
    variants: int
    kind: Kind
    cache: Cache

    @property
    def nbytes(self) -> int:
        """Of one set."""
        return sum(self.sizes)


class HeldMemory(NamedTuple):
    """Memory of a GPU that one rank holds when cases have run one after the other.

    Attributes:
        blocks: from ncclMemAlloc, all of which are kept.
        other: what the largest of the other cases had, which pools keep for the next.
    """

    blocks: tuple[int, ...] = ()
    other: int = 0

    @property
    def nbytes(self) -> int:
        """In all."""
        return sum(self.blocks) + self.other

    def after(self, one: MemoryDemand, copies: int = 1) -> "HeldMemory":
        """What is held when a case with so many sets of buffers has run as well."""
        if is_registered(one.kind):
            return self._replace(blocks=widened(self.blocks, one.sizes * copies))
        return self._replace(other=max(self.other, one.nbytes * copies))


def rotations(demands: Sequence[MemoryDemand], budget: int, l2: int) -> tuple[list[Rotation], HeldMemory]:
    """The rotation of each case, and what is held when all have run.

    One set of each case fits, or the plan would have been refused. As many as a case needs to be cold are used where
    they fit into `budget` bytes with what is held besides; where they do not, the case is warm.
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
    """Bytes of buffers that every rank can have, `budget` on this one or what its GPU has left, and the largest L2.

    All ranks call it.
    """
    if budget is None:
        budget = budget_of_one_rank(memory_limits("cuda", None, 1, transport.ranks_per_gpu))
    least = transport.control.all_gather(np.array([budget, -l2_bytes()], np.int64)).min(axis=0)
    return int(least[0]), -int(least[1])
