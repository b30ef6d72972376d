"""Who is to blame: from when and where each rank was last seen to one fault with its culprits.

Nothing here knows how ranks are heard; the watchdog fills in the sightings.
"""

from dataclasses import dataclass
from typing import Literal

from ncclbench.store.records import Status

# A rank sends a heartbeat this often; of many ranks each does so less often.
BEAT_SECONDS = 0.5

Ending = Literal["raised", "transport", "signal"]


@dataclass
class Sighting:
    """What is known of one rank.

    Attributes:
        case: index of the case it was last seen in; -1 before the first.
        stage: ``compile``, ``compiled``, ``check before``, ``warmup``, ``timed``, ``check after``.
        iteration: the iteration in that stage; -1 if it counts none.
        ticks: how many steps it has taken in all.
        moved: when `ticks` last changed.
        heard: when it was last heard.
        lost: its connection closed without a goodbye.
        left: it said goodbye.
        failure: what it says went wrong, and how.
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
        """A heartbeat."""
        if ticks != self.ticks or case != self.case:
            self.moved = now
        self.case, self.stage, self.iteration, self.ticks, self.heard = case, stage, iteration, ticks, now

    def where(self) -> str:
        """Where the rank was last seen, in words."""
        return self.stage + (f", iteration {self.iteration}" if self.iteration >= 0 else "")


@dataclass(frozen=True)
class Fault:
    """Why a run ended early.

    Attributes:
        status: of the record that was being made.
        ranks: who is to blame, as far as can be told.
        reason: one line.
        case: index of the case in which it happened, -1 before the first.
    """

    status: Status
    ranks: tuple[int, ...]
    reason: str
    case: int


def judge(sightings: dict[int, Sighting], now: float, limit: float, beat: float = BEAT_SECONDS) -> Fault | None:
    """What the sightings add up to; None if all is well.

    What was last heard of a rank is up to `beat` seconds old, so that much is added to the `limit`.

    In this order: ranks that died, ranks that raised, an interruption, ranks that went silent or stand still, and
    last the errors of a library that merely noticed that somebody else was gone.
    """
    case = max((s.case for s in sightings.values()), default=-1)
    lost = {r: s for r, s in sightings.items() if s.lost}
    if lost:
        seen = "; ".join(f"rank {r} died (last seen in {s.where()})" for r, s in lost.items())
        return Fault("failed", tuple(lost), seen, case)
    for kind in ("raised", "signal"):
        named = {r: s.failure[1] for r, s in sightings.items() if s.failure and s.failure[0] == kind}
        if named:
            first = next(iter(named.items()))
            culprits = tuple(named) if kind == "raised" else ()
            return Fault("failed", culprits, f"rank {first[0]}: {first[1]}" if culprits else first[1], case)
    hung = _hung(sightings, now, limit + beat, _quiet_after(beat))
    if hung:
        return Fault("timeout", hung, _describe_hung(sightings, hung, now, limit, _quiet_after(beat)), case)
    failed = {r: s.failure[1] for r, s in sightings.items() if s.failure}
    if failed:
        return Fault("failed", tuple(failed), "; ".join(dict.fromkeys(failed.values())), case)
    return None


def _quiet_after(beat: float) -> float:
    """Seconds without a word after which a rank is quiet that should have said something every `beat` of them."""
    return max(10 * BEAT_SECONDS, 3 * beat)


def _hung(sightings: dict[int, Sighting], now: float, limit: float, quiet_after: float) -> tuple[int, ...]:
    """The ranks that keep the others waiting, if anybody has stood still for longer than `limit`."""
    if all(s.case < 0 for s in sightings.values()):  # nobody has begun; once one has, whoever has not is behind
        return ()
    working = {r: s for r, s in sightings.items() if not s.left and not s.failure}
    silent = tuple(r for r, s in working.items() if now - s.heard > limit)
    if silent or not any(now - s.moved > limit for s in working.values()):
        return silent
    quiet = tuple(r for r, s in working.items() if now - s.heard > quiet_after)
    if quiet:
        return quiet
    behind = min((s.case, s.ticks) for s in working.values())
    return tuple(r for r, s in working.items() if (s.case, s.ticks) == behind)


def _describe_hung(
    sightings: dict[int, Sighting], hung: tuple[int, ...], now: float, limit: float, quiet_after: float
) -> str:
    shown = "; ".join(
        f"rank {r} ({sightings[r].where()}, silent for {now - sightings[r].heard:.0f} s)"
        if now - sightings[r].heard > quiet_after
        else f"rank {r} ({sightings[r].where()})"
        for r in hung[:8]
    )
    more = f" and {len(hung) - 8} more" if len(hung) > 8 else ""
    return f"no progress for {limit:.0f} s; waiting for {shown}{more}"
