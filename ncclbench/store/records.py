"""The records of a run: one object per case, frozen, as they stand in ``results.jsonl``.

Schema history:
    1  first version.

A line is decoded to a `Record` once, where its file is read. A line of another shape is damaged, and is refused as a
whole. Readers ignore unknown fields and refuse a higher schema.

Data that plug-ins define (a pattern's parameters and facts, a set-up, counters of a GPU) stays `Json`.
"""

from typing import Annotated, Literal, TypeVar

import msgspec

from ncclbench.units import Int64

SCHEMA = 1
# The reader refuses a newer schema first, since a newer file may have another shape.
Version = Annotated[int, msgspec.Meta(ge=1, extra_json_schema={"maximum": SCHEMA})]

Status = Literal["ok", "wrong", "skipped", "failed", "timeout"]
# The two halves of a row of nccl-tests.
Placement = Literal["out_of_place", "in_place"]

# Any JSON data. msgspec cannot decode a recursive alias, so JSON is untyped here, and only here.
Json = Annotated[object, msgspec.Meta(extra_json_schema={"description": "any JSON"})]

Bytes = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Index = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
# Samples store ranks as int32.
MOST_RANKS = (1 << 31) - 1
Ranks = Annotated[int, msgspec.Meta(ge=1, le=MOST_RANKS)]


T = TypeVar("T")


def null() -> None:
    """The default of a field that is written as null if it is unknown; `omit_defaults` keeps such fields."""


def no_entries() -> list[T]:
    """The default of a list that is written even if it is empty; `omit_defaults` leaves out `[]` and `list`."""
    return []


def no_fields() -> dict[str, T]:
    """The default of an object that is written even if it is empty."""
    return {}


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Durations of n iterations, in microseconds.

    Attributes:
        n: number of iterations.
        min: the shortest duration.
        p50: median.
        p50_lo: lower end of the median's 95% non-parametric interval; null below 6 samples.
        p50_hi: upper end of that interval; null below 6 samples.
        p95: 95th percentile; null below 20 samples.
        p99: 99th percentile; null below 100 samples.
        max: the longest duration.
        mean: arithmetic mean.
        cv: standard deviation over mean; null for one sample.
    """

    n: Int64
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
    """Longest minus shortest rank of one iteration, in microseconds.

    Attributes:
        p50: median over iterations.
        max: largest value over iterations.
    """

    p50: float
    max: float


class LinkLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The load of the busiest rank on one link class.

    Attributes:
        bottleneck_bytes: bytes that the rank sends or receives, the larger of the two.
        bottleneck_gb_per_s: `bottleneck_bytes` over the median time; null without a time.
    """

    bottleneck_bytes: Bytes | None = None
    bottleneck_gb_per_s: float | None = None


class LedgerRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The bytes of a case or of one of its phases.

    Attributes:
        sent_bytes: bytes sent by all ranks, per link class.
        bottleneck_bytes: the most bytes that one rank sends or receives.
        bottleneck_gb_per_s: `bottleneck_bytes` over the median time; null without a time.
        basis: what the bytes were counted from.
        links: load of the busiest rank, per link class that carries bytes.
    """

    sent_bytes: dict[str, Bytes] = msgspec.field(default_factory=no_fields)
    bottleneck_bytes: Bytes | None = None
    bottleneck_gb_per_s: float | None = msgspec.field(default_factory=null)
    basis: str | None = None
    links: dict[str, LinkLoad] = msgspec.field(default_factory=no_fields)


class FlowTimes(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The flows of a round: lists with one entry per flow.

    Attributes:
        src: sending rank.
        dst: receiving rank.
        nbytes: bytes of the flow.
        p50_us: median over iterations of the longer of the two ends' durations.
        send_p50_us: median of the sending end's durations.
        recv_p50_us: median of the receiving end's durations.
    """

    src: list[Int64] = []
    dst: list[Int64] = []
    nbytes: list[Bytes] = []
    p50_us: list[float | None] = []
    send_p50_us: list[float | None] = []
    recv_p50_us: list[float | None] = []


class GroupMedian(msgspec.Struct, frozen=True, kw_only=True):
    """The median of one group of a variant's collective.

    Attributes:
        ranks: members of the group.
        p50_us: median of the group.
    """

    ranks: list[Int64]
    p50_us: float | None


class PhaseResult(msgspec.Struct, frozen=True, kw_only=True):
    """One phase of a case: its durations (slowest rank of each iteration) and its bytes.

    Attributes:
        label: name of the phase.
        ledger: bytes of the phase.
        time_us: durations of the phase; null if it was not timed separately.
        bound_us: time that the busiest link of the topology file needs; null if the file has no rates.
        share_of_bound: `bound_us` over the median; 1 is the limit of the links.
        bound_gb_per_s: of a round of flows: the bytes of one flow over `bound_us`.
        flows: of a round of flows: each flow's own medians.
        groups: of a variant's collective: each group's ranks and its own median.
    """

    label: str
    ledger: LedgerRecord
    time_us: Summary | None = None
    bound_us: float | None = None
    share_of_bound: float | None = None
    bound_gb_per_s: float | None = None
    flows: FlowTimes | None = None
    groups: list[GroupMedian] | None = None


class Subtotal(msgspec.Struct, frozen=True, kw_only=True):
    """The durations of several phases, added per rank; then the slowest rank of each iteration.

    Attributes:
        labels: the phases.
        time_us: the sum of their durations.
    """

    labels: list[str]
    time_us: Summary


class ComparableRate(msgspec.Struct, frozen=True, kw_only=True):
    """A rate by the definition of another program, for comparison with that program only.

    Attributes:
        gb_per_s: the rate.
        bytes: the bytes that the program counts.
        over: the phase or subtotal whose time is used.
        definition: the program's definition, in words.
    """

    gb_per_s: float
    bytes: Int64
    over: str
    definition: str


class Overlap(msgspec.Struct, frozen=True, kw_only=True):
    """The share of a collective that computing hides, as defined by OSU's micro-benchmarks.

    ``share_percent = max(0, 100 - (overlapped - compute) / pure * 100)``, of means over all ranks and iterations.

    Attributes:
        share_percent: 100 if computing hides all of the collective, 0 if it hides nothing.
        pure_us: time of the collective without computing.
        overlapped_us: time to start the collective, compute, and wait for the collective.
        compute_us: time of the computing between start and wait.
    """

    share_percent: float
    pure_us: float
    overlapped_us: float
    compute_us: float


class GroupResult(msgspec.Struct, frozen=True, kw_only=True):
    """One of several groups that ran at the same time.

    Attributes:
        ranks: members of the group.
        time_us: durations of the slowest rank of the group.
        bus_gb_per_s: bus bandwidth of the group; null if the pattern has no single rate.
    """

    ranks: list[Int64]
    time_us: Summary
    bus_gb_per_s: float | None = None


class RailCounters(msgspec.Struct, frozen=True, kw_only=True):
    """The bytes that the NICs of one rail carried over the whole case, with checks and warm-up.

    Attributes:
        rail: index of the rail.
        expected_sent: sent bytes by the ledger.
        sent: sent bytes by the counters of the NICs; null if a counter could not be read.
        expected_received: received bytes by the ledger.
        received: received bytes by the counters of the NICs; null if a counter could not be read.
    """

    rail: Int64
    expected_sent: Int64 | None = None
    sent: Int64 | None = None
    expected_received: Int64 | None = None
    received: Int64 | None = None


class NicMismatch(msgspec.Struct, frozen=True, kw_only=True):
    """A NIC whose counters do not agree with the ledger.

    Attributes:
        rank: rank that uses the NIC.
        node: name of the node.
        rail: rail of the NIC.
        device: name of the NIC.
        direction: ``sent`` or ``received``.
        expected_bytes: bytes by the ledger.
        counted_bytes: bytes by the NIC's counter; null if it could not be read.
        other_ports: bytes that the other ports of the node counted in the same time.
    """

    rank: Int64
    node: str | None = None
    rail: Int64 | None = None
    device: str | None = None
    direction: str | None = None
    expected_bytes: Int64 | None = None
    counted_bytes: Int64 | None = None
    other_ports: dict[str, Int64 | None] = {}


class CounterMove(msgspec.Struct, frozen=True, kw_only=True):
    """An error or congestion counter that rose during a case.

    Attributes:
        rank: rank that uses the NIC.
        port: name of the port.
        counter: name of the counter.
        by: increase of the counter.
    """

    rank: Int64 | None = None
    port: str | None = None
    counter: str | None = None
    by: Int64 | None = None


class Retransmits(msgspec.Struct, frozen=True, kw_only=True):
    """TCP retransmits: lists with one entry per pair of ranks.

    Attributes:
        src: sending rank.
        dst: receiving rank.
        segments: number of segments that were sent.
        again: number of segments that were retransmitted.
    """

    src: list[Int64] = []
    dst: list[Int64] = []
    segments: list[Int64] = []
    again: list[Int64] = []


class PathCounters(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The NIC counters of a case.

    Attributes:
        rails: expected and counted bytes of each rail.
        off: NICs whose counters do not agree with the ledger, up to 16.
        moved: error and congestion counters that rose; of TCP also ``tcp_lost_sending`` and ``tcp_lost_receiving``.
        repeats: TCP retransmits, if there were any.
    """

    rails: list[RailCounters] | None = None
    off: list[NicMismatch] | None = None
    moved: list[CounterMove] | None = None
    repeats: Retransmits | None = None


class PathRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The path of the data, and its proof; a key is present only if its value is known.

    NCCL logs a link once, when it connects ranks. So `links`, `gdr` and `pxn` are those of this case and of all earlier
    cases of the process. If ranks differ in a single value, all of their values are listed, as text.

    Attributes:
        proof: ``proven``, ``contradicted`` or ``unverified``.
        reason: why the path is not proven.
        counters: counters of the NICs.
        version: version of the loaded NCCL, from its log.
        links: links between ranks: ``P2P/CUMEM``, ``NET/IB``, ...
        gdr: whether NICs read GPU memory directly (GPUDirect RDMA).
        channels: NCCL's number of channels.
        nvls: whether NVLink SHARP is used.
        nvls_switched_off: whether a setting switched NVLink SHARP off; false if the hardware lacks it.
        network: NCCL's network: IB, Socket, ...
        pxn: whether NCCL used NVLink to reach the NIC of another rail (PXN).
        calls: op, algorithm and protocol of NCCL's calls, if its log has them.
        warnings: warnings of NCCL.
        link_layer: link layer of the NICs, IB or RoCE.
    """

    proof: str | None = None
    reason: str | None = None
    counters: PathCounters | None = None
    version: str | list[str] | None = None
    links: list[str] = []
    gdr: bool | list[str] | None = None
    channels: Int64 | list[str] | None = None
    nvls: bool | list[str] | None = None
    nvls_switched_off: bool | list[str] | None = None
    network: str | list[str] | None = None
    pxn: bool | list[str] | None = None
    calls: list[str] = []
    warnings: list[str] = []
    link_layer: list[str] = []


class GpuState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The state of a GPU at one time; fields that NVML does not report are left out.

    Attributes:
        clock_seconds: the host's monotonic clock when NVML was read.
        name: model of the GPU, if the record has it.
        sm_mhz: clock of the multiprocessors.
        memory_mhz: clock of the memory.
        celsius: temperature.
        watts: power.
        throttled: reasons for lower clocks, in words.
        errors: error counters by name; values that are no integers are ignored.
    """

    clock_seconds: float | None = None
    name: str | None = None
    sm_mhz: float | None = None
    memory_mhz: float | None = None
    celsius: float | None = None
    watts: float | None = None
    throttled: list[str] | None = None
    errors: dict[str, Json] | None = None


class GpuReading(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's GPU before and after a case.

    Attributes:
        rank: rank that uses the GPU; null if the record does not state it.
        before: state before the case.
        after: state after the case.
        warnings: warnings from the two states.
    """

    rank: Int64 | None = None
    before: GpuState | None = None
    after: GpuState | None = None
    warnings: list[str] = []


class OriginRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The position of an imported figure in another tool's log.

    Attributes:
        source: index into the manifest's `imported`.
        tool: the tool that wrote the log.
        version: version of the tool; null if the log does not state it.
        file: name of the log.
        line: line of the log; null if the log has no lines.
        table: index into the `tables` of that source.
        row: index of the row in the table.
        placement: the half of a row of nccl-tests.
        type: the tool's name of the element type.
        figure: ``table``, or ``per_iteration`` for launches that were timed one by one.
        message_bytes: the size by the tool's definition.
        over_ranks: how the times of the ranks were combined: ``max``, ``mean``, ...
        per_iteration: further statistics over launches in the log.
        timestamp: timestamp of the row.
        cells: further cells of the row.
        error: value of the column ``error``.
    """

    source: Index
    tool: str
    version: str | None = msgspec.field(default_factory=null)
    file: str | None = None
    line: Int64 | None = msgspec.field(default_factory=null)
    table: Index | None = None
    row: Index | None = None
    placement: Placement | None = None
    type: str | None = None
    figure: str | None = None
    message_bytes: Int64 | None = None
    over_ranks: str | None = msgspec.field(default_factory=null)
    per_iteration: dict[str, float | None] = {}
    timestamp: str | None = None
    cells: dict[str, Json] | None = None
    error: float | msgspec.UnsetType | None = msgspec.UNSET

    @property
    def is_nccl_tests_row(self) -> bool:
        """Whether the figure is half a row of a table that nccl-tests printed."""
        return self.tool == "nccl-tests" and self.figure == "table"

    def __post_init__(self) -> None:
        """Refuse a row of nccl-tests without its position, which a report needs.

        Raises:
            ValueError: if a field is missing; msgspec adds the path to the message.
        """
        missing = [name for name in ("table", "row", "placement") if getattr(self, name) is None]
        if missing and self.is_nccl_tests_row:
            raise ValueError(f"Object missing required field `{missing[0]}`")


class RoutedBytes(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of an expert-parallel schedule by one way of counting.

    Attributes:
        remote_bytes: bytes to other ranks.
    """

    remote_bytes: float | None = None


class RoutingFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a pattern's facts that readers use.

    Attributes:
        max_over_mean_received: received bytes of the busiest rank over the mean.
        bases: bytes by each way of counting.
    """

    max_over_mean_received: float | None = None
    bases: dict[str, RoutedBytes] | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One case of a run.

    `dtype`, `world_size`, `started`, `tolerance`, `warmup` and `launches_per_sample` are null only in imported records,
    if the log does not state them.

    Attributes:
        case: id, unique in a plan: ``pattern/dtype/bytes/timing``, then the parameters that are not defaults.
        pattern: name of the pattern.
        transport: name of the transport.
        timing: the timing regime; of imported cases also ``averaged``, ``blocking``, ``cpu_time``.
        dtype: the element type.
        bytes: requested S.
        world_size: number of ranks.
        status: ``ok``, ``wrong``, ``skipped``, ``failed`` or ``timeout``.
        started: when the case began, in UTC.
        schema: 1.
        start: the process start of the run, from 0; the last line of a case in a start counts.
        mode: the plan's mode of the process start; null if the plan has no modes.
        params: the pattern's parameters that are not defaults.
        reason: why the status is not ``ok``; null otherwise.
        wrong: number of elements that differ, over both checks; null with ``--no-check``.
        wrong_ranks: the ranks that hold these elements.
        tolerance: tolerance of the comparison; 0 if bits were compared.
        notes: notes for the reader.
        warmup: iterations before timing.
        stopped: what ended sampling: ``precision``, ``time`` or ``iterations``.
        launches_per_sample: launches of a pipelined block or of a graph; 1 if each launch was timed.
        variants: number of schedules that the iterations rotate through (iteration i runs variant i mod V); bytes and
            rates are those of one rotation, with bottlenecks and medians of the variants added.
        count: share of S per rank, in elements.
        size_bytes: S that was moved: a whole number of elements per rank.
        redop: the reduction, if the pattern has one.
        root: index of the root in its group, if the pattern has one.
        group_size: number of ranks per group.
        time_us: durations of the slowest rank of each iteration.
        skew_us: longest minus shortest rank of each iteration.
        alg_gb_per_s: S over the median time.
        bus_gb_per_s: `alg_gb_per_s` times the factor of nccl-tests; null if the pattern has no single rate.
        phases: label and bytes of each phase, and its time if it was timed separately.
        groups: times and rate of each group, if several groups ran at the same time; never averaged.
        overlap: with ``overlap=true``, the share of the collective that computing hides.
        staged: over MPI with GPU buffers, whether they went through pinned host memory because the library does not
            accept device pointers; null otherwise.
        subtotals: sums of the durations of several phases, by name.
        ratios: ratios of medians, such as ``skew_penalty``.
        comparable: rates by the definition of another program, by name; no bus bandwidth.
        facts: facts of the pattern's schedules, one entry per variant; see the page of the pattern.
        ledger: bytes of one rotation.
        samples: path of the Parquet file with the raw samples, in the run directory.
        setup: `buffers` (``numpy``, ``pool``, ``nccl``, ``torch``), `copies` (buffer sets in the rotation), and
            on GPUs `cache`. It is ``cold`` if L2 cannot hold the next buffers, by rotation or, with `copies` 1, because
            one set is at least 4 times L2. It is ``warm`` if the user asked for it, if no rotation of 64 sets or fewer
            exceeds L2, or if memory is too small for one. With ``nccl`` buffers also `registered`: whether they are
            registered with their communicators.
        path: the path of the data, and its proof.
        gpus: the state of each rank's GPU before and after the case; NVLink checksum errors (CRC) are a warning from
            100 per second and GPU, as in NVIDIA's DCGM.
        ranks: the ranks at fault, for ``failed`` and ``timeout``, if they are known.
        imported: the origin of another tool's figure; null if ncclbench measured the case.
    """

    case: str
    pattern: str
    transport: str
    timing: str
    dtype: str | None
    bytes: Int64
    world_size: Ranks | None
    status: Status
    started: str | None
    schema: Version = SCHEMA
    start: Int64 = 0
    mode: str | None = None
    params: dict[str, Json] = {}
    reason: str | None = None
    wrong: Int64 | None = None
    wrong_ranks: list[Int64] = []
    tolerance: float | None = 0.0
    notes: list[str] = []
    warmup: Int64 | None = 0
    stopped: str | None = None
    launches_per_sample: Int64 | None = 1
    variants: Int64 = 1
    count: Int64 | None = None
    size_bytes: Int64 | None = None
    redop: str | None = None
    root: Int64 | None = None
    group_size: Int64 | None = None
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
    facts: list[dict[str, Json]] = []
    ledger: LedgerRecord | None = None
    samples: str | None = None
    setup: dict[str, Json] = {}
    path: PathRecord | None = None
    gpus: list[GpuReading] = []
    ranks: list[Int64] = []
    imported: OriginRecord | None = None

    def __post_init__(self) -> None:
        """Refuse facts of another shape.

        Raises:
            ValueError: if the facts do not convert to `RoutingFacts`.
        """
        if self.facts:
            msgspec.convert(self.facts, list[RoutingFacts])

    @property
    def routing(self) -> list[RoutingFacts]:
        """The routing part of the facts, one entry per variant."""
        return msgspec.convert(self.facts, list[RoutingFacts])

    @property
    def time_is(self) -> Literal["median", "mean"] | None:
        """The statistic of the headline: a mean if an imported log has one figure for many launches."""
        if self.time_us is None:
            return None
        return "mean" if self.imported is not None and self.time_us.n == 1 else "median"
