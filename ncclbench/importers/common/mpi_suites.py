"""The rows that OSU's and Intel's MPI benchmarks share: a size, times over the ranks, and S if it is known.

Both count a *message*: the data of one rank, or the data that it sends to each other rank. S of ncclbench is the whole
buffer: the message times the number of ranks for the ops that shard it. Without the number of ranks, S is unknown.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from ncclbench.importers.common.imported_cases import ImportedCase, case_id, gb_per_s, one_sample
from ncclbench.schedule.rates import bus_factor
from ncclbench.store.records import Json, OriginRecord, Overlap, Record, Skew

# One rank's message is 1/n of S.
SHARED_BY_MESSAGE = frozenset({"all_gather", "all_to_all", "gather", "scatter"})
_DTYPES = {
    "MPI_FLOAT": "float32",
    "MPI_DOUBLE": "float64",
    "MPI_INT": "int32",
    "MPI_CHAR": "int8",
    "MPI_BYTE": "uint8",
}
_ITEMSIZE = {"float32": 4, "float64": 8, "int32": 4, "int8": 1, "uint8": 1}
# These benchmarks use two ranks, whatever the size of the job.
PAIRS = frozenset({"ping_pong", "ping_ping", "bandwidth", "bidirectional_bandwidth"})


@dataclass(frozen=True, kw_only=True)
class MpiRow:
    """A row of either suite.

    Attributes:
        members: the number of ranks in each of the `groups`; None if unknown.
        time_us: the headline: of the slowest rank where the log has it, of the mean rank otherwise; None if the
            table has only rates.
        over_ranks: which of the two: ``max`` or ``mean``.
        spread_us: slowest minus fastest rank; None if the log does not have it.
        launches: the number of repetitions of which the time is the mean.
        rate_gb_per_s: set if the log has a rate and no time.
        failed: the message of its validation, if data were wrong.
        unable: the reason why there are no figures.
        overlap: of a non-blocking collective.
        cells: every column, as in the log.
    """

    line: int
    pattern: str
    timing: str
    message: int
    dtype: str | None
    members: int | None
    time_us: float | None
    over_ranks: str | None
    spread_us: float | None = None
    launches: int | None = None
    rate_gb_per_s: float | None = None
    failed: str | None = None
    unable: str | None = None
    overlap: Overlap | None = None
    redop: str | None = None
    groups: int = 1
    params: Mapping[str, Json] = field(default_factory=dict)
    cells: Mapping[str, Json] = field(default_factory=dict)


def dtype_of(mpi: str | None) -> str | None:
    """The dtype of an MPI type; an unknown type keeps its own name."""
    return _DTYPES.get(mpi, mpi) if mpi else None


def case_of_row(row: MpiRow, table: int, place: int, transport: str, origin: OriginRecord) -> ImportedCase:
    """The case of a row."""
    nbytes = _whole_buffer(row)
    itemsize = _ITEMSIZE.get(row.dtype or "", 0)
    # Without data there is no rate: zero would look like a very slow network.
    rate = gb_per_s(nbytes or None, row.time_us) if row.rate_gb_per_s is None else row.rate_gb_per_s
    record = Record(
        case="",
        pattern=row.pattern,
        params=dict(row.params),
        transport=transport,
        timing=row.timing,
        dtype=row.dtype,
        bytes=row.message if nbytes is None else nbytes,
        size_bytes=nbytes,
        count=row.message // itemsize if itemsize and row.pattern != "reduce_scatter" else None,
        world_size=row.members * row.groups if row.members else None,
        group_size=row.members,
        redop=row.redop,
        status="wrong" if row.failed else "skipped" if row.unable else "ok",
        reason=row.failed or row.unable,
        overlap=row.overlap,
        tolerance=None,
        warmup=None,
        launches_per_sample=row.launches,
        started=None,
        time_us=one_sample(row.time_us) if row.time_us is not None else None,
        skew_us=Skew(p50=row.spread_us, max=row.spread_us) if row.spread_us is not None else None,
        alg_gb_per_s=rate,
        bus_gb_per_s=_bus(row, rate),
        notes=[] if nbytes is not None else [_NO_RANKS],
        imported=msgspec.structs.replace(
            origin,
            line=row.line,
            table=table,
            row=place,
            message_bytes=row.message,
            over_ranks=row.over_ranks,
            cells=dict(row.cells),
        ),
    )
    return ImportedCase(record=msgspec.structs.replace(record, case=case_id(record)))


_NO_RANKS = "the log does not say how many ranks there were: bytes are one rank's message; import with --world-size N"


def _whole_buffer(row: MpiRow) -> int | None:
    if row.pattern not in SHARED_BY_MESSAGE:
        return row.message
    return row.message * row.members if row.members is not None else None


def _bus(row: MpiRow, rate: float | None) -> float | None:
    if rate is None:
        return None
    try:
        # A factor that does not depend on the number of ranks is known without it.
        factors = {bus_factor(row.pattern, n) for n in ([row.members] if row.members else [2, 3])}
    except ValueError:
        return None
    return rate * factors.pop() if len(factors) == 1 else None
