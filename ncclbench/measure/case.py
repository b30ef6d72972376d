"""Measurement of one case on all ranks, from its schedules to its record."""

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import gcd

import msgspec
import numpy as np

from ncclbench.analysis.summary import Floats
from ncclbench.buffers.arrays import WARM, Rotation, allocate, uploader
from ncclbench.buffers.kinds import is_registered
from ncclbench.buffers.nccl_mem_alloc import BLOCKS
from ncclbench.errors import EnvironmentFault, Unable
from ncclbench.measure import compute_overlap as overlap
from ncclbench.measure import timing_device as device
from ncclbench.measure import timing_host as regimes
from ncclbench.measure.buffer_plan import MemoryDemand, agreed_budget, rotations
from ncclbench.measure.network.expected_traffic import ExpectedTraffic, expected_traffic
from ncclbench.measure.network.port_watch import PortWatch
from ncclbench.measure.reachability import LostFlows, drop_unreachable_flows, report_lost_flows
from ncclbench.measure.record import Outcome, Validation, base_record, complete_record
from ncclbench.measure.required_variables import check_needs
from ncclbench.measure.sampling import FEWEST_SAMPLES, Rule, Samples, collect
from ncclbench.measure.telemetry import Telemetry
from ncclbench.measure.timing_host import LAUNCHES_PER_BLOCK, Clock, Loop, Progress
from ncclbench.plan.plan import Settings
from ncclbench.schedule.case import Case, Timing
from ncclbench.schedule.oracle import Oracle, refuse_unverifiable, repeats_before_overflow
from ncclbench.schedule.pattern import build_variants, load_pattern
from ncclbench.schedule.schedule import Schedule, shared_buffers
from ncclbench.store.records import Json, Record
from ncclbench.topology import Topology
from ncclbench.transports.base import Program, Transport, all_gather_text

# The checks before and after timing and the timed iterations use different values. Stale data of one pass are therefore
# wrong in the next.
_BEFORE, _TIMED, _AFTER = range(3)


@dataclass(frozen=True)
class Measurement:
    """A case's record and its samples (None if nothing was timed)."""

    record: Record
    samples: Samples | None = None


def memory_needed(case: Case, topology: Topology, *, check: bool = True) -> int:
    """Bytes of buffers on every rank.

    Args:
        case: the case.
        topology: where the ranks are.
        check: whether its data are checked.

    Raises:
        Unable: if the pattern cannot run on this topology, or its data cannot be checked.
        TooLarge: if the schedule itself does not fit into memory.
    """
    variants = build_variants(case, topology)
    if check:
        refuse_unverifiable(variants)
    return sum(shared_buffers(variants).values())


def memory_demand(variants: Sequence[Schedule], settings: Settings) -> MemoryDemand:
    """The memory that a case with these schedules needs."""
    sizes = tuple(shared_buffers(variants).values())
    return MemoryDemand(sizes, len(variants), settings.buffers, settings.cache)


def run_case(
    case: Case,
    transport: Transport,
    topology: Topology,
    settings: Settings | None = None,
    *,
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
    rotation: Rotation | None = None,
    telemetry: Telemetry | None = None,
    command: Sequence[str] = (),
) -> Measurement | None:
    """Check and time one case; all ranks call it. Rank 0 gets the measurement, the others None.

    Args:
        case: what to measure.
        transport: this rank's transport.
        topology: where the ranks are.
        settings: how to measure.
        clock: seconds, monotonic; tests pass their own.
        progress: updated for the watchdog.
        rotation: the buffer sets planned for the case on a GPU; None plans them from the memory that is free now.
        telemetry: reads the library and the GPUs; one object for all cases of a run.
        command: the user's command line, for the reason of a case that needs other variables at process start.

    Raises:
        TransportError: if the transport's library fails.
    """
    settings, progress = settings or Settings(), progress or Progress()
    started = datetime.datetime.now(datetime.UTC)
    base = base_record(case, transport.name, topology.world_size, started)
    base = msgspec.structs.replace(base, staged=transport.staged)
    try:
        variants = build_variants(case, topology)
        check_needs(load_pattern(case.pattern).needs(case), case, transport, command=command)
        if settings.check:
            refuse_unverifiable(variants)
        if case.timing is Timing.GRAPH and transport.stream is None:
            raise Unable(f"graph timing needs a GPU transport; {transport.name} runs on the host")
        if case.timing is Timing.GRAPH and any(variant.waits_for_host for variant in variants):
            raise Unable("a graph cannot hold a schedule whose host must see counts; use variant = cached or padded")
        with transport.translating(case.id):
            _compare_fingerprints(variants, transport)
            variants, lost = drop_unreachable_flows(variants, transport)
            if not variants:
                return _nothing_left(base, lost) if transport.rank == 0 else None
            rank = RankContext(transport, topology, settings, clock, progress, telemetry or Telemetry(transport))
            outcome = _all_or_none(CaseOnRank(case, variants, rank, buffer_rotation(rotation, variants, rank)))
    except Unable as unable:
        skipped = msgspec.structs.replace(base, status="skipped", reason=str(unable))
        return Measurement(skipped) if transport.rank == 0 else None
    if outcome is None:
        return None
    record = complete_record(base, variants, topology, settings, outcome)
    return Measurement(report_lost_flows(record, lost), outcome.samples)


def _nothing_left(base: Record, lost: LostFlows | None) -> Measurement:
    """A record without figures, which says that all flows were left out."""
    return Measurement(report_lost_flows(base, lost))


def _all_or_none(measuring: "CaseOnRank") -> Outcome | None:
    """Run the case; a rank that is unable only now ends the run, since the others would wait for it."""
    try:
        return measuring.run()
    except Unable as late:
        raise RuntimeError(f"found to be impossible when other ranks had begun: {late}") from late


def buffer_rotation(planned: Rotation | None, variants: tuple[Schedule, ...], rank: "RankContext") -> Rotation:
    """The planned rotation, or one that fits into the memory that is free now.

    If variants were left out since planning, the sets may no longer pair with every variant. Then one set is used.
    """
    if rank.transport.device == "cpu":
        return WARM
    if planned is None:
        (planned,), _held = rotations([memory_demand(variants, rank.settings)], *agreed_budget(rank.transport))
    return planned if gcd(planned.copies, len(variants)) == 1 else WARM


def _sharing_note(transport: Transport) -> list[str]:
    """A note if ranks share a GPU."""
    sharing = transport.ranks_per_gpu
    return [f"{sharing} ranks share a GPU: proves logic, not a fabric"] if sharing > 1 else []


def _compare_fingerprints(variants: tuple[Schedule, ...], transport: Transport) -> None:
    """Check that all ranks drew the same routing; otherwise a rank would wait for rows that no rank sends.

    Raises:
        EnvironmentFault: on every rank, naming the ranks that differ from rank 0.
    """
    own = " ".join(variant.fingerprint for variant in variants)
    if not own.strip():
        return
    fingerprints = all_gather_text(transport.control, own)
    other = [rank for rank, text in enumerate(fingerprints) if text != fingerprints[0]]
    if other:
        raise EnvironmentFault(
            f"ranks {', '.join(map(str, other[:8]))} drew another routing than rank 0: "
            "the same version, trace file and seed are needed everywhere"
        )


@dataclass(frozen=True)
class RankContext:
    """What one rank needs to measure a case.

    Attributes:
        transport: this rank's transport.
        topology: where the ranks are.
        settings: how to measure.
        clock: seconds, monotonic.
        progress: updated for the watchdog.
        telemetry: reads the library and the GPUs.
    """

    transport: Transport
    topology: Topology
    settings: Settings
    clock: Clock
    progress: Progress
    telemetry: Telemetry


class CaseOnRank:
    """One case on one rank during its measurement."""

    def __init__(self, case: Case, variants: tuple[Schedule, ...], rank: RankContext, rotation: Rotation) -> None:
        """Allocate the buffers and compile the programs: one for each variant and set of buffers."""
        self.case, self.variants = case, variants
        self.transport, self.topology, self.settings = rank.transport, rank.topology, rank.settings
        self.clock, self.progress, self.telemetry = rank.clock, rank.progress, rank.telemetry
        self.progress.enter("compile")
        transport, settings = self.transport, self.settings
        self.overlaps = overlap.is_overlapped(variants, case.timing)
        copies, self.cold = rotation
        BLOCKS.begin_case()
        self.buffers = [allocate(variants[0], transport.device, settings.buffers, *variants[1:]) for _ in range(copies)]
        turns = range(copies * len(variants))
        self.programs = self._agreed(
            lambda: tuple(transport.compile(variants[i % len(variants)], self.buffers[i % copies]) for i in turns)
        )
        self.timed = self._oracle(variants[0], _TIMED)

    def _agreed(self, compile_all: Callable[[], tuple[Program, ...]]) -> tuple[Program, ...]:
        """The result of `compile_all`, after every rank has compiled.

        A library may be unable on one node only, and the other ranks would then wait forever. So if any rank is unable,
        all ranks are. Other errors end the run, and the watchdog ends the ranks that wait here.
        """
        programs: tuple[Program, ...] = ()
        reason = ""
        try:
            programs = compile_all()
        except Unable as unable:
            reason = str(unable)
        self.progress.enter("compiled")  # so that a rank that hangs in `compile_all` is behind those that wait for it
        reasons = all_gather_text(self.transport.control, reason)
        if any(reasons):
            rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
            raise Unable(reason if len(set(reasons)) == 1 else f"rank {rank}: {reason}")
        return programs

    def run(self) -> Outcome | None:
        """Check, warm up, time, and check again; returns the outcome on rank 0, None elsewhere."""
        settings, transport, progress = self.settings, self.transport, self.progress
        before, ports = self.telemetry.before(), PortWatch(self.topology, transport)
        wrong = self._check("check before", _BEFORE, 0)
        seconds_each = self._warm_up()
        loop = self._loop()
        measure, columns, launches = self._regime(loop)
        pipelined_fixed = FEWEST_SAMPLES if settings.iterations else None
        rule = Rule(
            fixed=pipelined_fixed if self.case.timing is Timing.PIPELINED else settings.iterations,
            precision=settings.precision,
            max_seconds=settings.max_seconds,
            multiple=1 if launches > 1 else len(self.variants),
        )
        progress.enter("timed")
        samples = collect(measure, columns, rule, transport.control, self.clock, launches * seconds_each)
        wrong += self._check("check after", _AFTER, len(self.buffers) - 1)
        counts = transport.control.gather(np.array([wrong], np.int64))
        after, counted = self.telemetry.after(), ports.finish()
        if samples is None or counts is None:
            return None
        checked = (
            Validation(counts[:, 0], self.timed.tolerance, self.timed.tolerance_reason) if settings.check else None
        )
        return Outcome(
            samples=replace(samples, mixed=launches > 1),
            validation=checked,
            launches_per_sample=launches,
            setup=self._setup(),
            remarks=sorted({*loop.remarks, *self.programs[0].notes, *_sharing_note(transport)}),
            before=before,
            after=after,
            counted=counted,
            wanted=self._expected_traffic(samples.seconds_RNK.shape[1], launches),
        )

    def _expected_traffic(self, samples: int, launches: int) -> ExpectedTraffic:
        """What every NIC must have carried in all iterations, with checks and warm-up."""
        turns = len(self.variants)
        timed = samples * launches + (2 * launches if self.case.timing is Timing.GRAPH else 0)
        warm, checks = self._warm_up_rounds(), 2 if self.settings.check else 0
        runs_V = [checks + timed // turns + len(range(v, warm, turns)) for v in range(turns)]
        needs = load_pattern(self.case.pattern).needs(self.case)
        return expected_traffic(self.variants, runs_V, self.topology, self.transport.capabilities, needs)

    def _oracle(self, variant: Schedule, salt: int) -> Oracle:
        seed, upload = 3 * self.settings.seed + salt, uploader(self.transport.device)
        return Oracle(variant, self.transport.rank, seed, upload)

    def _check(self, stage: str, salt: int, copy: int) -> int:
        """Wrong elements on this rank after one iteration of every variant on one set of buffers."""
        if not self.settings.check:
            return 0
        self.progress.enter(stage)
        wrong, buffers = 0, self.buffers[copy]
        for turn in range(copy, len(self.programs), len(self.buffers)):
            oracle, program = self._oracle(self.variants[turn % len(self.variants)], salt), self.programs[turn]
            oracle.prepare(buffers)
            program.finish()
            self.transport.barrier()  # no rank starts before all are filled
            if self.overlaps and salt == _AFTER:
                overlap.run_with_work(program)
            else:
                program.run()
            self.transport.barrier()
            wrong += oracle.count_wrong(buffers)
            self.progress.ticks += 1
        return wrong

    def _warm_up(self) -> float:
        """Run every variant, which makes all connections; returns the approximate seconds of an iteration."""
        self.progress.enter("warmup")
        self._refill()
        rounds = self._warm_up_rounds()
        began = self.clock()
        for i in range(rounds):
            self.programs[i % len(self.programs)].run()
            self.progress.ticks += 1
        return (self.clock() - began) / max(1, rounds)

    def _warm_up_rounds(self) -> int:
        """Warm-up iterations: at least one per variant, and per registered set, which NCCL maps at first use."""
        least = len(self.programs) if is_registered(self.settings.buffers) else len(self.variants)
        return max(self.settings.warmup, least if least > 1 else 0)

    def _refill(self) -> None:
        for buffers in self.buffers:
            self.timed.prepare(buffers)

    def _loop(self) -> Loop:
        return Loop(
            programs=self.programs,
            barrier=self.transport.barrier,
            clock=self.clock,
            refill=self._refill,
            refill_every=min(map(repeats_before_overflow, self.variants)),
            progress=self.progress,
            launches_per_block=self._whole_turns(self.settings.iterations or LAUNCHES_PER_BLOCK),
            stream=self.transport.stream,
            device_barrier=self.transport.world_size > 1 and not device.starts_together(self.variants),
        )

    def _regime(self, loop: Loop) -> tuple[Callable[[int], Floats], list[str], int]:
        """The timing loop, the labels of its columns, and the number of launches per sample."""
        if self.case.timing is Timing.PIPELINED:
            return partial(regimes.pipelined, loop), ["total"], loop.launches_per_block
        if self.case.timing is Timing.GRAPH:
            launches = self._whole_turns(device.graph_launches(self.case.nbytes))
            return device.captured(loop, launches), ["total"], launches
        on_host = self.transport.stream is None
        if self.overlaps:
            return overlap.overlapped(loop, self.transport.control), list(overlap.COLUMNS), 1
        if not on_host and any(variant.waits_for_host for variant in self.variants):
            # Behind a gate the host would wait for counts that the gate delays.
            loop.remarks.add("the host waits for counts in every iteration: timed ungated, launch costs included")
            on_host = True
        return partial(regimes.isolated if on_host else device.gated, loop), loop.columns, 1

    def _whole_turns(self, launches: int) -> int:
        """`launches`, rounded up to a multiple of the number of variants."""
        return launches + -launches % len(self.variants)

    def _setup(self) -> dict[str, Json]:
        if self.transport.device == "cpu":
            return {"buffers": "numpy", "copies": 1}
        setup: dict[str, Json] = {
            "buffers": self.settings.buffers,
            "copies": len(self.buffers),
            "cache": "cold" if self.cold else "warm",
        }
        if is_registered(self.settings.buffers):
            setup["registered"] = self.transport.registered
        return setup
