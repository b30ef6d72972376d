"""Which NICs lose TCP segments, from the segments that each pair of ranks had to send again."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ncclbench.measure.network.port_watch import Counted
from ncclbench.measure.network.tcp_retransmits import turned_round
from ncclbench.schedule.phases import Ints
from ncclbench.store.records import CounterMove, Retransmits

# The share of TCP segments above which a NIC is suspected. A busy machine sends fewer than that again by mistake.
_LOSSY, _FEWEST_LOST = 0.002, 3


@dataclass(frozen=True, eq=False, kw_only=True)
class PairRetransmits:
    """TCP segments between F pairs of ranks, and how many were sent again; each array of shape (F,)."""

    src: Ints
    dst: Ints
    segments: Ints
    again: Ints

    def as_record(self) -> Retransmits:
        """The form that a record stores."""
        return Retransmits(
            src=self.src.tolist(),
            dst=self.dst.tolist(),
            segments=self.segments.tolist(),
            again=self.again.tolist(),
        )

    def losses(self, counted: Sequence[Counted]) -> list[CounterMove]:
        """The NICs that lose segments in one direction: at least 0.2%, to most of their peers.

        A NIC sends again what it loses of its own segments; its peers send again what it loses of theirs. The NIC with
        the most losses is named first and its flows are removed, or its peers would be named for it. Where neither end
        of a flow has another peer, both are named.
        """
        left = np.ones(len(self.src), bool)
        found = []
        while suspects := self._suspects(left):
            most = max(lost for lost, *_ in suspects)
            for lost, name, rank, flows in suspects:
                if lost == most:
                    found.append(CounterMove(rank=rank, port=counted[rank].device, counter=name, by=lost))
                    left[flows] = False
        return found

    def _suspects(self, left: NDArray[np.bool_]) -> list[tuple[int, str, int, NDArray[np.bool_]]]:
        """Suspected ends among the flows that are `left`: segments lost, direction, rank, and its flows."""
        found = []
        for name, ends in (("tcp_lost_sending", self.src), ("tcp_lost_receiving", self.dst)):
            for rank in np.unique(ends[left]).tolist():
                flows = left & (ends == rank)
                shares = np.sort(self.again[flows] / self.segments[flows])
                lost = int(self.again[flows].sum())
                # With two peers the better one decides: a single bad peer does not make a NIC suspect.
                if lost >= _FEWEST_LOST and shares[(len(shares) - 1) // 2] >= _LOSSY:
                    found.append((lost, name, rank, flows))
        return found


def retransmits_by_pair(counted: Sequence[Counted]) -> PairRetransmits | None:
    """The segments sent again between each pair of ranks; None if there were none, or if they are unknown.

    A connection belongs to the two ranks that both list it, one with the ends exchanged.
    """
    owner = {key: rank for rank, one in enumerate(counted) for key in one.connections}
    total: dict[tuple[int, int], tuple[int, int]] = {}
    for src, one in enumerate(counted):
        for key, (segments, again) in one.connections.items():
            dst = owner.get(turned_round(key), src)
            if dst != src and segments:
                before = total.get((src, dst), (0, 0))
                total[src, dst] = (before[0] + segments, before[1] + again)
    if not any(again for _, again in total.values()):
        return None
    pairs, counts = np.array(list(total), np.int64), np.array(list(total.values()), np.int64)
    return PairRetransmits(src=pairs[:, 0], dst=pairs[:, 1], segments=counts[:, 0], again=counts[:, 1])
