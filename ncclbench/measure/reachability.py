"""Detection of unreachable ranks before timing, so that one dead link does not end a case.

A rail that is down would block a round of flows forever: the library waits, and after a timeout of one message it fails
all others. A transport that can test this reports the ranks that do not answer on the measured network. Flows to and
from them are left out and named; all others are measured. The watchdog handles links that go down during a case.
"""

from dataclasses import dataclass, replace

import msgspec
import numpy as np

from ncclbench.schedule.phases import Exchange
from ncclbench.schedule.schedule import Schedule
from ncclbench.store.records import Record
from ncclbench.transports.base import Transport, all_gather_text

ANSWER_SECONDS = 3.0
# A reason is one line.
_MOST_NAMED = 12


@dataclass(frozen=True)
class LostFlows:
    """Flows that were left out: pairs of ranks, each once, and the number of all pairs."""

    pairs: tuple[tuple[int, int], ...]
    of: int

    @property
    def ranks(self) -> list[int]:
        """The ranks in most pairs, then those in most of the remaining pairs, and so on; all ranks of a tie."""
        left = list(self.pairs)
        named: set[int] = set()
        while left:
            ends, counts = np.unique(np.array(left), return_counts=True)
            named |= set(ends[counts == counts.max()].tolist())
            left = [pair for pair in left if not named & set(pair)]
        return sorted(named)

    def as_reason(self) -> str:
        """The record's reason, in one line."""
        shown = ", ".join(f"{src} -> {dst}" for src, dst in self.pairs[:_MOST_NAMED])
        more = f" and {len(self.pairs) - _MOST_NAMED} more" if len(self.pairs) > _MOST_NAMED else ""
        others = "the others were measured" if len(self.pairs) < self.of else "none is left"
        return (
            f"{len(self.pairs)} of {self.of} flows got no answer within {ANSWER_SECONDS:g} s and were left out "
            f"(rank {shown}{more}); {others}"
        )


def drop_unreachable_flows(
    variants: tuple[Schedule, ...], transport: Transport
) -> tuple[tuple[Schedule, ...], LostFlows | None]:
    """The variants without flows between unreachable ranks, and the flows left out; all ranks call it.

    Only cases that consist of rounds of flows are meaningful without some of them.
    """
    rounds = [phase for variant in variants for phase in variant.phases]
    if not all(isinstance(phase, Exchange) for phase in rounds):
        return variants, None
    pairs = sorted({pair for phase in rounds if isinstance(phase, Exchange) for pair in _wires(phase)})
    destinations = [dst for src, dst in pairs if src == transport.rank]
    unreachable = transport.unreachable(destinations, ANSWER_SECONDS)
    if unreachable is None:  # this transport cannot test it, on any rank
        return variants, None
    answers = all_gather_text(transport.control, msgspec.json.encode(unreachable).decode())
    lost = [(src, dst) for src, answer in enumerate(answers) for dst in msgspec.json.decode(answer, type=list[int])]
    if not lost:
        return variants, None
    kept = [cut for cut in (_without(variant, set(lost)) for variant in variants) if cut is not None]
    return tuple(kept), LostFlows(tuple(lost), len(pairs))


def report_lost_flows(record: Record, lost: LostFlows | None) -> Record:
    """The record with the flows that were left out; the status ``wrong`` stays, since it is more severe."""
    if lost is None:
        return record
    reason = lost.as_reason()
    if record.status == "wrong":
        return msgspec.structs.replace(record, notes=[*record.notes, reason])
    return msgspec.structs.replace(record, status="timeout", reason=reason, ranks=lost.ranks)


def _wires(phase: Exchange) -> list[tuple[int, int]]:
    return [(src, dst) for src, dst in zip(phase.src.tolist(), phase.dst.tolist(), strict=True) if src != dst]


def _without(variant: Schedule, lost: set[tuple[int, int]]) -> Schedule | None:
    """`variant` without the flows of `lost`; None if none is left."""
    phases = []
    for phase in variant.phases:
        assert isinstance(phase, Exchange)
        ends = zip(phase.src.tolist(), phase.dst.tolist(), strict=True)
        kept = np.array([pair not in lost for pair in ends])
        if kept.any():
            names = ("src", "dst", "nbytes", "send_offset", "recv_offset")
            phases.append(replace(phase, **{name: getattr(phase, name)[kept] for name in names}))
    return replace(variant, phases=tuple(phases)) if phases else None
