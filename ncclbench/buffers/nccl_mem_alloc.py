"""Memory from ncclMemAlloc: blocks that cases reuse, kept with their registrations until the run ends.

When a graph is captured, NCCL registers its buffers once more. It drops that registration only some launches after the
graph is destroyed. New memory at the same address before that would count as registered, and peers would write to the
old memory. So blocks are freed only after the communicators, never between cases.

NCCL needs the same registrations on all ranks. So the blocks of a case depend only on the plan and on the cases before
it, never on when an array is garbage-collected.
"""

from collections.abc import Iterable
from itertools import zip_longest

from ncclbench.buffers.nccl_library import NcclLibrary, loaded_nccl
from ncclbench.errors import EnvironmentFault

# The driver's smallest allocation.
_GRAIN = 2 << 20


class NcclMemory:
    """A block from ncclMemAlloc, which NCCL can register with communicators.

    Args:
        nbytes: its size.
    """

    def __init__(self, nbytes: int) -> None:
        """Allocate the block.

        Raises:
            EnvironmentFault: if the allocation fails, with NCCL's code.
        """
        paths = loaded_nccl()
        if not paths:
            raise EnvironmentFault("no NCCL library is loaded to allocate from: use --buffers pool with this transport")
        self._library = NcclLibrary(paths[0])
        self.pointer, self.nbytes = self._library.allocate(nbytes), nbytes
        self._handles: dict[int, int] = {}

    def register(self, communicator: int) -> bool:
        """Register with a communicator, which must outlive the registration; returns whether NCCL could."""
        if communicator not in self._handles:
            handle = self._library.register(communicator, self.pointer, self.nbytes)
            if handle is None:
                return False
            self._handles[communicator] = handle
        return True

    def deregister(self) -> None:
        """Remove every registration."""
        while self._handles:
            self._library.deregister(*self._handles.popitem())

    def free(self) -> None:
        """Free the memory, which must not be in use."""
        self._library.free(self.pointer)


class Blocks:
    """All blocks of a process, and the sizes that its plan needs."""

    def __init__(self) -> None:
        """Plan and allocate nothing."""
        self.planned: list[int] = []
        self._free: list[NcclMemory] = []
        self.taken: list[NcclMemory] = []

    def plan(self, sizes: Iterable[int]) -> None:
        """Plan blocks of these sizes, from `widened`; each is allocated when first needed."""
        self.planned = list(sizes)

    def begin_case(self) -> None:
        """Release the blocks of the case before, which may be taken again, the oldest first."""
        self._free, self.taken = [*self.taken, *self._free], []

    def take(self, nbytes: int) -> NcclMemory:
        """The smallest free block that is large enough; allocated if there is none.

        Raises:
            EnvironmentFault: if NCCL cannot allocate it.
        """
        least = min((n for n in self.planned if n >= nbytes), default=None)
        found = min((block for block in self._free if block.nbytes >= nbytes), key=lambda b: b.nbytes, default=None)
        if found is not None and (least is None or found.nbytes <= least):
            self._free.remove(found)
        else:
            found = NcclMemory(nbytes if least is None else least)
            if least is not None:
                self.planned.remove(least)
        self.taken.append(found)
        return found

    def at(self, pointer: int) -> NcclMemory | None:
        """The block of the running case that begins at an address."""
        return next((block for block in self.taken if block.pointer == pointer), None)

    def deregister_all(self) -> None:
        """Remove all registrations; must be called before communicators are destroyed."""
        for block in (*self.taken, *self._free):
            block.deregister()

    def free_all(self) -> None:
        """Free all blocks; must be called after graphs, registrations and communicators are destroyed."""
        for block in (*self.taken, *self._free):
            block.free()
        self.planned, self._free, self.taken = [], [], []


BLOCKS = Blocks()


def widened(blocks: Iterable[int], sizes: Iterable[int]) -> tuple[int, ...]:
    """Block sizes, the largest first, that are enough for the cases of `blocks` and for a case with buffers of `sizes`.

    If the k-th largest block is at least as large as every case's k-th largest buffer, `Blocks.take` serves every case.

    Args:
        blocks: the result of this function for other cases.
        sizes: in any order; they are rounded up to the driver's smallest allocation.
    """
    asked = sorted((-(-size // _GRAIN) * _GRAIN for size in sizes), reverse=True)
    return tuple(map(max, zip_longest(blocks, asked, fillvalue=0)))
