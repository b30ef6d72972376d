"""One case, from its schedule to its record, on every rank at once."""

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import numpy as np

from ncclbench.buffers import allocate
from ncclbench.errors import Unable
from ncclbench.measure.regimes import LAUNCHES_PER_BLOCK, REGIMES, Clock, Loop, Progress
from ncclbench.measure.sampling import FEWEST_SAMPLES, Rule, Samples, collect
from ncclbench.measure.statistics import MICRO, Floats, skew, summarise
from ncclbench.plan import Settings
from ncclbench.registry import load
from ncclbench.schedule.case import Case, Timing
from ncclbench.schedule.dtypes import Array
from ncclbench.schedule.ledger import Ledger, phase_ledger
from ncclbench.schedule.oracle import Oracle, repeats_before_overflow
from ncclbench.schedule.rates import alg_gb_per_s, bus_factor
from ncclbench.schedule.schedule import Schedule
from ncclbench.store.records import GroupResult, PhaseResult, Record, Status
from ncclbench.topology import Topology
from ncclbench.transports.base import Transport


@dataclass(frozen=True)
class Measurement:
    """A case's record, and the samples behind it (None if nothing was timed)."""

    record: Record
    samples: Samples | None = None


@dataclass(frozen=True)
class Validation:
    """Wrong elements of each rank, shape (R,), and the tolerance they were judged with."""

    wrong_R: Array
    tolerance: float
    why: str | None


def build_schedule(case: Case, topology: Topology) -> Schedule:
    """The schedule that the case's pattern makes of it here.

    Raises:
        Unable: if the pattern cannot run on this topology.
        UsageError: if there is no such pattern, or its parameters are wrong.
    """
    module = load("patterns", case.pattern)
    schedule: Schedule = module.schedule(case, topology)
    return schedule


def run_case(
    case: Case,
    transport: Transport,
    topology: Topology,
    settings: Settings | None = None,
    *,
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
) -> Measurement | None:
    """Check and time one case; all ranks call it, rank 0 gets the measurement, the others None.

    Args:
        case: what to measure.
        transport: this rank's.
        topology: where the ranks sit.
        settings: how to measure.
        clock: seconds, monotonic; tests pass their own.
        progress: told how far it is, for a watchdog.

    Raises:
        TransportError: if the library underneath fails.
    """
    settings, progress = settings or Settings(), progress or Progress()
    started = datetime.datetime.now(datetime.UTC)
    try:
        schedule = build_schedule(case, topology)
        if case.timing not in REGIMES:
            raise Unable(f"{case.timing} timing needs a GPU transport; {transport.name} runs on the host")
        with transport.translating(case.id):
            samples, validation = _measure(case, schedule, transport, settings, clock, progress)
    except Unable as unable:
        if transport.rank:
            return None
        return Measurement(base_record(case, transport.name, topology.world_size, started, "skipped", str(unable)))
    if samples is None:
        return None
    base = base_record(case, transport.name, topology.world_size, started)
    return Measurement(complete_record(base, case, schedule, topology, settings, samples, validation), samples)


def _measure(
    case: Case, schedule: Schedule, transport: Transport, settings: Settings, clock: Clock, progress: Progress
) -> tuple[Samples | None, Validation | None]:
    progress.enter("compile")
    buffers = allocate(schedule, transport.device)
    program = transport.compile(schedule, buffers)
    oracles = [Oracle(schedule, transport.rank, salt=3 * settings.seed + k) for k in range(3)]
    wrong = 0
    # Once before and once after timing, with other values: what is left over from the first pass is wrong in the
    # second. The values timed are a third set, so neither check sees its own data in a stale buffer.
    oracles[0].prepare(buffers)
    if settings.check:
        progress.enter("check before")
        wrong += _check(oracles[0], program.run, transport, buffers)
    oracles[1].prepare(buffers)
    progress.enter("warmup")
    began = clock()
    for _ in range(settings.warmup):
        program.run()
        progress.ticks += 1
    seconds_each = (clock() - began) / max(1, settings.warmup)
    loop = Loop(
        program=program,
        barrier=transport.barrier,
        clock=clock,
        refill=partial(oracles[1].prepare, buffers),
        refill_every=repeats_before_overflow(schedule),
        progress=progress,
        launches_per_block=settings.iterations or LAUNCHES_PER_BLOCK,
    )
    rule, columns, scale = _rule(case, settings, loop)
    progress.enter("timed")
    samples = collect(
        partial(REGIMES[case.timing], loop), columns, rule, transport.control, clock, scale * seconds_each
    )
    if not settings.check:
        return samples, None
    progress.enter("check after")
    oracles[2].prepare(buffers)
    wrong += _check(oracles[2], program.run, transport, buffers)
    counts = transport.control.gather(np.array([wrong], np.int64))
    if counts is None:
        return samples, None
    return samples, Validation(counts[:, 0], oracles[0].tolerance, oracles[0].why)


def _check(oracle: Oracle, run: Callable[[], None], transport: Transport, buffers: Any) -> int:
    """Wrong elements on this rank after one iteration that no rank starts before all are filled."""
    transport.barrier()
    run()
    transport.barrier()
    return oracle.count_wrong(buffers)


def _rule(case: Case, settings: Settings, loop: Loop) -> tuple[Rule, list[str], int]:
    """When to stop, the columns of a sample, and how many launches one is."""
    fixed, columns, launches = settings.iterations, loop.columns, 1
    if case.timing is Timing.PIPELINED:
        fixed = FEWEST_SAMPLES if settings.iterations else None
        columns, launches = ["total"], loop.launches_per_block
    return Rule(fixed=fixed, precision=settings.precision, max_seconds=settings.max_seconds), columns, launches


def base_record(
    case: Case,
    transport: str,
    world_size: int,
    started: datetime.datetime,
    status: Status = "ok",
    reason: str | None = None,
) -> Record:
    """What a record says whether or not anything was measured."""
    return Record(
        case=case.id,
        pattern=case.pattern,
        params=case.params,
        transport=transport,
        timing=case.timing.value,
        dtype=case.dtype,
        bytes=case.nbytes,
        world_size=world_size,
        status=status,
        reason=reason,
        started=started.isoformat(timespec="seconds").replace("+00:00", "Z"),
    )


def complete_record(
    base: Record,
    case: Case,
    schedule: Schedule,
    topology: Topology,
    settings: Settings,
    samples: Samples,
    validation: Validation | None,
) -> Record:
    """The record of a case that was timed: summaries, rates, ledgers, and whether the data were right."""
    time_us = summarise(samples.slowest_N)
    members = schedule.rate_groups.shape[1]
    rate = alg_gb_per_s(schedule.size_bytes, time_us.p50 / MICRO) if schedule.op and time_us.p50 > 0 else None
    factor = bus_factor(schedule.op, members) if schedule.op else 0.0
    ledgers = [phase_ledger(phase, topology, schedule.dtype.itemsize) for phase in schedule.phases]
    wrong = int(validation.wrong_R.sum()) if validation else None
    return msgspec.structs.replace(
        base,
        status="wrong" if wrong else "ok",
        reason=_why_wrong(validation) if wrong else None,
        wrong=wrong,
        wrong_ranks=np.flatnonzero(validation.wrong_R).tolist() if validation else [],
        tolerance=validation.tolerance if validation else 0.0,
        notes=[f"tolerance: {validation.why}"] if validation and validation.why else [],
        warmup=settings.warmup,
        stopped=samples.stopped,
        launches_per_sample=(settings.iterations or LAUNCHES_PER_BLOCK) if case.timing is Timing.PIPELINED else 1,
        count=schedule.count,
        size_bytes=schedule.size_bytes,
        redop=schedule.redop,
        root=schedule.root,
        group_size=members,
        time_us=time_us,
        skew_us=skew(samples.seconds_RNK[:, :, 0]),
        alg_gb_per_s=rate,
        bus_gb_per_s=rate * factor if rate is not None else None,
        phases=_phase_results(schedule, samples, ledgers),
        groups=_group_results(schedule, samples.seconds_RNK[:, :, 0], factor),
        ledger=sum(ledgers[1:], ledgers[0]).as_record(time_us.p50 / MICRO),
    )


def _why_wrong(validation: Validation | None) -> str:
    assert validation is not None
    ranks = np.flatnonzero(validation.wrong_R).tolist()
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"{int(validation.wrong_R.sum())} elements differ from what they must be, on rank {shown}"


def _phase_results(schedule: Schedule, samples: Samples, ledgers: list[Ledger]) -> list[PhaseResult]:
    results = []
    for k, (phase, ledger) in enumerate(zip(schedule.phases, ledgers, strict=True), 1):
        if phase.label in samples.labels:
            summary = summarise(samples.seconds_RNK[:, :, k].max(axis=0))
        elif len(schedule.phases) == 1:
            summary = summarise(samples.slowest_N)
        else:
            results.append(PhaseResult(label=phase.label, ledger=ledger.as_record()))
            continue
        results.append(PhaseResult(label=phase.label, ledger=ledger.as_record(summary.p50 / MICRO), time_us=summary))
    return results


def _group_results(schedule: Schedule, seconds_RN: Floats, factor: float) -> list[GroupResult]:
    """One result a group where several ran side by side; groups are never averaged."""
    if len(schedule.rate_groups) == 1:
        return []
    results = []
    for ranks in schedule.rate_groups:
        summary = summarise(seconds_RN[ranks].max(axis=0))
        rate = alg_gb_per_s(schedule.size_bytes, summary.p50 / MICRO) * factor if schedule.op else None
        results.append(GroupResult(ranks=ranks.tolist(), time_us=summary, bus_gb_per_s=rate))
    return results
