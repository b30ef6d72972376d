"""The same case over several process starts: of one run, of repetitions, of racks or dates.

A start counts once, however many samples it has: iterating longer does not show what differs from start to start. The
median over starts has the same non-parametric interval as the median over iterations, and therefore none below 6
starts; least and largest are always given.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from ncclbench.analysis.intervals import median_interval
from ncclbench_reports.common.record_rows import RecordRow


@dataclass(frozen=True, kw_only=True)
class AcrossStarts:
    """A case that was timed in two process starts or more, in one run or in several.

    Attributes:
        case: its name.
        transport: of all its starts, as are `device`, `simulated` and `world_size`.
        device: cpu or cuda.
        simulated: whether its times come from a model.
        world_size: ranks.
        runs: in how many runs.
        starts: in how many process starts.
        p50_us: median over starts of the start's median.
        p50_lo_us: lower end of its 95% interval; None below 6 starts.
        p50_hi_us: upper end.
        p50_min_us: the least median.
        p50_max_us: the largest.
        spread: largest over least, minus 1.
        bus_gb_per_s: at the median time; rates are not averaged.
    """

    case: str
    transport: str
    device: str | None
    simulated: bool
    world_size: int | None
    runs: int
    starts: int
    p50_us: float
    p50_lo_us: float | None
    p50_hi_us: float | None
    p50_min_us: float
    p50_max_us: float
    spread: float | None
    bus_gb_per_s: float | None


def across_starts(rows: Iterable[RecordRow]) -> list[AcrossStarts]:
    """One row per case that was timed in two process starts or more."""
    return [_summary(group) for group in _repeated(rows)]


def by_date(rows: Iterable[RecordRow]) -> list[list[RecordRow]]:
    """For each case that was timed in two process starts or more its rows, oldest first."""
    # A row without a date is last.
    return [
        sorted(group, key=lambda row: (row.started is None, row.started or "", row.run, row.start))
        for group in _repeated(rows)
    ]


def _repeated(rows: Iterable[RecordRow]) -> list[list[RecordRow]]:
    groups: dict[tuple[str, str, str | None, bool, int | None], list[RecordRow]] = {}
    for row in rows:
        if row.p50_us is not None:
            key = (row.case, row.transport, row.device, row.simulated, row.world_size)
            groups.setdefault(key, []).append(row)
    return [group for group in groups.values() if len(group) > 1]


def _summary(group: Sequence[RecordRow]) -> AcrossStarts:
    first = group[0]
    times = sorted(row.p50_us for row in group if row.p50_us is not None)
    interval = median_interval(len(times))
    middle = median(times)
    return AcrossStarts(
        case=first.case,
        transport=first.transport,
        device=first.device,
        simulated=first.simulated,
        world_size=first.world_size,
        runs=len({row.run for row in group}),
        starts=len(times),
        p50_us=middle,
        p50_lo_us=times[interval[0]] if interval else None,
        p50_hi_us=times[interval[1]] if interval else None,
        p50_min_us=times[0],
        p50_max_us=times[-1],
        spread=times[-1] / times[0] - 1 if times[0] > 0 else None,
        bus_gb_per_s=_rate_at(group, middle),
    )


def _rate_at(group: Sequence[RecordRow], median_us: float) -> float | None:
    """Bus bandwidth at the median time: the bytes are the same in all runs, so rate times time is."""
    for row in group:
        if row.bus_gb_per_s is not None and row.p50_us is not None and median_us > 0:
            return row.bus_gb_per_s * row.p50_us / median_us
    return None
