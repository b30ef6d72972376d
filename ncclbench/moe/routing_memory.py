"""What tables of an expert-parallel layer take in host memory, known before any of them is made.

Buffers are not the whole of a case: every process holds the choices of all ranks' tokens, where each of them lives, and
which rows its own ranks send and receive. That is in proportion to tokens x k x ranks: a number with a few zeros too
many would take a machine's memory before a single buffer is asked for.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass

from ncclbench.errors import TooLarge
from ncclbench.topology.host_memory import available_memory
from ncclbench.units import counted, format_bytes

# Of a choice: the expert in the routing and in its group's copy (int32 both), its rank and its domain (int64 both).
_CHOICE_BYTES = 4 + 4 + 8 + 8
# Of a choice of the routing that is being drawn, while it is sorted, hashed and counted.
_DRAWING_BYTES = 16
_WORD = 8


@dataclass(frozen=True, kw_only=True)
class RoutingMemory:
    """Numbers that tables are in proportion to.

    Attributes:
        ranks: W, of the job.
        tokens: T, of the rank that has most.
        top_k: k.
        members: N, ranks of an expert-parallel group.
        domains: D, of a group.
        routings: how many are drawn.
        dedup: whether a token goes to a rank once, or once a choice.
        hops: all-to-alls on the way out.
    """

    ranks: int
    tokens: int
    top_k: int
    members: int
    domains: int
    routings: int
    dedup: bool = True
    hops: int = 1

    @property
    def shared_bytes(self) -> int:
        """Of all ranks' tokens: choices, and whether a token goes to a rank and to a domain (a byte each)."""
        of_token = self.top_k * _CHOICE_BYTES + self.members + self.domains
        return self.ranks * self.tokens * (self.routings * of_token + self.top_k * _DRAWING_BYTES)

    @property
    def own_bytes(self) -> int:
        """Of the rows of one rank, as many received as sent: who they are, and where the kernels find them."""
        rows, slots = (min(self.top_k, self.members), self.top_k) if self.dedup else (self.top_k, 1)
        row_sets = 2 * (2 + slots) * _WORD
        plans = (2 + 2 * slots) * _WORD
        return self.routings * self.hops * self.tokens * rows * (row_sets + plans)

    @property
    def nbytes(self) -> int:
        """Of a process with one rank."""
        return self.shared_bytes + self.own_bytes

    def make_room(self, give_up: Callable[[], None]) -> None:
        """Refuse tables that the memory that is free here could not hold once.

        Args:
            give_up: lets go of what is only kept in case it is asked for again; called where that would be needed.

        Raises:
            TooLarge: naming what they need, what they are of, and what there is.
        """
        needed = self.nbytes
        if needed > available_memory():
            give_up()
            gc.collect()  # schedules and what builds them refer to each other
        available = available_memory()
        if needed > available:
            raise TooLarge(
                f"who sends which row takes {format_bytes(needed)} of host memory in every process "
                f"({counted(self.routings, 'routing')} of {counted(self.ranks, 'rank')} x {self.tokens} tokens x top "
                f"{self.top_k}), and "
                f"{format_bytes(available)} is free: lower tokens or routings, or --nproc"
            )
