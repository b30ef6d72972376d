"""Executors of cases: as a rank process, by threads, or by a model without ranks.

Recorder, store, reports and acceptance do not depend on the kind of executor.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from ncclbench.buffers.arrays import Rotation
from ncclbench.errors import Unable
from ncclbench.measure.case import Measurement, run_case
from ncclbench.measure.record import Outcome, base_record, complete_record
from ncclbench.measure.sampling import Samples
from ncclbench.measure.telemetry import Telemetry
from ncclbench.measure.timing_host import Clock, Progress
from ncclbench.plan.plan import Settings
from ncclbench.schedule.case import Case
from ncclbench.schedule.pattern import build_variants
from ncclbench.schedule.schedule import Schedule
from ncclbench.store.events import utc_now
from ncclbench.topology import Topology
from ncclbench.transports.base import Facts, Transport
from ncclbench.transports.capabilities import Capabilities
from ncclbench.transports.threads import ThreadTransport, ThreadWorld, play


class Executor(Protocol):
    """Executes one case after the other."""

    def execute(self, case: Case, topology: Topology, settings: Settings) -> Measurement | None:
        """The measurement, or why the case was skipped; None on ranks other than rank 0.

        Raises:
            NcclbenchError: if the run cannot go on.
        """

    def describe(self) -> Facts:
        """Versions and settings, for the manifest."""


class RankExecutor:
    """This process is one rank; all ranks execute the same cases in the same order.

    Args:
        transport: this rank's transport.
        progress: updated for the watchdog.
        rotations: the buffer sets planned for cases on a GPU, by case id; other cases plan their own.
        command: the user's command line, for the reason of a case that needs other variables at process start.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        transport: Transport,
        progress: Progress | None = None,
        rotations: Mapping[str, Rotation] | None = None,
        command: Sequence[str] = (),
        clock: Clock = time.perf_counter,
    ) -> None:
        """Create the telemetry of `transport`; execute nothing yet."""
        self.transport, self.progress = transport, progress or Progress()
        self._rotations, self._clock, self._telemetry = rotations or {}, clock, Telemetry(transport)
        self._command = command

    def execute(self, case: Case, topology: Topology, settings: Settings) -> Measurement | None:
        """Measure a case as this rank; see `run_case`."""
        return run_case(
            *(case, self.transport, topology, settings),
            clock=self._clock,
            progress=self.progress,
            rotation=self._rotations.get(case.id),
            telemetry=self._telemetry,
            command=self._command,
        )

    def describe(self) -> Facts:
        """The versions and settings of the transport."""
        return self.transport.describe()


class ThreadExecutor:
    """Ranks are threads of this process, started again for each case.

    Args:
        world_size: number of ranks.
        timeout: seconds that a rank waits for the others.
        on_start: called in each rank's thread with its number, before anything else.
        command: the user's command line, as for `RankExecutor`.
    """

    def __init__(
        self,
        world_size: int,
        timeout: float = 60.0,
        on_start: Callable[[int], object] = lambda _rank: None,
        command: Sequence[str] = (),
    ) -> None:
        """Start no thread yet."""
        self._world_size, self._timeout, self._on_start, self._command = world_size, timeout, on_start, command

    def execute(self, case: Case, topology: Topology, settings: Settings) -> Measurement | None:
        """Measure a case on all ranks; returns rank 0's result."""

        def main(transport: ThreadTransport) -> Measurement | None:
            self._on_start(transport.rank)
            return run_case(case, transport, topology, settings, command=self._command)

        return play(self._world_size, main, self._timeout)[0]

    def describe(self) -> Facts:
        """The versions and settings of the transport."""
        return ThreadTransport(ThreadWorld(1), 0).describe()


class ModelExecutor(ABC):
    """Computes times from the case's schedules, without ranks.

    A transport without ranks is a module with `CAPABILITIES`, whose hosting is ``none``, and a function
    `open_executor(name, world_size)` that returns one of these.

    Args:
        capabilities: what its module declares.
        world_size: number of modelled ranks.
    """

    def __init__(self, capabilities: Capabilities, world_size: int) -> None:
        """Model `world_size` ranks."""
        self.capabilities, self.world_size = capabilities, world_size

    @abstractmethod
    def samples(self, case: Case, variants: Sequence[Schedule], topology: Topology, settings: Settings) -> Samples:
        """The computed durations of each rank, iteration and phase.

        Raises:
            Unable: if the model cannot compute the case, which is skipped with that reason.
        """

    def execute(self, case: Case, topology: Topology, settings: Settings) -> Measurement:
        """The record of the case, from the samples that the model computes."""
        base = base_record(case, self.capabilities.name, topology.world_size, utc_now())
        try:
            variants = build_variants(case, topology)
            samples = self.samples(case, variants, topology, settings)
        except Unable as unable:
            return Measurement(msgspec.structs.replace(base, status="skipped", reason=str(unable)))
        return Measurement(complete_record(base, variants, topology, settings, Outcome(samples=samples)), samples)

    def describe(self) -> Facts:
        """The name; a model adds its version and parameters."""
        return {"transport": self.capabilities.name}
