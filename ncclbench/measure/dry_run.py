"""`run --dry-run`: the time and memory of a plan, and the cases that would be skipped or refused. No rank starts."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ncclbench.buffers.arrays import refuse_too_large
from ncclbench.errors import TooLarge, Unable
from ncclbench.measure.case import memory_needed
from ncclbench.measure.required_variables import why_not
from ncclbench.measure.sampling import FEWEST_SAMPLES, MAX_SAMPLES
from ncclbench.measure.timing_host import LAUNCHES_PER_BLOCK
from ncclbench.plan.plan import Plan, PlannedCase
from ncclbench.schedule.case import Timing
from ncclbench.schedule.pattern import load_pattern
from ncclbench.topology import Topology
from ncclbench.topology.host_memory import available_memory
from ncclbench.transports.capabilities import HOST_PACE, Capabilities, Hosting, Pace, capabilities_of
from ncclbench.units import counted, format_bytes, format_seconds


@dataclass(frozen=True)
class CaseForecast:
    """The forecast of one planned case.

    Attributes:
        planned: the case.
        memory_bytes: bytes of buffers per rank.
        seconds: approximate time in each process start of its mode.
        skipped: why it would be skipped; "" if not.
        refused: why a run on a node with this node's memory would be refused because of it; "" if not.
    """

    planned: PlannedCase
    memory_bytes: int
    seconds: float
    skipped: str
    refused: str

    @property
    def note(self) -> str:
        """Why the case would be skipped or refused; "" if neither."""
        if self.skipped:
            return f"would be skipped: {self.skipped}"
        needs = self.refused.removeprefix(self.planned.case.id).lstrip(": ")
        return f"would be refused on a node like this one: {needs}" if needs else ""


@dataclass(frozen=True)
class Forecast:
    """The forecast of a plan for a number of ranks over a transport."""

    plan: Plan
    transport: Capabilities
    world_size: int
    cases: tuple[CaseForecast, ...]

    @property
    def pace(self) -> Pace:
        """The speed that the estimates assume."""
        return self.transport.pace

    @property
    def seconds(self) -> float:
        """Approximate time of all process starts; a case runs only in those of its mode."""
        plan = self.plan
        return plan.starts * sum(case.seconds for case in self.cases) + plan.process_starts * self.pace.start_seconds

    def as_json(self) -> str:
        """One compact JSON object, like that of a run."""
        plan = self.plan
        summary: dict[str, object] = {"run": None, "dry_run": True, "exit_code": 0, "error": None, "records": []}
        summary |= {"plan": plan.name, "transport": self.transport.name, "world_size": self.world_size}
        summary |= {"starts": plan.process_starts, "modes": [mode.name for mode in plan.modes]}
        summary |= {"start_seconds": self.pace.start_seconds, "seconds": self.seconds}
        cases = [
            {
                "case": case.planned.case.id,
                **({"mode": case.planned.mode} if case.planned.mode else {}),
                "memory_bytes": case.memory_bytes,
                "seconds": case.seconds,
                "skipped": case.skipped or None,
                "refused": case.refused or None,
            }
            for case in self.cases
        ]
        return json.dumps({**summary, "cases": cases}, separators=(",", ":"))

    def as_table(self) -> str:
        """The forecast as a text table."""
        plan, over = self.plan, f"{counted(self.world_size, 'rank')} over {self.transport.name}"
        lines = [
            f"plan {plan.name}: {counted(len(plan.cases), 'case')} on {over}; nothing is started",
            *self._starts(),
            f"\n{'memory/rank':>12}  {'about':>8}  {'mode       ' if plan.modes else ''}case",
        ]
        for case in self.cases:
            mode = f"{case.planned.mode:<9}  " if plan.modes else ""
            note = f"  ({case.note})" if case.note else ""
            figures = f"{format_bytes(case.memory_bytes):>12}  {format_seconds(case.seconds):>8}"
            lines.append(f"{figures}  {mode}{case.planned.case.id}{note}")
        starts = ""
        if plan.process_starts > 1:
            each = format_seconds(self.seconds / plan.process_starts)
            starts = f"{each} for each of {plan.process_starts} process starts, "
        lines.append(f"\nabout {starts}{format_seconds(self.seconds)} in all: a guess from {self.pace}")
        return "\n".join(lines)

    def _starts(self) -> Iterator[str]:
        """One line per mode with the numbers of its process starts; without modes at most one line."""
        plan, count = self.plan, len(self.plan.modes)
        if not count and plan.starts > 1:
            yield f"each in {plan.starts} process starts"
        for k, mode in enumerate(plan.modes):
            numbers = ", ".join(str(1 + k + n * count) for n in range(plan.starts))
            yield f"process start {numbers}: {mode.in_words}"


def forecast(plan: Plan, name: str, topology: Topology, command: Sequence[str] = ()) -> Forecast:
    """The forecast of `plan` over the transport `name` on `topology`.

    `command` is the user's command line.
    """
    cases, transport = [], capabilities_of(name)
    on_this_node = int(np.bincount(topology.nodes).max())
    for planned, memory, unable, too_large in sizes(plan, topology):
        skipped = unable or _no_graph(planned, transport) or _wrong_start(planned, plan, transport, command)
        seconds = 0.0 if skipped else estimate_seconds(planned, memory, transport.pace)
        refused = "" if skipped else too_large or _refused(planned, memory, transport, on_this_node)
        cases.append(CaseForecast(planned, memory, seconds, skipped, refused))
    return Forecast(plan, transport, topology.world_size, tuple(cases))


def sizes(plan: Plan, topology: Topology) -> list[tuple[PlannedCase, int, str, str]]:
    """Each planned case with its bytes of buffers per rank, why it would be skipped, and why refused."""
    found = []
    for planned in plan.cases:
        memory, unable, too_large = 0, "", ""
        try:
            memory = memory_needed(planned.case, topology, check=planned.settings.check)
        except Unable as error:
            unable = str(error)
        except TooLarge as error:
            too_large = str(error)
        found.append((planned, memory, unable, too_large))
    return found


def refuse_on_this_node(plan: Plan, name: str, topology: Topology) -> None:
    """Refuse a plan that does not fit on this node, before any rank starts.

    Each rank checks again, and only there is the memory of GPUs known.

    Raises:
        TooLarge: naming the first case that does not fit.
    """
    transport = capabilities_of(name)
    for planned, memory, _unable, too_large in sizes(plan, topology):
        if refusal := too_large or _refused(planned, memory, transport, topology.world_size):
            raise TooLarge(refusal)


def _refused(planned: PlannedCase, memory: int, transport: Capabilities, ranks: int) -> str:
    """Why `ranks` ranks do not fit into this node's free memory; "" if they fit or use no host memory."""
    if transport.needs_gpu or transport.hosting is Hosting.NONE:
        return ""
    try:
        refuse_too_large(planned.case.id, transport.memory_factor * memory, ranks, available_memory())
    except TooLarge as error:
        return str(error)
    return ""


def _no_graph(planned: PlannedCase, transport: Capabilities) -> str:
    if planned.case.timing is Timing.GRAPH and not transport.graphs:
        return f"graph timing needs a GPU transport; {transport.name} runs on the host"
    return ""


def _wrong_start(planned: PlannedCase, plan: Plan, transport: Capabilities, command: Sequence[str]) -> str:
    """Why processes with the variables of the case's mode could not measure it; "" if they could."""
    case, needs = planned.case, load_pattern(planned.case.pattern).needs(planned.case)
    set_by_mode = next((dict(mode.variables) for mode in plan.modes if mode.name == planned.mode), {})
    environ = {**os.environ, **set_by_mode}
    return why_not(case, needs, transport, environ, command) if needs else ""


def estimate_seconds(planned: PlannedCase, memory_bytes: int, pace: Pace = HOST_PACE) -> float:
    """Seconds for warm-up, validation and timing; at most `max_seconds` of timing unless iterations are fixed."""
    settings = planned.settings
    each = pace.seconds + memory_bytes / pace.bytes_per_second
    block = 1
    if planned.case.timing is Timing.PIPELINED:
        block = settings.iterations or LAUNCHES_PER_BLOCK
    if settings.iterations is not None:
        timed = each * (FEWEST_SAMPLES * block if planned.case.timing is Timing.PIPELINED else settings.iterations)
    else:
        timed = min(max(settings.max_seconds, FEWEST_SAMPLES * block * each), MAX_SAMPLES * block * each)
    checks = 2 * (each + 2 * memory_bytes / pace.bytes_per_second) if settings.check else 0.0
    return timed + checks + settings.warmup * each
