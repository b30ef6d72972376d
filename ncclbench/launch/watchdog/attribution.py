"""Attribute a fault: from when and where each rank was last heard to one fault and the ranks that caused it.

Nothing here knows how ranks are heard; the watchdog fills in a `RankStatus` per rank.
"""

from dataclasses import dataclass
from typing import Literal

from ncclbench.store.records import Status

# The interval of heartbeats. In large jobs each rank sends them less often.
BEAT_SECONDS = 0.5

Ending = Literal["raised", "transport", "signal"]


@dataclass
class RankStatus:
    """What the watchdog knows of one rank. Times are those of `time.monotonic`, in seconds.

    Attributes:
        case: index of the case it was last seen in; -1 before the first.
        stage: ``compile``, ``compiled``, ``check before``, ``warmup``, ``timed``, ``check after``.
        iteration: the iteration in that stage; -1 if the stage counts none.
        ticks: how many steps it has taken in all.
        moved: when `ticks` last changed.
        heard: when its last message arrived.
        lost: its connection closed without a goodbye.
        left: it said goodbye.
        failure: the kind of failure it reported, and the message.
    """

    case: int = -1
    stage: str = "start"
    iteration: int = -1
    ticks: int = 0
    moved: float = 0.0
    heard: float = 0.0
    lost: bool = False
    left: bool = False
    failure: tuple[Ending, str] | None = None

    def update(self, case: int, stage: str, iteration: int, ticks: int, now: float) -> None:
        """Take over a heartbeat. Only a new case or tick count is progress; a heartbeat alone is not."""
        if ticks != self.ticks or case != self.case:
            self.moved = now
        self.case, self.stage, self.iteration, self.ticks, self.heard = case, stage, iteration, ticks, now

    def where(self) -> str:
        """Stage and iteration in which the rank was last seen, in words."""
        return self.stage + (f", iteration {self.iteration}" if self.iteration >= 0 else "")


@dataclass(frozen=True)
class Fault:
    """Why a run ended early.

    Attributes:
        status: of the record in progress.
        ranks: the ranks that caused it, if they are known.
        reason: one line.
        case: index of the case in which it happened, -1 before the first.
    """

    status: Status
    ranks: tuple[int, ...]
    reason: str
    case: int


def attribute_fault(
    statuses: dict[int, RankStatus], now: float, limit: float, beat: float = BEAT_SECONDS
) -> Fault | None:
    """The fault that the statuses show; None if all ranks are well.

    The surest sign decides, in this order: ranks that died, ranks that raised, an interruption, ranks that are silent
    or make no progress, and last the errors of a library, which often only noticed that another rank was gone.

    Args:
        statuses: by rank.
        now: `time.monotonic`, in seconds.
        limit: seconds without progress after which a rank hangs.
        beat: interval of heartbeats in seconds. A status is up to that old, so it is added to `limit`.
    """
    case = max((s.case for s in statuses.values()), default=-1)
    lost = {r: s for r, s in statuses.items() if s.lost}
    if lost:
        seen = "; ".join(f"rank {r} died (last seen in {s.where()})" for r, s in lost.items())
        return Fault("failed", tuple(lost), seen, case)
    for kind in ("raised", "signal"):
        named = {r: s.failure[1] for r, s in statuses.items() if s.failure and s.failure[0] == kind}
        if named:
            first = next(iter(named.items()))
            culprits = tuple(named) if kind == "raised" else ()
            return Fault("failed", culprits, f"rank {first[0]}: {first[1]}" if culprits else first[1], case)
    hung = _hung(statuses, now, limit + beat, _quiet_after(beat))
    if hung:
        return Fault("timeout", hung, _describe_hung(statuses, hung, now, limit, _quiet_after(beat)), case)
    failed = {r: s.failure[1] for r, s in statuses.items() if s.failure}
    if failed:
        return Fault("failed", tuple(failed), "; ".join(dict.fromkeys(failed.values())), case)
    return None


def _quiet_after(beat: float) -> float:
    """Seconds without a message after which a rank counts as quiet, if it sends one every `beat` seconds."""
    return max(10 * BEAT_SECONDS, 3 * beat)


def _hung(statuses: dict[int, RankStatus], now: float, limit: float, quiet_after: float) -> tuple[int, ...]:
    """The ranks that the others wait for, if any rank has made no progress for longer than `limit` seconds."""
    # Before the first case no rank is late. Once one rank has begun, those that have not are behind.
    if all(s.case < 0 for s in statuses.values()):
        return ()
    working = {r: s for r, s in statuses.items() if not s.left and not s.failure}
    silent = tuple(r for r, s in working.items() if now - s.heard > limit)
    if silent or not any(now - s.moved > limit for s in working.values()):
        return silent
    quiet = tuple(r for r, s in working.items() if now - s.heard > quiet_after)
    if quiet:
        return quiet
    behind = min((s.case, s.ticks) for s in working.values())
    return tuple(r for r, s in working.items() if (s.case, s.ticks) == behind)


def _describe_hung(
    statuses: dict[int, RankStatus], hung: tuple[int, ...], now: float, limit: float, quiet_after: float
) -> str:
    shown = "; ".join(
        f"rank {r} ({statuses[r].where()}, silent for {now - statuses[r].heard:.0f} s)"
        if now - statuses[r].heard > quiet_after
        else f"rank {r} ({statuses[r].where()})"
        for r in hung[:8]
    )
    more = f" and {len(hung) - 8} more" if len(hung) > 8 else ""
    return f"no progress for {limit:.0f} s; waiting for {shown}{more}"
