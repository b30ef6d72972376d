"""The tables of nccl-tests, from text or JSON, as records.

A row has two halves, out of place and in place; each becomes a case. The half that ncclbench's own pattern does
carries no parameter, so that the two can be compared; the other has ``placement``.

nccl-tests times a block of launches and divides by their number: one sample of the ``pipelined`` regime (``graph``
with -G, ``blocking`` with -z, ``cpu_time`` with -C). With -I it also times every launch with events, which JSON
keeps one by one: these are a case of the ``isolated`` regime, with samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from ncclbench.analysis.summary import MICRO, skew, summarise
from ncclbench.importers.common.imported_cases import ImportedCase, ImportedSamples, case_id, gb_per_s, one_sample
from ncclbench.schedule.builders import IN_PLACE
from ncclbench.schedule.rates import bus_factor
from ncclbench.store.manifest import LoggedDevice
from ncclbench.store.records import Json, OriginRecord, PathRecord, Placement, Record

PLACEMENTS: tuple[Placement, ...] = ("out_of_place", "in_place")
PATTERNS = {"alltoall": "all_to_all", "alltoallv": "all_to_all_v", "sendrecv": "send_recv"}
_DTYPES = {
    **{"half": "float16", "float": "float32", "double": "float64"},
    **{"f8e4m3": "float8_e4m3fn", "f8e5m2": "float8_e5m2"},
}
# The option -a: the reduction of the ranks' times to one figure.
OVER_RANKS = {"0": "rank 0", "1": "mean", "2": "min", "3": "max"}
_UNGATED = (
    "nccl-tests times each launch with events on a stream that nothing holds back: "
    "where the host is slower than the device, its launch cost is inside"
)
_SOCKETS = "NCCL used sockets (NET/Socket) between nodes: this is not the fabric's speed"
_SPLIT = "nccl-tests averages over groups that run side by side: a slow one does not show"


@dataclass(frozen=True, kw_only=True)
class Half:
    """The out-of-place or the in-place half of a row. None is N/A.

    `per_iteration` has the figures that -I adds, in microseconds and percent.
    """

    time_us: float | None
    alg_gb_per_s: float | None
    bus_gb_per_s: float | None
    wrong: int | None
    per_iteration: Mapping[str, float | None] = field(default_factory=dict)
    times_us: Sequence[float] = ()
    process_times_us: Sequence[Sequence[float]] = ()
    extra: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one size. `line` is None if the file has no line per row."""

    line: int | None
    size: int
    count: int
    dtype: str
    redop: str | None
    root: int | None
    halves: Mapping[Placement, Half]
    timestamp: str | None = None


@dataclass(kw_only=True)
class NcclTestsTable:
    """A table and the configuration that the log states for it."""

    number: int
    line: int | None
    program: str | None = None
    config: dict[str, int | str] = field(default_factory=dict)
    devices: list[LoggedDevice] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    cpu_time: bool = False
    over_ranks: str | None = None
    out_of_bounds: int | None = None
    avg_bus_gb_per_s: float | None = None
    concluded: bool = False
    stream: str = ""
    rows: list[Row] = field(default_factory=list)

    @property
    def timing(self) -> str:
        """The regime of the column `time`."""
        if self.cpu_time:
            return "cpu_time"
        if self.config.get("graph"):
            return "graph"
        return "blocking" if self.config.get("blocking") else "pipelined"

    @property
    def launches(self) -> int | None:
        """The number of launches of which one figure is the mean."""
        iterations = self.config.get("iters")
        if not isinstance(iterations, int):
            return None
        each = [self.config.get(name) for name in ("agg iters", "graph")]
        for factor in each:
            iterations *= factor if isinstance(factor, int) and factor > 0 else 1
        return iterations

    @property
    def groups(self) -> list[list[int]]:
        """The ranks of each group, if NCCL_TESTS_SPLIT ran several side by side; else empty."""
        colours: dict[int, list[int]] = {}
        for device in self.devices:
            colours.setdefault(device.group or 0, []).append(device.rank)
        return list(colours.values()) if len(colours) > 1 else []

    def facts(self) -> dict[str, Json]:
        """The fields of a `LoggedTable`."""
        return {
            "line": self.line,
            "program": self.program,
            "config": self.config,
            "devices": self.devices,
            "versions": self.versions,
            "out_of_bounds": self.out_of_bounds,
            "avg_bus_gb_per_s": self.avg_bus_gb_per_s,
            "concluded": self.concluded,
        }


def pattern_of(program: str) -> str:
    """``alltoall_perf`` -> ``all_to_all``; a test without a pattern keeps its own name."""
    name = program.removesuffix("_perf")
    return PATTERNS.get(name, name)


def cases_of_table(
    table: NcclTestsTable,
    pattern: str,
    world_size: int | None,
    origin: OriginRecord,
    path: PathRecord | None = None,
) -> list[ImportedCase]:
    """The cases of a table.

    Args:
        table: the table.
        pattern: the pattern that it measures.
        world_size: None if unknown.
        origin: tool, version and file, for `imported`.
        path: the path of the data that NCCL's own lines in the log state.
    """
    maker = _Maker(table, pattern, world_size, origin, path)
    return [found for place, row in enumerate(table.rows) for found in maker.of_row(place, row)]


class _Maker:
    """Makes the records of one table."""

    def __init__(
        self,
        table: NcclTestsTable,
        pattern: str,
        world_size: int | None,
        origin: OriginRecord,
        path: PathRecord | None,
    ) -> None:
        self.table, self.pattern, self.world_size, self.origin, self.path = table, pattern, world_size, origin, path
        groups = table.groups
        sizes = {len(group) for group in groups}
        self.group_size = (sizes.pop() if len(sizes) == 1 else None) if groups else world_size
        self.split = _split(groups)
        self.notes = [_SPLIT] if groups else []
        if path and "NET/Socket" in path.links:
            self.notes.append(_SOCKETS)

    def of_row(self, place: int, row: Row) -> list[ImportedCase]:
        """The cases of each half: the figure of the table and, with -I, the launches that were timed one by one."""
        found = []
        for placement, half in row.halves.items():
            base = self._base(place, row, placement, half)
            found.append(ImportedCase(record=self._figure(base, half)))
            if half.times_us:
                found.append(self._iterations(base, row, half))
        return found

    def _base(self, place: int, row: Row, placement: Placement, half: Half) -> Record:
        return Record(
            case="",
            pattern=self.pattern,
            params=self._params(row, placement),
            transport="nccl",
            timing=self.table.timing,
            dtype=_DTYPES.get(row.dtype, row.dtype),
            bytes=row.size,
            size_bytes=row.size,
            count=row.count,
            world_size=self.world_size,
            group_size=self.group_size,
            status="wrong" if half.wrong else "ok",
            reason=f"nccl-tests counted {half.wrong} wrong elements" if half.wrong else None,
            wrong=half.wrong,
            tolerance=None,
            redop=row.redop,
            root=row.root,
            warmup=_whole(self.table.config.get("warmup iters")),
            launches_per_sample=self.table.launches,
            started=None,
            notes=self.notes,
            path=self.path,
            imported=self._origin(place, row, placement, half),
        )

    def _params(self, row: Row, placement: Placement) -> dict[str, Json]:
        params: dict[str, Json] = {}
        if placement != ("in_place" if self.pattern in IN_PLACE else "out_of_place"):
            params["placement"] = placement
        if row.redop not in (None, "sum"):
            params["redop"] = row.redop
        if row.root is not None and row.root > 0:
            params["root"] = row.root
        if self.split:
            params["group"] = self.split
        return params

    def _origin(self, place: int, row: Row, placement: Placement, half: Half) -> OriginRecord:
        return msgspec.structs.replace(
            self.origin,
            line=row.line,
            table=self.table.number,
            row=place,
            placement=placement,
            type=row.dtype,
            figure="table",
            over_ranks=self.table.over_ranks,
            per_iteration=dict(half.per_iteration),
            timestamp=row.timestamp or None,
            **half.extra,
        )

    def _figure(self, base: Record, half: Half) -> Record:
        """The record of the column `time`, with the rates as the log has them."""
        if half.time_us is None:
            return _named(base, status="skipped", reason="the log has N/A for its time")
        return _named(
            base,
            time_us=one_sample(half.time_us),
            alg_gb_per_s=half.alg_gb_per_s,
            bus_gb_per_s=half.bus_gb_per_s,
        )

    def _iterations(self, base: Record, row: Row, half: Half) -> ImportedCase:
        """The record of the launches that were timed one by one."""
        seconds_RN, ranks = self._samples(half)
        summary = summarise(np.array(half.times_us) / MICRO)
        rate = gb_per_s(row.size, summary.p50)
        record = _named(
            base,
            timing="isolated",
            launches_per_sample=1,
            time_us=summary,
            skew_us=skew(seconds_RN) if ranks is not None and len(ranks) > 1 else None,
            alg_gb_per_s=rate,
            bus_gb_per_s=_bus(self.pattern, self.group_size, rate),
            notes=[*base.notes, _UNGATED],
            imported=msgspec.structs.replace(base.imported, figure="per_iteration") if base.imported else None,
        )
        return ImportedCase(record=record, samples=ImportedSamples(seconds_RN=seconds_RN, ranks=ranks))

    def _samples(self, half: Half) -> tuple[NDArray[np.float64], Sequence[int] | None]:
        """The times of every rank if each process had one GPU; otherwise only those of the slowest rank."""
        rows = half.process_times_us
        if rows and len(rows) == self.world_size:
            return np.array(rows) / MICRO, range(len(rows))
        return np.array([half.times_us]) / MICRO, range(1) if self.world_size == 1 else None


def _named(record: Record, **changes: object) -> Record:
    changed = msgspec.structs.replace(record, **changes)
    return msgspec.structs.replace(changed, case=case_id(changed))


def _bus(pattern: str, members: int | None, rate: float | None) -> float | None:
    if rate is None or members is None:
        return None
    try:
        return rate * bus_factor(pattern, members)
    except ValueError:
        return None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _split(groups: list[list[int]]) -> str | None:
    """The value of a pattern's parameter `group`: N for blocks of N ranks; otherwise ``split``."""
    if not groups:
        return None
    size = len(groups[0])
    blocks = [list(range(k * size, (k + 1) * size)) for k in range(len(groups))]
    return str(size) if groups == blocks else "split"
