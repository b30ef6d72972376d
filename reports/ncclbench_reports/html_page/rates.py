"""What plots of rates and times share: points with their intervals, and the limits that are drawn beside them."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ncclbench.store.records import LedgerRecord, Record
from ncclbench.store.verdict import RunVerdict
from ncclbench_reports.common.record_rows import RecordRow
from ncclbench_reports.html_page.figures import Point
from ncclbench_reports.html_page.phase_figures import alternatives

UNITS = {"gb_per_s": "GB/s", "us": "us"}
# Case -> the key of a limit and its unit, such as ``floor_us`` -> value.
Limits = Mapping[str, Mapping[str, float]]
# Which floors of a profile are drawn, and in which plot.
_FLOOR_UNITS = {"bus_gb_per_s": "gb_per_s", "bottleneck_gb_per_s": "gb_per_s", "p50_us": "us"}


@dataclass(frozen=True)
class LimitStyle:
    """How a kind of limit is drawn."""

    key: str
    name: str
    colour: str
    dash: str


LIMITS = (LimitStyle("floor", "the profile's floor", "#d1483f", "dash"), LimitStyle("bound", "bound", "#7b8494", "dot"))


def limits_of(runs: Iterable[Iterable[Record]], verdicts: Iterable[RunVerdict | None]) -> Limits:
    """All floors and bounds, by case."""
    limits: dict[str, dict[str, float]] = {}
    for found in (*(bounds_of(records) for records in runs), _floors(verdicts)):
        for case, known in found.items():
            limits.setdefault(case, {}).update(known)
    return limits


def _floors(verdicts: Iterable[RunVerdict | None]) -> dict[str, dict[str, float]]:
    """The profile's floors, as the evidence of the check ``floor`` states them."""
    found: dict[str, dict[str, float]] = {}
    for verdict in verdicts:
        for check in verdict.checks if verdict else []:
            for evidence in check.evidence if check.check == "floor" else []:
                limit, unit = evidence.get("limit"), _FLOOR_UNITS.get(str(evidence.get("metric")))
                if unit and isinstance(limit, int | float) and math.isfinite(limit) and limit > 0:
                    found.setdefault(check.subject, {})[f"floor_{unit}"] = float(limit)
    return found


def bounds_of(records: Iterable[Record]) -> dict[str, dict[str, float]]:
    """What the wires of a topology file allow: for each case whose phases all have a bound, its time and its rate."""
    found = {}
    for record in records:
        bounds = [phase.bound_us for phase in record.phases]
        if bounds and all(bound is not None for bound in bounds) and record.time_us:
            known = [bound for bound in bounds if bound is not None]
            rotates = alternatives(record)
            bound_us = statistics.median(known) if rotates else sum(known)
            # The rate of a rotation is that of all its variants, and so is its bound.
            times = [phase.time_us.p50 for phase in record.phases if phase.time_us]
            share = sum(times) / sum(known) if rotates and bound_us > 0 else record.time_us.p50 / (bound_us or 1.0)
            rate = record.bus_gb_per_s or (record.ledger or LedgerRecord()).bottleneck_gb_per_s
            if bound_us > 0:
                found[record.case] = {"bound_us": bound_us}
                if rate:
                    found[record.case]["bound_gb_per_s"] = rate * share
    return found


def rate_column(rows: Sequence[RecordRow]) -> tuple[str | None, str]:
    """Which rate is drawn of `rows`, if they have any, and its name."""
    for column, name in (("bus_gb_per_s", "bus bandwidth"), ("bottleneck_gb_per_s", "bandwidth of the busiest rank")):
        if any(row.figure(column) for row in rows):
            return column, name
    return None, ""


def points_of(rows: Sequence[RecordRow], column: str) -> list[Point]:
    """The median times with their intervals, or a rate with the interval of its time."""
    if column == "p50_us":
        return [(row.p50_us, row.p50_lo_us, row.p50_hi_us) for row in rows]
    return [_rate_point(row, column) for row in rows]


def _rate_point(row: RecordRow, column: str) -> Point:
    """A rate with its interval: the longest time is the lowest rate."""
    rate = row.figure(column)
    if not rate or row.p50_us is None:
        return None, None, None
    moved = rate * row.p50_us
    return rate, moved / row.p50_hi_us if row.p50_hi_us else None, moved / row.p50_lo_us if row.p50_lo_us else None
