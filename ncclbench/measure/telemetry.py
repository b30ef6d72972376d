"""The evidence of every rank before and after a case: the path that its library logged, and its GPU's state."""

import time
from collections.abc import Callable

import msgspec

from ncclbench.transports.base import Evidence, Transport, all_gather_text

# Reading the error counters of a GPU's 18 NVLinks takes 50 to 90 ms (docs/benchmarks.md), longer than many cases. If a
# case begins within this many seconds of the one before, it uses that one's last reading. Errors between the two count
# for the later case.
_REUSED_SECONDS = 0.25


class Telemetry:
    """Reads this rank's evidence and gathers that of all ranks; one object serves all cases of a run.

    Args:
        transport: this rank's.
        clock: seconds, monotonic; tests pass their own.
    """

    def __init__(self, transport: Transport, clock: Callable[[], float] = time.monotonic) -> None:
        """Read nothing yet."""
        self._transport, self._clock = transport, clock
        self._evidence, self._read_at = "", float("-inf")

    def before(self) -> list[Evidence]:
        """Each rank's evidence before a case, in rank order; empty on the host."""
        # Each rank decides by its own clock. A rank that does not read again sends its last reading.
        if self._clock() - self._read_at > _REUSED_SECONDS:
            self._read()
        return self._gather()

    def after(self) -> list[Evidence]:
        """Each rank's evidence after a case, always read again; empty on the host."""
        self._read()
        return self._gather()

    def _read(self) -> None:
        if self._transport.stream is not None:
            self._evidence = msgspec.json.encode(self._transport.evidence()).decode()
            self._read_at = self._clock()

    def _gather(self) -> list[Evidence]:
        if self._transport.stream is None:  # a transport on the host has no evidence
            return []
        texts = all_gather_text(self._transport.control, self._evidence)
        return [msgspec.json.decode(text, type=Evidence) for text in texts]
