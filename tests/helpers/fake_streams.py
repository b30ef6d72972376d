"""Streams of a GPU that does not exist. Their clock advances only by what the test launches."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ncclbench.transports.base import Call


@dataclass
class FakeStream:
    """Runs each launch at once, on a clock of its own. Waiting behind a closed gate is an error."""

    now: float = 0.0
    held: bool = False
    gives_up: bool = False
    opened_by_itself: bool = False
    log: list[str] = field(default_factory=list)
    enqueued: int = 0
    most_enqueued: int = 0
    limits: list[float] = field(default_factory=list)

    def launch(self, seconds: float, name: str) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds
            self.enqueued += 1
            self.most_enqueued = max(self.most_enqueued, self.enqueued)
            self.log.append(name)

        return run

    def device_barrier(self) -> None:
        self.launch(7e-6, "device barrier")()
        self.enqueued += 3  # NCCL brings events of its own

    def mark(self) -> float:
        self.enqueued += 1
        self.most_enqueued = max(self.most_enqueued, self.enqueued)
        return self.now

    def seconds_between(self, start: object, end: object) -> float:
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start

    def hold(self, limit_seconds: float) -> None:
        assert not self.held
        self.held = True
        self.limits.append(limit_seconds)
        self.log.append("hold")

    def release(self) -> None:
        self.held, self.opened_by_itself = False, self.gives_up
        self.log.append("release")

    def synchronize(self) -> None:
        assert not self.held, "waiting behind a closed gate is a deadlock"
        self.enqueued = 0
        self.log.append("synchronize")

    def capture(self, launches: Sequence[Call]) -> Call:
        calls = list(launches)
        self.log.append(f"capture {len(calls)}")

        def replay() -> None:
            for call in calls:
                call()

        return replay


@dataclass
class PairedStream(FakeStream):
    """Streams of four ranks that exchange in pairs, other pairs in each round. Rank 0 sends at half the rate."""

    rank: int = 0
    clocks: dict[tuple[int, int], float] = field(default_factory=dict)
    meetings: dict[tuple[int, int, int], threading.Barrier] = field(default_factory=dict)
    everyone: threading.Barrier = field(default_factory=lambda: threading.Barrier(4))
    launched: int = 0
    lined_up: int = 0

    def meet(self, distance: int) -> None:
        """Exchange with the rank that differs in the bits of `distance`."""
        partner, turn = self.rank ^ distance, self.launched
        self.launched += 1
        self.clocks[turn, self.rank] = self.now
        low, high = sorted((self.rank, partner))
        self.meetings.setdefault((turn, low, high), threading.Barrier(2)).wait(10)
        self.now = max(self.now, self.clocks[turn, partner]) + (2.0 if low == 0 else 1.0)

    def device_barrier(self) -> None:
        turn = -1 - self.lined_up
        self.lined_up += 1
        self.clocks[turn, self.rank] = self.now
        self.everyone.wait(10)
        self.now = max(self.clocks[turn, rank] for rank in range(4))
