"""The records of a run: one object per case, frozen, as they stand in ``results.jsonl``.

Schema history:
    1  first version.

A line becomes a typed `Record` once, where its file is read. A line of another shape is damaged and is refused as a
whole, instead of being half shown. Readers ignore unknown fields and refuse a higher schema.

Data that plug-ins define (a pattern's parameters and facts, a set-up, counters of a GPU) stays `Json`.
"""

from typing import Annotated, Literal, TypeVar

import msgspec

from ncclbench.units import Int64

SCHEMA = 1
# That it is not newer is checked first, since a newer file may differ in anything.
Version = Annotated[int, msgspec.Meta(ge=1, extra_json_schema={"maximum": SCHEMA})]

Status = Literal["ok", "wrong", "skipped", "failed", "timeout"]
# The halves of a row of nccl-tests.
Placement = Literal["out_of_place", "in_place"]

# Any JSON data. msgspec cannot decode a recursive alias, so this is the one place where JSON stays untyped.
Json = Annotated[object, msgspec.Meta(extra_json_schema={"description": "any JSON"})]

Bytes = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Index = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
# Samples have ranks as 32 bits.
MOST_RANKS = (1 << 31) - 1
Ranks = Annotated[int, msgspec.Meta(ge=1, le=MOST_RANKS)]


T = TypeVar("T")


def null() -> None:
    """The default of a field that is written as null where it is not known; `omit_defaults` keeps such fields."""


def no_entries() -> list[T]:
    """The default of a list that is written even if it is empty; `omit_defaults` leaves out `[]` and `list`."""
    return []


def no_fields() -> dict[str, T]:
    """The same of an object."""
    return {}


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Durations of n iterations, in microseconds.

    Attributes:
        n: how many.
        min: the shortest.
        p50: median.
        p50_lo: lower end of the median's 95% non-parametric interval; null below 6 samples.
        p50_hi: its upper end.
        p95: 95th percentile; null below 20 samples.
        p99: 99th percentile; null below 100 samples.
        max: the longest.
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
        max: the largest.
    """

    p50: float
    max: float


class LinkLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What the busiest rank sends or receives over one link class.

    Attributes:
        bottleneck_bytes: its bytes.
        bottleneck_gb_per_s: those over the median time; null without a time.
    """

    bottleneck_bytes: Bytes | None = None
    bottleneck_gb_per_s: float | None = None


class LedgerRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The bytes of a case or of one of its phases.

    Attributes:
        sent_bytes: over all ranks, per link class.
        bottleneck_bytes: the most that one rank sends or receives.
        bottleneck_gb_per_s: that over the median time; null without a time.
        basis: what the bytes were counted from.
        links: per link class that carries anything, the load of its busiest rank.
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
    """One group of a variant's collective.

    Attributes:
        ranks: its members.
        p50_us: its median.
    """

    ranks: list[Int64]
    p50_us: float | None


class PhaseResult(msgspec.Struct, frozen=True, kw_only=True):
    """One phase of a case: its durations (slowest rank of each iteration), and its bytes.

    Attributes:
        label: its name.
        ledger: its bytes.
        time_us: its durations; null where it was not timed by itself.
        bound_us: what the busiest wire of the topology file needs; null where the file names no rates.
        share_of_bound: `bound_us` over the median; 1 is all that the wires allow.
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
    """Several phases' durations added up on each rank; then the slowest rank of each iteration.

    Attributes:
        labels: the phases.
        time_us: their sum.
    """

    labels: list[str]
    time_us: Summary


class ComparableRate(msgspec.Struct, frozen=True, kw_only=True):
    """A rate as another program defines it, for comparison with that program alone.

    Attributes:
        gb_per_s: the rate.
        bytes: the bytes that the program counts.
        over: the phase or subtotal whose time was used.
        definition: the program's definition, in words.
    """

    gb_per_s: float
    bytes: Int64
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
    """One of several groups that ran side by side.

    Attributes:
        ranks: its members.
        time_us: durations of its slowest rank.
        bus_gb_per_s: its bus bandwidth; null where the pattern has no single rate.
    """

    ranks: list[Int64]
    time_us: Summary
    bus_gb_per_s: float | None = None


class RailCounters(msgspec.Struct, frozen=True, kw_only=True):
    """What the NICs of one rail carried over the whole case, with checks and warm-up.

    Attributes:
        rail: its index.
        expected_sent: bytes that the ledger says.
        sent: bytes that the NICs counted; null where one could not be read.
        expected_received: bytes that the ledger says.
        received: bytes that the NICs counted; null where one could not be read.
    """

    rail: Int64
    expected_sent: Int64 | None = None
    sent: Int64 | None = None
    expected_received: Int64 | None = None
    received: Int64 | None = None


class NicMismatch(msgspec.Struct, frozen=True, kw_only=True):
    """A NIC whose counters do not agree with the ledger.

    Attributes:
        rank: whose NIC it is.
        node: name of its node.
        rail: its rail.
        device: its name.
        direction: ``sent`` or ``received``.
        expected_bytes: what the ledger says.
        counted_bytes: what the NIC counted; null where it could not be read.
        other_ports: what the other ports of the node counted meanwhile.
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
        rank: whose NIC it is.
        port: name of the port.
        counter: its name.
        by: how far it rose.
    """

    rank: Int64 | None = None
    port: str | None = None
    counter: str | None = None
    by: Int64 | None = None


class Retransmits(msgspec.Struct, frozen=True, kw_only=True):
    """TCP segments that were sent again: lists with one entry per pair of ranks.

    Attributes:
        src: sending rank.
        dst: receiving rank.
        segments: how many were sent.
        again: how many of them more than once.
    """

    src: list[Int64] = []
    dst: list[Int64] = []
    segments: list[Int64] = []
    again: list[Int64] = []


class PathCounters(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the counters of the NICs say of a case.

    Attributes:
        rails: for each rail the bytes expected and counted.
        off: NICs that do not agree, up to 16.
        moved: error and congestion counters that rose; of TCP also ``tcp_lost_sending`` and ``tcp_lost_receiving``.
        repeats: of TCP, where any segment was sent again.
    """

    rails: list[RailCounters] | None = None
    off: list[NicMismatch] | None = None
    moved: list[CounterMove] | None = None
    repeats: Retransmits | None = None


class PathRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which path the data took, and its proof; a key is there only if something says it.

    NCCL says once, when it connects ranks, by what: `links`, `gdr` and `pxn` are of this case and all before it in
    the process. Where ranks differ in a single value, all of their values are listed, as text.

    Attributes:
        proof: ``proven``, ``contradicted`` or ``unverified``.
        reason: why it is not proven.
        counters: what the NICs counted.
        version: of the NCCL that was loaded, as its log says.
        links: by what ranks are connected: ``P2P/CUMEM``, ``NET/IB``, ...
        gdr: whether NICs read GPU memory directly (GPUDirect RDMA).
        channels: NCCL's number of channels.
        nvls: whether NVLink SHARP is used.
        nvls_switched_off: by a setting, not for want of hardware.
        network: NCCL's network: IB, Socket, ...
        pxn: whether NCCL hopped over NVLink to the NIC of another rail (PXN).
        calls: op, algorithm and protocol of NCCL's calls, where its log names them.
        warnings: what NCCL warned of.
        link_layer: what NICs speak, IB or RoCE.
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
    """The state of a GPU at one moment; what NVML does not tell is left out.

    Attributes:
        clock_seconds: the host's monotonic clock when NVML was asked.
        name: its model, where a record has it.
        sm_mhz: clock of the multiprocessors.
        memory_mhz: clock of the memory.
        celsius: temperature.
        watts: power.
        throttled: why its clocks are held back, in words.
        errors: its error counters by name; what is no whole number is not counted.
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
        rank: whose GPU it is; null where a record does not say.
        before: its state before.
        after: its state after.
        warnings: what about it is not as it should be.
    """

    rank: Int64 | None = None
    before: GpuState | None = None
    after: GpuState | None = None
    warnings: list[str] = []


class OriginRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where an imported figure stands in another tool's log.

    Attributes:
        source: which entry of the manifest's `imported`.
        tool: the tool that wrote the log.
        version: of the tool; null where the log does not say.
        file: name of the log.
        line: of the log; null where the log has no lines.
        table: which entry of that source's `tables`.
        row: which row of the table.
        placement: the half of a row of nccl-tests.
        type: the element type in the tool's words.
        figure: ``table``, or ``per_iteration`` for launches that were timed one by one.
        message_bytes: the size in the tool's own terms.
        over_ranks: how the ranks' times became one: ``max``, ``mean``, ...
        per_iteration: statistics over launches that the log has beside.
        timestamp: of the row.
        cells: further cells of the row.
        error: the column of that name.
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
        """Whether it is half a row of a table that nccl-tests itself has printed."""
        return self.tool == "nccl-tests" and self.figure == "table"

    def __post_init__(self) -> None:
        """Refuse a row of nccl-tests without its place: a report could not put it back.

        Raises:
            ValueError: naming what is missing; msgspec adds where.
        """
        missing = [name for name in ("table", "row", "placement") if getattr(self, name) is None]
        if missing and self.is_nccl_tests_row:
            raise ValueError(f"Object missing required field `{missing[0]}`")


class RoutedBytes(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of an expert-parallel schedule by one way of counting.

    Attributes:
        remote_bytes: bytes that leave their rank.
    """

    remote_bytes: float | None = None


class RoutingFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What readers use of a pattern's facts.

    Attributes:
        max_over_mean_received: what the busiest rank receives over the mean.
        bases: bytes by each way of counting.
    """

    max_over_mean_received: float | None = None
    bases: dict[str, RoutedBytes] | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One case of a run.

    `dtype`, `world_size`, `started`, `tolerance`, `warmup` and `launches_per_sample` are null only where `imported` is
    not: a log need not say them.

    Attributes:
        case: unique in a plan: ``pattern/dtype/bytes/timing``, then the parameters that are not defaults.
        pattern: name of the pattern.
        transport: name of the transport.
        timing: the timing regime; of imported cases also ``averaged``, ``blocking``, ``cpu_time``.
        dtype: the element type.
        bytes: S as asked for.
        world_size: number of ranks.
        status: ``ok``, ``wrong``, ``skipped``, ``failed`` or ``timeout``.
        started: when the case began, in UTC.
        schema: 1.
        start: the process start of the run, from 0; the last line of a case in a start counts.
        mode: the plan's mode that the process was started in; null of a plan without modes.
        params: the pattern's parameters that are not defaults.
        reason: why it is not ``ok``; null otherwise.
        wrong: elements that differ, over both checks; null with ``--no-check``.
        wrong_ranks: the ranks that hold them.
        tolerance: 0 where bits were compared.
        notes: what a reader must know.
        warmup: iterations before timing.
        stopped: what ended sampling: ``precision``, ``time`` or ``iterations``.
        launches_per_sample: launches of a pipelined block or of a graph; 1 if each was timed.
        variants: how many schedules the iterations rotate through (iteration i runs variant i mod V); bytes and rates
            are of one rotation, with bottlenecks and medians of the variants added.
        count: a rank's share of S, in elements.
        size_bytes: S as moved: a whole number of elements for each rank.
        redop: the reduction, where the pattern has one.
        root: place of the root in its group, where the pattern has one.
        group_size: ranks of a group.
        time_us: durations of the slowest rank of each iteration.
        skew_us: longest minus shortest rank.
        alg_gb_per_s: S over the median time.
        bus_gb_per_s: `alg_gb_per_s` times the factor of nccl-tests; null where a pattern has no single rate.
        phases: each phase with its label, its bytes, and its time where it was timed by itself.
        groups: where several groups ran side by side, each one's times and rate; never averaged.
        overlap: with ``overlap=true``, how much of the collective was hidden behind computing.
        staged: over MPI with GPU buffers, whether they went through pinned host memory because the library does not
            take device pointers; null otherwise.
        subtotals: durations of several phases added up, by name.
        ratios: medians divided, such as ``skew_penalty``.
        comparable: rates as another program defines them, by name; no bus bandwidth.
        facts: what a pattern says of its schedules, one entry per variant; see the pattern's own page.
        ledger: bytes of one rotation.
        samples: path of the Parquet file with the raw samples, in the run directory.
        setup: `buffers` (``numpy``, ``pool``, ``nccl``, ``torch``), `copies` (sets rotated over), and on GPUs `cache`:
            ``cold`` if L2 cannot hold what is touched next, by rotation or, with `copies` 1, because one set is at
            least 4 times L2; ``warm`` if that was asked for, if no rotation of 64 sets or fewer leaves L2, or if memory
            has no place for one; with ``nccl`` buffers `registered`: whether with their communicators.
        path: which path the data took, and its proof.
        gpus: the state of each rank's GPU before and after; NVLink checksum errors (CRC) are a warning from 100 a
            second of a GPU on, as in NVIDIA's DCGM.
        ranks: the ranks at fault, for ``failed`` and ``timeout``, as far as can be told.
        imported: where another tool's figure comes from; null for what ncclbench has measured.
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
        """Refuse facts that a reader could not use.

        Raises:
            ValueError: naming what is wrong.
        """
        if self.facts:
            msgspec.convert(self.facts, list[RoutingFacts])

    @property
    def routing(self) -> list[RoutingFacts]:
        """What the facts say of routing, one entry per variant."""
        return msgspec.convert(self.facts, list[RoutingFacts])

    @property
    def time_is(self) -> Literal["median", "mean"] | None:
        """What the headline is: a mean where an imported log has one figure for many launches; None without a time."""
        if self.time_us is None:
            return None
        return "mean" if self.imported is not None and self.time_us.n == 1 else "median"
