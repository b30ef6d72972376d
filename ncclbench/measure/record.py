"""The record of a case, from its samples, its schedule and the outcome of its checks."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from ncclbench.analysis.summary import MICRO, Floats, skew, summarise
from ncclbench.measure.compute_overlap import overlap_of
from ncclbench.measure.derived_results import comparable_of, flow_results, group_medians, ratios_of, subtotals_of
from ncclbench.measure.network.expected_traffic import ExpectedTraffic
from ncclbench.measure.network.path_proof import proof_notes, reconcile
from ncclbench.measure.network.port_watch import Counted
from ncclbench.measure.sampling import Samples
from ncclbench.plan.plan import Settings
from ncclbench.schedule.case import Case
from ncclbench.schedule.dtypes import Array
from ncclbench.schedule.ledger import Ledger, phase_ledger, rotation_record, schedule_ledger
from ncclbench.schedule.minimum_time import minimum_seconds
from ncclbench.schedule.phases import Exchange
from ncclbench.schedule.rates import alg_gb_per_s, bus_factor
from ncclbench.schedule.schedule import Schedule
from ncclbench.store.gpu_warnings import gpu_warnings
from ncclbench.store.records import (
    GpuReading,
    GroupResult,
    Json,
    LedgerRecord,
    PathRecord,
    PhaseResult,
    Record,
    Status,
)
from ncclbench.topology import Link, Topology
from ncclbench.topology.placement import straddling
from ncclbench.transports.base import Evidence


@dataclass(frozen=True)
class Validation:
    """Wrong elements of each rank, shape (R,), the tolerance of the check, and the reason for that tolerance."""

    wrong_R: Array
    tolerance: float
    why: str | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What rank 0 knows when a case is over.

    Attributes:
        samples: all ranks' durations.
        validation: None without checks.
        launches_per_sample: N of a pipelined block, or the launches in a graph; 1 otherwise.
        setup: which buffers were used, how many sets, and whether the cache was cold.
        remarks: notes of the timing loop.
        before: each rank's evidence before timing.
        after: each rank's evidence after timing.
        counted: what each rank's NIC counted; empty where nothing leaves an NVLink domain.
        wanted: what the NICs must have carried; None where no NIC counted.
    """

    samples: Samples
    validation: Validation | None = None
    launches_per_sample: int = 1
    setup: Mapping[str, Json] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    before: Sequence[Evidence] = ()
    after: Sequence[Evidence] = ()
    counted: Sequence[Counted] = ()
    wanted: ExpectedTraffic | None = None


def base_record(
    case: Case,
    transport: str,
    world_size: int,
    started: datetime.datetime,
    status: Status = "ok",
    reason: str | None = None,
) -> Record:
    """The fields of a record that do not depend on the measurement."""
    return Record(
        case=case.id,
        pattern=case.pattern,
        params=dict(case.params),
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
    variants: Sequence[Schedule],
    topology: Topology,
    settings: Settings,
    outcome: Outcome,
) -> Record:
    """The record of a case that was timed: summaries, rates, ledgers, and whether the data were right.

    Bytes are of one rotation through all variants. Rates are those bytes over the sum of the variants' medians.
    """
    samples, validation, schedule = outcome.samples, outcome.validation, variants[0]
    time_us = summarise(samples.slowest_N)
    members = schedule.rate_groups.shape[1]
    rotation = _rotation_seconds(variants, samples, time_us.p50 / MICRO)
    moved = sum(variant.size_bytes for variant in variants)
    rate = alg_gb_per_s(moved, rotation) if schedule.op and rotation > 0 else None
    factor = bus_factor(schedule.op, members) if schedule.op else 0.0
    phases = _phase_results(variants, samples, topology)
    subtotals = subtotals_of(variants, samples)
    timed = {phase.label: phase.time_us for phase in phases} | {name: s.time_us for name, s in subtotals.items()}
    wrong = int(validation.wrong_R.sum()) if validation else None
    remarks = _placement(base, topology)
    ledgers = [schedule_ledger(variant, topology) for variant in variants]
    path = merge_paths(outcome.before, outcome.after)
    if outcome.counted and outcome.wanted is not None:
        path = reconcile(outcome.wanted, outcome.counted, topology, path)
    return msgspec.structs.replace(
        base,
        status="wrong" if wrong else "ok",
        reason=_why_wrong(validation) if wrong else None,
        wrong=wrong,
        wrong_ranks=np.flatnonzero(validation.wrong_R).tolist() if validation else [],
        tolerance=validation.tolerance if validation else 0.0,
        notes=[
            *_notes(outcome, ledgers, topology),
            *remarks,
            *proof_notes(path),
            *_single_rank_note(schedule, members),
        ],
        warmup=settings.warmup,
        stopped=samples.stopped,
        launches_per_sample=outcome.launches_per_sample,
        count=schedule.count,
        size_bytes=schedule.size_bytes,
        redop=schedule.redop,
        root=schedule.root,
        group_size=members,
        time_us=time_us,
        skew_us=skew(samples.seconds_RNK[:, :, 0]),
        alg_gb_per_s=rate,
        bus_gb_per_s=rate * factor if rate is not None else None,
        variants=len(variants),
        phases=phases,
        # Variants have different groups, so a rank's total belongs to no group. The phases have their groups.
        groups=_group_results(schedule, samples.seconds_RNK[:, :, 0], factor) if len(variants) == 1 else [],
        overlap=overlap_of(samples.labels, samples.seconds_RNK),
        subtotals=subtotals,
        ratios=ratios_of(variants, timed),
        comparable=comparable_of(variants, timed),
        facts=[dict(variant.facts) for variant in variants if variant.facts],
        ledger=_ledger(ledgers, rotation),
        setup=dict(outcome.setup),
        path=path,
        gpus=_gpus(outcome.before, outcome.after),
    )


def _single_rank_note(schedule: Schedule, members: int) -> list[str]:
    """A note for a group of one rank, whose rate a reader could take for that of a link."""
    return ["a group of one rank sends nothing: its rates are of no link"] if schedule.op and members == 1 else []


def _notes(outcome: Outcome, ledgers: Sequence[Ledger], topology: Topology) -> list[str]:
    """The notes of the timing loop, the tolerance, sockets and GPUs."""
    notes = [*outcome.remarks]
    if outcome.validation and outcome.validation.why:
        notes.append(f"tolerance: {outcome.validation.why}")
    if _used_sockets(outcome, ledgers, topology):
        notes.append("NCCL used sockets (NET/Socket): this is not the fabric's speed")
    for gpu in _gpus(outcome.before, outcome.after):
        notes += [f"rank {gpu.rank}: {warning}" for warning in gpu.warnings]
    return notes


def _used_sockets(outcome: Outcome, ledgers: Sequence[Ledger], topology: Topology) -> bool:
    """Whether NCCL carried this case over sockets.

    NCCL logs a link once, when it connects two ranks. Its log therefore has the links of all cases of the process so
    far. If a case stays inside a node, sockets that were logged before it may be those between nodes and do not count.
    """
    then, now = (merge_paths(views, ()) or PathRecord() for views in (outcome.before, outcome.after))
    if "NET/Socket" not in now.links:
        return False
    leaves = any(ledger.sent[:, Link.NODE + 1 :].any() for ledger in ledgers)
    others_may = len(np.unique(topology.nodes)) > 1
    return leaves or not others_may or "NET/Socket" not in then.links


def _placement(base: Record, topology: Topology) -> list[str]:
    """A warning about expert-parallel groups that cross NVLink domains although they would fit into one."""
    size = str(base.params.get("ep", ""))
    warning = straddling(topology, int(size)) if size.isdecimal() else ""
    return [warning] if warning else []


def merge_paths(before: Sequence[Evidence], after: Sequence[Evidence]) -> PathRecord | None:
    """The paths that all ranks logged, as one: lists are united; values that differ become a list of text."""
    paths = [view.path for view in (*before, *after) if view.path is not None]
    if not paths:
        return None
    merged: dict[str, object] = {}
    for name in PathRecord.__struct_fields__:
        values = [value for path in paths if (value := getattr(path, name)) not in (None, [])]
        if values and isinstance(values[0], list):
            merged[name] = sorted({item for value in values for item in value})
        elif values:
            distinct = sorted({str(value) for value in values})
            merged[name] = values[0] if len(distinct) == 1 else distinct
    return msgspec.convert(merged, PathRecord)


def _gpus(before: Sequence[Evidence], after: Sequence[Evidence]) -> list[GpuReading]:
    """Each rank's GPU before and after the case, with warnings."""
    return [
        GpuReading(rank=rank, before=then.gpu, after=now.gpu, warnings=gpu_warnings(then.gpu, now.gpu))
        for rank, (then, now) in enumerate(zip(before, after, strict=True))
        if then.gpu is not None and now.gpu is not None
    ]


def _why_wrong(validation: Validation | None) -> str:
    assert validation is not None
    ranks = np.flatnonzero(validation.wrong_R).tolist()
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"{int(validation.wrong_R.sum())} elements differ from what they must be, on rank {shown}"


def _rotation_seconds(variants: Sequence[Schedule], samples: Samples, p50: float) -> float:
    """Seconds of one iteration of every variant: the sum of their medians where each iteration has one variant."""
    turns, slowest_N = len(variants), samples.slowest_N
    if samples.mixed or turns == 1:
        return p50 * turns
    return float(sum(np.median(slowest_N[k::turns]) for k in range(turns)))


def _phase_results(variants: Sequence[Schedule], samples: Samples, topology: Topology) -> list[PhaseResult]:
    """One result per phase label, over the variants that have the phase."""
    ledgers: dict[str, list[Ledger]] = {}
    for variant in variants:
        for phase in variant.phases:
            ledgers.setdefault(phase.label, []).append(phase_ledger(phase, topology, variant.dtype.itemsize))
    results = []
    for label, found in ledgers.items():
        if label in samples.labels:
            seconds_N = samples.seconds_RNK[:, :, samples.labels.index(label)].max(axis=0)
            summary = summarise(seconds_N[~np.isnan(seconds_N)])
        elif len(ledgers) == 1:
            summary = summarise(samples.slowest_N)
        else:
            results.append(PhaseResult(label=label, ledger=_ledger(found)))
            continue
        seconds = summary.p50 / MICRO * len(found)
        results.append(
            PhaseResult(
                label=label,
                ledger=_ledger(found, seconds),
                time_us=summary,
                flows=flow_results(label, variants, samples),
                groups=group_medians(label, variants, samples),
                **_bound(label, variants, topology, summary.p50),
            )
        )
    return results


def _ledger(ledgers: Sequence[Ledger], seconds: float | None = None) -> LedgerRecord:
    return msgspec.convert(rotation_record(ledgers, seconds), LedgerRecord)


def _bound(label: str, variants: Sequence[Schedule], topology: Topology, p50_us: float) -> dict[str, float]:
    """The fields that compare a phase with the rates in the topology file; empty where the file has no rates."""
    found = [(one, phase) for one in variants for phase in one.phases if phase.label == label]
    bounds = [minimum_seconds(phase, topology, one.dtype.itemsize, aligned=one.aligned) for one, phase in found]
    known = [bound for bound in bounds if bound is not None]
    if len(known) < len(found) or p50_us <= 0:
        return {}
    seconds = sum(known) / len(known)
    result = {"bound_us": seconds * MICRO, "share_of_bound": seconds * MICRO / p50_us}
    if len(found) == 1 and isinstance(phase := found[0][1], Exchange):
        result["bound_gb_per_s"] = alg_gb_per_s(int(phase.nbytes.max()), seconds)
    return result


def _group_results(schedule: Schedule, seconds_RN: Floats, factor: float) -> list[GroupResult]:
    """One result per group where several ran side by side; groups are never averaged."""
    if len(schedule.rate_groups) == 1:
        return []
    results = []
    for ranks in schedule.rate_groups:
        summary = summarise(seconds_RN[ranks].max(axis=0))
        rate = alg_gb_per_s(schedule.size_bytes, summary.p50 / MICRO) * factor if schedule.op else None
        results.append(GroupResult(ranks=ranks.tolist(), time_us=summary, bus_gb_per_s=rate))
    return results
