"""Memory from ncclMemAlloc: blocks that cases take in turn, kept with their registrations until all is over.

When a graph is captured NCCL registers its buffers once more, and lets go of that only some launches after the graph
is gone. Memory that came again at the same address before that would be found registered, and peers would write to
where it was. So no block is given back between cases; it is, when the communicators are gone.

NCCL wants all ranks to register alike. So what a case gets depends on the plan and on the cases before it alone, never
on when an array was collected.
"""

from collections.abc import Iterable
from itertools import zip_longest

from ncclbench.buffers.nccl_library import NcclLibrary, loaded_nccl
from ncclbench.errors import EnvironmentFault

# What a driver gives at the least.
_GRAIN = 2 << 20


class NcclMemory:
    """A block from ncclMemAlloc, which NCCL can register with communicators.

    Args:
        nbytes: how much.
    """

    def __init__(self, nbytes: int) -> None:
        """Allocate.

        Raises:
            EnvironmentFault: if NCCL cannot, with its code.
        """
        paths = loaded_nccl()
        if not paths:
            raise EnvironmentFault("no NCCL library is loaded to allocate from: use --buffers pool with this transport")
        self._library = NcclLibrary(paths[0])
        self.pointer, self.nbytes = self._library.allocate(nbytes), nbytes
        self._handles: dict[int, int] = {}

    def register(self, communicator: int) -> bool:
        """Register with a communicator, which must outlive the registration; whether NCCL could."""
        if communicator not in self._handles:
            handle = self._library.register(communicator, self.pointer, self.nbytes)
            if handle is None:
                return False
            self._handles[communicator] = handle
        return True

    def deregister(self) -> None:
        """Undo every registration."""
        while self._handles:
            self._library.deregister(*self._handles.popitem())

    def free(self) -> None:
        """Give the memory back, which nothing may use any longer."""
        self._library.free(self.pointer)


class Blocks:
    """All blocks of a process, and the sizes of those that its plan will need."""

    def __init__(self) -> None:
        """Nothing is planned or allocated."""
        self._planned: list[int] = []
        self._free: list[NcclMemory] = []
        self._taken: list[NcclMemory] = []

    def plan(self, sizes: Iterable[int]) -> None:
        """Allocate blocks of these sizes, as `widened` has made them of a plan's cases, when they are first needed."""
        self._planned = list(sizes)

    def begin_case(self) -> None:
        """The case before is over, and its blocks may be taken again, the oldest first."""
        self._free, self._taken = [*self._taken, *self._free], []

    def take(self, nbytes: int) -> NcclMemory:
        """The smallest free block that is large enough, made now if need be.

        Raises:
            EnvironmentFault: if NCCL has no memory for it.
        """
        least = min((n for n in self._planned if n >= nbytes), default=None)
        found = min((block for block in self._free if block.nbytes >= nbytes), key=lambda b: b.nbytes, default=None)
        if found is not None and (least is None or found.nbytes <= least):
            self._free.remove(found)
        else:
            found = NcclMemory(nbytes if least is None else least)
            if least is not None:
                self._planned.remove(least)
        self._taken.append(found)
        return found

    def at(self, pointer: int) -> NcclMemory | None:
        """The block of the running case that begins at an address."""
        return next((block for block in self._taken if block.pointer == pointer), None)

    def deregister_all(self) -> None:
        """Undo all registrations, for communicators are about to go."""
        for block in (*self._taken, *self._free):
            block.deregister()

    def free_all(self) -> None:
        """Give everything back, when graphs, registrations and communicators are gone."""
        for block in (*self._taken, *self._free):
            block.free()
        self._planned, self._free, self._taken = [], [], []


BLOCKS = Blocks()


def widened(blocks: Iterable[int], sizes: Iterable[int]) -> tuple[int, ...]:
    """Sizes of blocks, the largest first, that serve whatever `blocks` serve, and a case with buffers of `sizes`.

    Where the k-th largest block is no smaller than any case's k-th largest buffer, `Blocks.take` serves every case.

    Args:
        blocks: what this function has returned for other cases.
        sizes: in any order; they are rounded up to what a driver gives.
    """
    asked = sorted((-(-size // _GRAIN) * _GRAIN for size in sizes), reverse=True)
    return tuple(map(max, zip_longest(blocks, asked, fillvalue=0)))
