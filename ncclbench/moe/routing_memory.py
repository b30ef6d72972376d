"""Host memory that the tables of an expert-parallel layer take, estimated before any of them is allocated.

Besides its buffers, every process has the choices of all ranks' tokens, the destination of each choice, and the rows
that its own ranks send and receive. These tables grow with tokens x k x ranks. A number with a few zeros too many would
exhaust the memory of a machine before the first buffer is allocated.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass

from ncclbench.errors import TooLarge
from ncclbench.topology.host_memory import available_memory
from ncclbench.units import counted, format_bytes

# Per choice: the expert in the routing and in its group's copy (int32 both), its rank and its domain (int64 both).
_CHOICE_BYTES = 4 + 4 + 8 + 8
# Per choice of the routing that is being sampled: for sorting, hashing and counting.
_SAMPLING_BYTES = 16
_WORD = 8


@dataclass(frozen=True, kw_only=True)
class RoutingMemory:
    """The numbers that the size of the tables depends on.

    Attributes:
        ranks: W, ranks of the job.
        tokens: T, of the rank that has most.
        top_k: k, choices per token.
        members: N, ranks of an expert-parallel group.
        domains: D, domains of a group.
        routings: number of routings.
        dedup: whether a token is sent to a rank once, or once per choice.
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
        """Bytes for all ranks' tokens: choices, and one byte per token and rank and per token and domain."""
        per_token = self.top_k * _CHOICE_BYTES + self.members + self.domains
        return self.ranks * self.tokens * (self.routings * per_token + self.top_k * _SAMPLING_BYTES)

    @property
    def own_bytes(self) -> int:
        """Bytes for the rows of one rank, as many received as sent: their names, and their indices for the kernels."""
        rows, slots = (min(self.top_k, self.members), self.top_k) if self.dedup else (self.top_k, 1)
        row_sets = 2 * (2 + slots) * _WORD
        plans = (2 + 2 * slots) * _WORD
        return self.routings * self.hops * self.tokens * rows * (row_sets + plans)

    @property
    def nbytes(self) -> int:
        """Bytes of a process with one rank."""
        return self.shared_bytes + self.own_bytes

    def refuse_if_too_large(self, clear_caches: Callable[[], None]) -> None:
        """Refuse tables that do not fit into the free memory of this host.

        Args:
            clear_caches: frees cached schedules; called only if the tables do not fit beside them.

        Raises:
            TooLarge: naming the bytes needed, what they depend on, and the bytes free.
        """
        needed = self.nbytes
        if needed > available_memory():
            clear_caches()
            gc.collect()  # schedules and their builders refer to each other
        available = available_memory()
        if needed > available:
            raise TooLarge(
                f"the routing tables take {format_bytes(needed)} of host memory in every process "
                f"({counted(self.routings, 'routing')} of {counted(self.ranks, 'rank')} x {self.tokens} tokens x top "
                f"{self.top_k}), and "
                f"{format_bytes(available)} is free: lower tokens or routings, or --nproc"
            )
