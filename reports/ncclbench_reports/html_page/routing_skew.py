"""Skewed routing: how much slower than equal splits, against how much more than the mean the busiest rank receives."""

from collections.abc import Sequence

import msgspec
import numpy as np

from ncclbench.store.records import Record, Summary
from ncclbench.store.run_directory import Run
from ncclbench_reports.common.text_format import visible
from ncclbench_reports.html_page.case_labels import facets_of_record, short_labels
from ncclbench_reports.html_page.figures import Figure, Plot, plot_text, rounded, style

_MOST_SERIES = 8
_MOST_BARS = 16
# The parameters of a routing, which differ along a curve.
_ROUTING = ("routing", "uneven")
# Variants whose all-to-alls carry the splits of the routing.
_OWN_SPLITS = ("flat", "cached")

Point = tuple[float, float, float, float, str]
"""Skew, slowdown, its interval, and the name of the routing."""


def skew_of(record: Record) -> float | None:
    """Bytes of the busiest receiver over the mean's: the median over the routings of a case."""
    found = [facts.max_over_mean_received for facts in record.routing]
    known = [value for value in found if value is not None and value > 0]
    return float(np.median(known)) if known else None


def skew_figures(run: Run, prefix: str) -> list[Figure]:
    """The slowdown against the skew, and every control beside its equal splits; nothing where no routing was drawn."""
    records = [record for record in run.records if record.status == "ok" and skew_of(record) is not None]
    figures = []
    series = {name: points for name, points in _series(records).items() if len({point[0] for point in points}) > 1}
    if series:
        figures.append(_curve(f"{prefix}moe-skew", dict(list(series.items())[:_MOST_SERIES])))
    controls = [record for record in records if "skew_penalty" in record.ratios and _control(record)]
    if controls:
        figures.append(_penalties(f"{prefix}moe-penalty", controls[:_MOST_BARS]))
    return figures


def _control(record: Record) -> tuple[Summary, Summary] | None:
    """The all-to-alls of the payload as routed, and the same bytes in equal splits."""
    routed, equal = (record.subtotals.get(name) for name in ("comm_only", "control_comm_only"))
    return (routed.time_us, equal.time_us) if routed and equal and equal.time_us.p50 > 0 else None


def _series(records: Sequence[Record]) -> dict[str, list[Point]]:
    """Points of each curve, by its name: only the routing differs along it."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        fixed = {key: value for key, value in record.params.items() if key not in _ROUTING}
        groups.setdefault(f"{record.pattern} {record.timing} {sorted(fixed.items())}", []).append(record)
    labels = short_labels([facets_of_record(_without_routing(members[0])) for members in groups.values()])
    found: dict[str, list[Point]] = {}
    for label, members in zip(labels, groups.values(), strict=True):
        points = _against_control(members) or _against_least_skewed(members)
        found[label or str(members[0].params.get("variant", "flat"))] = sorted(points)
    return found


def _without_routing(record: Record) -> Record:
    params = {key: value for key, value in record.params.items() if key not in _ROUTING}
    return msgspec.structs.replace(record, params=params)


def _against_control(records: Sequence[Record]) -> list[Point]:
    """The skew penalty; its interval combines the far ends of those of both times."""
    found = []
    for record in records:
        times, skew = _control(record), skew_of(record)
        if times is None or skew is None:
            continue
        routed, equal = times
        low = (routed.p50_lo or routed.p50) / (equal.p50_hi or equal.p50)
        high = (routed.p50_hi or routed.p50) / (equal.p50_lo or equal.p50)
        found.append((skew, routed.p50 / equal.p50, low, high, _routing(record)))
    return found


def _against_least_skewed(records: Sequence[Record]) -> list[Point]:
    """Time per byte of the payload's all-to-alls, over that of the least skewed routing measured."""
    found: list[Point] = []
    for record in records:
        total, skew, payload = record.subtotals.get("comm_only"), skew_of(record), _payload(record)
        if total is None or skew is None or not payload or record.params.get("variant", "flat") not in _OWN_SPLITS:
            continue
        time_us = total.time_us
        ends = (time_us.p50, time_us.p50_lo or time_us.p50, time_us.p50_hi or time_us.p50)
        middle, low, high = (end / payload for end in ends)
        found.append((skew, middle, low, high, _routing(record)))
    if not found or min(found)[1] <= 0:
        return []
    least = min(found)[1]
    return [(skew, middle / least, low / least, high / least, name) for skew, middle, low, high, name in found]


def _payload(record: Record) -> float | None:
    """Remote bytes of a dispatch, the mean over the routings of a case."""
    basis = "selection" if record.params.get("dedup") == "selection" else "rank_dedup"
    counts = [(facts.bases or {}).get(basis) for facts in record.routing]
    known = [count.remote_bytes for count in counts if count is not None and count.remote_bytes is not None]
    return float(np.mean(known)) if known else None


def _routing(record: Record) -> str:
    stated = [f"{key} {record.params[key]}" for key in _ROUTING if key in record.params]
    return ", ".join(stated) or "routing uniform"


def _curve(key: str, series: dict[str, list[Point]]) -> Figure:
    data: list[Plot] = []
    for index, (name, points) in enumerate(series.items()):
        skew, slower, low, high, routings = zip(*points, strict=True)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plot_text(name),
                "x": rounded(skew),
                "y": rounded(slower),
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": rounded(np.subtract(high, slower)),
                    "arrayminus": rounded(np.subtract(slower, low)),
                    "thickness": 1,
                },
                "text": [
                    f"<b>{plot_text(routing)}</b>, {plot_text(name)}<br>max/mean {x:.3g}: {y:.3g} times as long"
                    for x, y, routing in zip(skew, slower, routings, strict=True)
                ],
                "hovertemplate": "%{text}<extra></extra>",
                **style(index),
            }
        )
    most = max(point[0] for points in series.values() for point in points)
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "in proportion",
            "x": [1, round(most, 4)],
            "y": [1, round(most, 4)],
            "line": {"color": "#7b8494", "dash": "dot", "width": 2},
            "hoverinfo": "skip",
        }
    )
    slowest = max((point[1], point[0], point[4]) for points in series.values() for point in points)
    alt = (
        f"slowdown against skew of the received bytes, {len(series)} curves; the largest slowdown is {slowest[0]:.3g} "
        f"at max/mean {slowest[1]:.3g}, {slowest[2]}."
    )
    caption = (
        "Both all-to-alls of the payload. Control: over the same bytes in equal splits, measured alternately. Other "
        "variants: time per byte, over that of the least skewed routing. If the busiest receiver is the bottleneck, "
        "the curve follows the dotted line."
    )
    layout: Plot = {
        "xaxis": {"title": {"text": "bytes of the busiest receiver / mean"}},
        "yaxis": {"title": {"text": "slowdown"}},
    }
    return Figure(id=key, title="Slowdown under skew", alt=visible(alt), caption=caption, data=data, layout=layout)


def _penalties(key: str, records: Sequence[Record]) -> Figure:
    labels = [plot_text(label, 40) for label in short_labels([facets_of_record(record) for record in records])]
    labels = [label or plot_text(_routing(record), 40) for label, record in zip(labels, records, strict=True)]
    data: list[Plot] = []
    for side, (name, colour) in enumerate((("as routed", "#d55e00"), ("equal splits", "#0b7abf"))):
        times = [times[side] for record in records if (times := _control(record))]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "y": list(range(len(labels))),
                "x": rounded([time.p50 for time in times]),
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": rounded([(time.p50_hi or time.p50) - time.p50 for time in times]),
                    "arrayminus": rounded([time.p50 - (time.p50_lo or time.p50) for time in times]),
                    "thickness": 1,
                },
                "text": [
                    f"{label}: {name}<br>skew penalty {record.ratios['skew_penalty']:.3g}"
                    for label, record in zip(labels, records, strict=True)
                ],
                "textposition": "none",
                "hovertemplate": "%{text}<br>%{x:.4g} us<extra></extra>",
                "marker": {"color": colour, "pattern": {"shape": ("", "/")[side]}},
            }
        )
    ticks = [f"{label} ({record.ratios['skew_penalty']:.2f})" for label, record in zip(labels, records, strict=True)]
    worst = max(records, key=lambda record: record.ratios["skew_penalty"])
    alt = (
        f"time of skewed all-to-alls beside equal splits of the same bytes for {len(records)} cases; the largest "
        f"penalty is {worst.ratios['skew_penalty']:.3g} in {worst.case}."
    )
    layout = {
        "barmode": "group",
        "legend": {"traceorder": "normal"},
        "xaxis": {"title": {"text": "dispatch and combine (us)"}, "rangemode": "tozero"},
        "yaxis": {"tickvals": list(range(len(labels))), "ticktext": ticks, "autorange": "reversed"},
        "bars": 2 * len(labels),
    }
    caption = "In brackets the skew penalty: the first over the second. Bars are medians with their 95% intervals."
    return Figure(id=key, title="Skew penalty", alt=visible(alt), caption=caption, data=data, layout=layout)
