"""When a watchdog sends heartbeats, and whether its own process was suspended."""

import time

# A thread that wakes this much later than planned was suspended, or had no core.
SUSPENDED_SECONDS = 2.0


class Heartbeat:
    """When the next heartbeat is due.

    Incoming messages do not trigger one. Otherwise rank 0 and the other ranks would answer each other without end, at
    the speed of the network and beside the measurement.
    """

    def __init__(self, interval: float, gap: float = 0.0) -> None:
        """The first is due at once, each later one `interval` seconds after the last, or after `soon`.

        Args:
            interval: seconds between heartbeats.
            gap: the fewest seconds between two heartbeats, which `soon` keeps too.
        """
        self._interval, self._gap, self._last = interval, gap, 0.0
        self._due = time.monotonic()

    def soon(self) -> None:
        """Make the next heartbeat due as early as `gap` allows: there is news."""
        self._due = min(self._due, self._last + self._gap)

    def wait(self, until: float | None = None) -> float:
        """Seconds until the next heartbeat is due, or until the time `until` if that comes first."""
        return max(0.0, min(self._due, self._due if until is None else until) - time.monotonic())

    def is_due(self) -> bool:
        """Whether a heartbeat is due now; if so, the next one is scheduled."""
        now = time.monotonic()
        if now < self._due:
            return False
        self._last, self._due = now, now + self._interval
        return True


class SuspendDetector:
    """Whether this process was suspended, as all ranks of a suspended job are.

    Heartbeats that it missed meanwhile say nothing of the other ranks, which may have been suspended with it.
    """

    def __init__(self, interval: float) -> None:
        """The caller's loop comes round at least every `interval` seconds."""
        self._most, self._last = interval + SUSPENDED_SECONDS, time.monotonic()

    def missed(self, now: float) -> float:
        """Seconds since the last call if this process was suspended in between; else 0."""
        gap, self._last = now - self._last, now
        return gap if gap > self._most else 0.0
