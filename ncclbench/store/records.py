"""The records of a run: one object a case, frozen, as they stand in ``results.jsonl``.

Schema history:
    1  first version.

A reader takes fields that it does not know for granted (it ignores them) and refuses a higher schema.
"""

from typing import Annotated, Any, Literal

import msgspec

SCHEMA = 1

Status = Literal["ok", "wrong", "skipped", "failed", "timeout"]

# What a column of 64 bits holds; a reader refuses what it could only show wrong.
Whole = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
# Samples have ranks as 32 bits.
MOST_RANKS = (1 << 31) - 1
Ranks = Annotated[int, msgspec.Meta(ge=1, le=MOST_RANKS)]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Durations of n iterations, in microseconds.

    Attributes:
        n: how many.
        min: the shortest.
        p50: median.
        p50_lo: lower end of the median's 95% non-parametric interval; None below 6 samples.
        p50_hi: upper end.
        p95: None below 20 samples.
        p99: None below 100 samples.
        max: the longest.
        mean: arithmetic mean.
        cv: standard deviation over mean; None for one sample.
    """

    n: Whole
    min: float
    p50: float
    p50_lo: float | None
    p50_hi: float | None
    p95: float | None
    p99: float | None
    max: float
    mean: float
    cv: float | None


class Skew(msgspec.Struct, frozen=True, kw_only=True):
    """max - min over ranks of one iteration's duration, in microseconds: median and largest."""

    p50: float
    max: float


class PhaseResult(msgspec.Struct, frozen=True, kw_only=True):
    """One phase of a case: its durations (slowest rank of each iteration), and its bytes.

    Attributes:
        label: its name.
        ledger: its bytes.
        time_us: None where it was not timed by itself.
        bound_us: below which no run can be on the wires of the topology file; None where it names no rates.
        share_of_bound: `bound_us` over the median; 1 is all that the wires allow.
        bound_gb_per_s: of a round of flows: what the fastest flow could have, were all done at the bound.
        flows: of a round of flows: each flow's own medians, lists of one entry a flow.
        groups: of a variant's collective: each group's ranks and its own median, `p50_us`.
    """

    label: str
    ledger: dict[str, Any]
    time_us: Summary | None = None
    bound_us: float | None = None
    share_of_bound: float | None = None
    bound_gb_per_s: float | None = None
    flows: dict[str, Any] | None = None
    groups: list[dict[str, Any]] | None = None


class Subtotal(msgspec.Struct, frozen=True, kw_only=True):
    """Several phases' durations added up on each rank; then the slowest rank of each iteration."""

    labels: list[str]
    time_us: Summary


class ComparableRate(msgspec.Struct, frozen=True, kw_only=True):
    """A rate as another program defines it, for comparison with that program alone."""

    gb_per_s: float
    bytes: Whole
    over: str
    definition: str


class Overlap(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a collective was hidden behind computing, as OSU's micro-benchmarks define it.

    ``share_percent = max(0, 100 - (overlapped - compute) / pure * 100)``, of means over all ranks and iterations.

    Attributes:
        share_percent: 100 where computing hides all of it, 0 where it hides nothing.
        pure_us: the collective by itself, started and waited for at once.
        overlapped_us: started, computed, waited for.
        compute_us: the computing in between.
    """

    share_percent: float
    pure_us: float
    overlapped_us: float
    compute_us: float


class GroupResult(msgspec.Struct, frozen=True, kw_only=True):
    """One of several groups that ran side by side."""

    ranks: list[Whole]
    time_us: Summary
    bus_gb_per_s: float | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One case of a run; ``docs/formats.md`` says what each field means.

    `dtype`, `world_size`, `started`, `tolerance`, `warmup` and `launches_per_sample` are None only where `imported` is
    not: a log need not say them.
    """

    case: str
    pattern: str
    transport: str
    timing: str
    dtype: str | None
    bytes: Whole
    world_size: Ranks | None
    status: Status
    started: str | None
    schema: int = SCHEMA
    start: Whole = 0
    """Which process start of the run, from 0; a plan declares how many there are."""
    mode: str | None = None
    """The plan's mode that the process was started in; None of a plan without modes."""
    params: dict[str, Any] = {}
    reason: str | None = None
    wrong: Whole | None = None
    wrong_ranks: list[Whole] = []
    tolerance: float | None = 0.0
    notes: list[str] = []
    warmup: Whole | None = 0
    stopped: str | None = None
    launches_per_sample: Whole | None = 1
    variants: Whole = 1
    """How many schedules iterations rotate through; bytes and rates are of one rotation."""
    count: Whole | None = None
    size_bytes: Whole | None = None
    redop: str | None = None
    root: Whole | None = None
    group_size: Whole | None = None
    time_us: Summary | None = None
    skew_us: Skew | None = None
    alg_gb_per_s: float | None = None
    bus_gb_per_s: float | None = None
    phases: list[PhaseResult] = []
    groups: list[GroupResult] = []
    overlap: Overlap | None = None
    staged: bool | None = None
    subtotals: dict[str, Subtotal] = {}
    ratios: dict[str, float] = {}
    comparable: dict[str, ComparableRate] = {}
    facts: list[dict[str, Any]] = []
    """What a pattern says of its schedules, one entry a variant; see the pattern's own page."""
    ledger: dict[str, Any] | None = None
    samples: str | None = None
    setup: dict[str, Any] = {}
    path: dict[str, Any] | None = None
    gpus: list[dict[str, Any]] = []
    ranks: list[Whole] = []
    """The ranks at fault, for `failed` and `timeout`."""
    imported: dict[str, Any] | None = None
    """Where another tool's figure comes from: tool, version, file and line; None for what ncclbench has measured."""
