"""When a watchdog speaks, and whether it was awake to listen."""

import time

# A watchdog that comes round so much later than it should has been stopped, or was not given a core.
_STOPPED_SECONDS = 2.0


class Beat:
    """When the next heartbeat is due.

    What is heard in between is no reason for one, or rank 0 and the others would answer each other without end, beside
    the measurement and at the speed of the network.
    """

    def __init__(self, interval: float, gap: float = 0.0) -> None:
        """The first is due at once, the others `interval` seconds after the one before, or `soon`: `gap` after it."""
        self._interval, self._gap, self._last = interval, gap, 0.0
        self._due = time.monotonic()

    def soon(self) -> None:
        """There is something new to say."""
        self._due = min(self._due, self._last + self._gap)

    def wait(self, until: float | None = None) -> float:
        """Seconds until it is due, or until the time `until` if that comes first."""
        return max(0.0, min(self._due, self._due if until is None else until) - time.monotonic())

    def is_due(self) -> bool:
        """Whether it is; then the next one is later."""
        now = time.monotonic()
        if now < self._due:
            return False
        self._last, self._due = now, now + self._interval
        return True


class Awake:
    """Whether this process was stopped itself, as when a job is suspended.

    What it has not heard meanwhile says nothing of the others, who may have been stopped with it.
    """

    def __init__(self, interval: float) -> None:
        """Its thread comes round every `interval` seconds at least."""
        self._most, self._last = interval + _STOPPED_SECONDS, time.monotonic()

    def missed(self, now: float) -> float:
        """Seconds since it last came round, if they are too many; else 0."""
        gap, self._last = now - self._last, now
        return gap if gap > self._most else 0.0
