"""Records as flat rows: every report format shows the same numbers because all of them start here.

`record_rows` has one row per record with the documented columns of ``COLUMNS``; `flat_frame` is the same as a pandas
frame. Samples are not in them: `ncclbench.store.samples` reads those, one case at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, NamedTuple, get_args, get_type_hints

import msgspec

from ncclbench.store.records import LedgerRecord, PhaseResult, Record
from ncclbench.store.run_directory import Run

if TYPE_CHECKING:
    import pandas as pd


class Meaning(NamedTuple):
    """What a column holds, in one sentence, and its unit; no unit for text and counts."""

    unit: str
    what: str


_B, _US, _RATE = "B", "us", "1e9 B/s"
_AS_DEEPEP_COUNTS = (
    "as DeepEP counts, rows that a rank sends itself included: beside DeepEP's own figures only, no bus bandwidth"
)


@dataclass(frozen=True, kw_only=True)
class RecordRow:
    """A record with exactly the columns of every report, in their order; None is unknown."""

    run: Annotated[str, Meaning("", "the run directory, as it was named")]
    plan: Annotated[str | None, Meaning("", "name of the plan")]
    transport: Annotated[str, Meaning("", "what moved the data")]
    device: Annotated[str | None, Meaning("", "cpu or cuda; none where nothing ran")]
    simulated: Annotated[bool, Meaning("", "whether times were computed by a model instead of measured")]
    world_size: Annotated[int | None, Meaning("", "ranks")]
    nodes: Annotated[int | None, Meaning("", "nodes of the topology")]
    start: Annotated[int, Meaning("", "process start of the run, from 0")]
    mode: Annotated[
        str | None, Meaning("", "the plan's mode that its process was started in; null of a plan without modes")
    ]
    case: Annotated[str, Meaning("", "unique in a plan, and in a process start")]
    pattern: Annotated[str, Meaning("", "")]
    params: Annotated[str, Meaning("", "the pattern's own parameters, as JSON with sorted keys")]
    timing: Annotated[str, Meaning("", "timing regime")]
    dtype: Annotated[str | None, Meaning("", "element type")]
    bytes: Annotated[int, Meaning(_B, "S as asked for")]
    size_bytes: Annotated[int | None, Meaning(_B, "S as moved")]
    count: Annotated[int | None, Meaning("elements", "a rank's share")]
    redop: Annotated[str | None, Meaning("", "reduction")]
    root: Annotated[int | None, Meaning("", "index of the root in its group")]
    group_size: Annotated[int | None, Meaning("", "ranks of a group")]
    status: Annotated[str, Meaning("", "ok, wrong, skipped, failed or timeout")]
    reason: Annotated[str | None, Meaning("", "why it is not ok")]
    wrong: Annotated[int | None, Meaning("elements", "elements that differed; null where nothing was checked")]
    stopped: Annotated[str | None, Meaning("", "what ended sampling: precision, time or iterations")]
    warmup: Annotated[int | None, Meaning("iterations", "iterations before timing")]
    launches_per_sample: Annotated[int | None, Meaning("", "launches of a block; 1 if each was timed")]
    n: Annotated[int | None, Meaning("", "samples behind the figures")]
    time_is: Annotated[
        str | None,
        Meaning("", "what p50_us is: median over iterations, or the mean over launches that another tool's log has"),
    ]
    min_us: Annotated[float | None, Meaning(_US, "shortest iteration, of its slowest rank as all times are")]
    p50_us: Annotated[float | None, Meaning(_US, "the headline: a median, or what time_is says")]
    p50_lo_us: Annotated[float | None, Meaning(_US, "lower end of the median's 95% interval; null below 6 samples")]
    p50_hi_us: Annotated[float | None, Meaning(_US, "upper end")]
    p95_us: Annotated[float | None, Meaning(_US, "null below 20 samples")]
    p99_us: Annotated[float | None, Meaning(_US, "null below 100 samples")]
    max_us: Annotated[float | None, Meaning(_US, "longest iteration")]
    mean_us: Annotated[float | None, Meaning(_US, "arithmetic mean")]
    cv: Annotated[float | None, Meaning("", "standard deviation over mean")]
    skew_p50_us: Annotated[float | None, Meaning(_US, "median over iterations of longest minus shortest rank")]
    skew_max_us: Annotated[float | None, Meaning(_US, "largest of them")]
    alg_gb_per_s: Annotated[float | None, Meaning(_RATE, "S over the median time")]
    bus_gb_per_s: Annotated[float | None, Meaning(_RATE, "times the factor of nccl-tests")]
    sent_self_bytes: Annotated[int | None, Meaning(_B, "ledger: sent over links of class self")]
    sent_node_bytes: Annotated[int | None, Meaning(_B, "ledger: sent over links of class node")]
    sent_domain_bytes: Annotated[int | None, Meaning(_B, "ledger: sent over links of class domain")]
    sent_same_rail_bytes: Annotated[int | None, Meaning(_B, "ledger: sent over links of class same_rail")]
    sent_cross_rail_bytes: Annotated[int | None, Meaning(_B, "ledger: sent over links of class cross_rail")]
    sent_cross_site_bytes: Annotated[int | None, Meaning(_B, "ledger: sent over links of class cross_site")]
    bottleneck_bytes: Annotated[int | None, Meaning(_B, "ledger: the most that one rank sends or receives")]
    bottleneck_gb_per_s: Annotated[float | None, Meaning(_RATE, "that over the median time")]
    overlap_percent: Annotated[
        float | None, Meaning("%", "share of the collective that was hidden behind computing, as OSU defines it")
    ]
    deepep_dispatch_gb_per_s: Annotated[float | None, Meaning(_RATE, f"dispatch {_AS_DEEPEP_COUNTS}")]
    deepep_combine_gb_per_s: Annotated[float | None, Meaning(_RATE, f"combine {_AS_DEEPEP_COUNTS}")]
    path_proof: Annotated[str | None, Meaning("", "whether the path was proven; null where nothing was asked")]
    notes: Annotated[str | None, Meaning("", "what a reader must know, joined by ' | '")]
    samples: Annotated[str | None, Meaning("", "Parquet file of the raw samples, in the run directory")]
    started: Annotated[str | None, Meaning("", "UTC")]

    @property
    def moved_bytes(self) -> int:
        """The size as moved; as asked for where it is not known."""
        return self.bytes if self.size_bytes is None else self.size_bytes

    def value(self, column: str) -> str | float | None:
        """The content of a column."""
        found: str | float | None = getattr(self, column)
        return found

    def figure(self, column: str) -> float | None:
        """The number in a column of numbers."""
        value = self.value(column)
        assert not isinstance(value, str)
        return value


@dataclass(frozen=True, kw_only=True)
class PhaseRow:
    """A phase of a record: its median time where it was timed by itself, and its bytes."""

    run: str
    start: int
    case: str
    phase: str
    p50_us: float | None
    p50_lo_us: float | None
    p50_hi_us: float | None
    sent_self_bytes: int | None
    sent_node_bytes: int | None
    sent_domain_bytes: int | None
    sent_same_rail_bytes: int | None
    sent_cross_rail_bytes: int | None
    sent_cross_site_bytes: int | None
    bottleneck_bytes: int | None
    bottleneck_gb_per_s: float | None


@dataclass(frozen=True)
class Column:
    """A column of `RecordRow`.

    Attributes:
        name: ends in its unit where it has one.
        dtype: the pandas type, always one that can hold "unknown".
        unit: for readers; empty for text and counts.
        what: one sentence.
    """

    name: str
    dtype: str
    unit: str
    what: str

    @property
    def is_number(self) -> bool:
        """Whether it holds figures."""
        return self.dtype in ("Int64", "Float64")


_DTYPES = {str: "string", bool: "boolean", int: "Int64", float: "Float64"}


def _columns() -> tuple[Column, ...]:
    hints = get_type_hints(RecordRow, include_extras=True)
    found = []
    for field in fields(RecordRow):
        kind, meaning = get_args(hints[field.name])
        stored = next(one for one in (*get_args(kind), kind) if one in _DTYPES)
        found.append(Column(field.name, _DTYPES[stored], meaning.unit, meaning.what))
    return tuple(found)


COLUMNS = _columns()
NAMES = tuple(column.name for column in COLUMNS)


def record_rows(runs: Sequence[Run]) -> list[RecordRow]:
    """One row per record of all `runs`."""
    return [row_of(run, record) for run in runs for record in run.records]


def row_of(run: Run, record: Record) -> RecordRow:
    """The row of one record."""
    time_us, skew_us, ledger = record.time_us, record.skew_us, record.ledger or LedgerRecord()
    topology = run.manifest.topology
    rates = {name: rate.gb_per_s for name, rate in record.comparable.items()}
    return RecordRow(
        run=str(run.path),
        plan=run.manifest.plan.name,
        transport=record.transport,
        device=run.manifest.device,
        simulated=run.is_simulated,
        world_size=record.world_size,
        nodes=(len(topology.node_names) or None) if topology else None,
        start=record.start,
        mode=record.mode,
        case=record.case,
        pattern=record.pattern,
        params=params_text(record.params),
        timing=record.timing,
        dtype=record.dtype,
        bytes=record.bytes,
        size_bytes=record.size_bytes,
        count=record.count,
        redop=record.redop,
        root=record.root,
        group_size=record.group_size,
        status=record.status,
        reason=record.reason,
        wrong=record.wrong,
        stopped=record.stopped,
        warmup=record.warmup,
        launches_per_sample=record.launches_per_sample,
        n=time_us.n if time_us else None,
        time_is=record.time_is,
        min_us=time_us.min if time_us else None,
        p50_us=time_us.p50 if time_us else None,
        p50_lo_us=time_us.p50_lo if time_us else None,
        p50_hi_us=time_us.p50_hi if time_us else None,
        p95_us=time_us.p95 if time_us else None,
        p99_us=time_us.p99 if time_us else None,
        max_us=time_us.max if time_us else None,
        mean_us=time_us.mean if time_us else None,
        cv=time_us.cv if time_us else None,
        skew_p50_us=skew_us.p50 if skew_us else None,
        skew_max_us=skew_us.max if skew_us else None,
        alg_gb_per_s=record.alg_gb_per_s,
        bus_gb_per_s=record.bus_gb_per_s,
        sent_self_bytes=ledger.sent_bytes.get("self"),
        sent_node_bytes=ledger.sent_bytes.get("node"),
        sent_domain_bytes=ledger.sent_bytes.get("domain"),
        sent_same_rail_bytes=ledger.sent_bytes.get("same_rail"),
        sent_cross_rail_bytes=ledger.sent_bytes.get("cross_rail"),
        sent_cross_site_bytes=ledger.sent_bytes.get("cross_site"),
        bottleneck_bytes=ledger.bottleneck_bytes,
        bottleneck_gb_per_s=ledger.bottleneck_gb_per_s,
        overlap_percent=record.overlap.share_percent if record.overlap else None,
        deepep_dispatch_gb_per_s=rates.get("deepep_dispatch"),
        deepep_combine_gb_per_s=rates.get("deepep_combine"),
        path_proof=record.path.proof if record.path else None,
        notes=" | ".join(record.notes) or None,
        samples=record.samples,
        started=record.started,
    )


def phase_rows(runs: Sequence[Run]) -> list[PhaseRow]:
    """One row per phase of each record."""
    return [_phase_row(run, record, phase) for run in runs for record in run.records for phase in record.phases]


def _phase_row(run: Run, record: Record, phase: PhaseResult) -> PhaseRow:
    sent = phase.ledger.sent_bytes
    return PhaseRow(
        run=str(run.path),
        start=record.start,
        case=record.case,
        phase=phase.label,
        p50_us=phase.time_us.p50 if phase.time_us else None,
        p50_lo_us=phase.time_us.p50_lo if phase.time_us else None,
        p50_hi_us=phase.time_us.p50_hi if phase.time_us else None,
        sent_self_bytes=sent.get("self"),
        sent_node_bytes=sent.get("node"),
        sent_domain_bytes=sent.get("domain"),
        sent_same_rail_bytes=sent.get("same_rail"),
        sent_cross_rail_bytes=sent.get("cross_rail"),
        sent_cross_site_bytes=sent.get("cross_site"),
        bottleneck_bytes=phase.ledger.bottleneck_bytes,
        bottleneck_gb_per_s=phase.ledger.bottleneck_gb_per_s,
    )


def flat_frame(runs: Sequence[Run]) -> "pd.DataFrame":
    """The rows as a frame with the columns of ``COLUMNS``, each of its documented type."""
    import pandas as pd

    rows = record_rows(runs)
    return pd.DataFrame({c.name: pd.Series([row.value(c.name) for row in rows], dtype=c.dtype) for c in COLUMNS})


def params_text(params: Mapping[str, object]) -> str:
    """Parameters as text that is equal where they are equal."""
    return msgspec.json.encode(params, order="sorted").decode()


def params_of(row: RecordRow) -> dict[str, str]:
    """The parameters of a row, each as text."""
    return {name: str(value) for name, value in msgspec.json.decode(row.params, type=dict[str, object]).items()}
