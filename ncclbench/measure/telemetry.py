"""What every rank's library and GPU say of themselves, before and after a case."""

import time
from collections.abc import Callable

import msgspec

from ncclbench.transports.base import Facts, Transport, all_gather_text

# Asking a GPU for the error counters of its 18 NVLinks takes 50 to 90 ms (docs/benchmarks.md), longer than many a case.
# So what was said after one case is what was said before the next, if that begins within this many seconds; what
# happens between the two counts as the next one's.
_SERVES_SECONDS = 0.25


class Telemetry:
    """Asks this rank's transport, and gathers what all ranks answer; one for all cases of a run.

    Args:
        transport: this rank's.
        clock: seconds, monotonic; tests pass their own.
    """

    def __init__(self, transport: Transport, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing was asked yet."""
        self._transport, self._clock = transport, clock
        self._answer, self._answered = "", float("-inf")

    def before(self) -> list[Facts]:
        """Each rank's evidence from before a case, as `Transport.evidence` has it; empty on the host."""
        # Each rank looks at its own clock: one that does not ask again repeats its answer.
        if self._clock() - self._answered > _SERVES_SECONDS:
            self._ask()
        return self._gather()

    def after(self) -> list[Facts]:
        """The same as a case ends: always asked anew."""
        self._ask()
        return self._gather()

    def _ask(self) -> None:
        if self._transport.stream is not None:
            self._answer = msgspec.json.encode(self._transport.evidence()).decode()
            self._answered = self._clock()

    def _gather(self) -> list[Facts]:
        if self._transport.stream is None:  # there is nothing to ask
            return []
        return [msgspec.json.decode(text) for text in all_gather_text(self._transport.control, self._answer)]
