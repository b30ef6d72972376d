"""Bandwidth and latency against size, for each pattern with its parameters, and how times changed from run to run."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ncclbench_reports.common.record_rows import RecordRow, params_of
from ncclbench_reports.common.text_format import visible
from ncclbench_reports.html_page.case_labels import Facets, short_labels
from ncclbench_reports.html_page.figures import (
    Figure,
    Plot,
    Point,
    error_bars,
    extent,
    log_axis,
    plot_text,
    rounded,
    size_axis,
    style,
)
from ncclbench_reports.html_page.parameter_plots import parameter_figures
from ncclbench_reports.html_page.rates import LIMITS, UNITS, Limits, points_of, rate_column

# Two plots per pattern; the tables have all patterns.
MOST_PATTERNS = 24
_MOST_TRENDS = 8
# Up to so many sets of parameters of a pattern share a plot.
_MOST_PARAMS = 4


@dataclass(frozen=True, kw_only=True)
class _SeveralStarts(RecordRow):
    """A case over several process starts: the median of their medians, and the least and the largest as interval."""

    starts: int


def curve_figures(rows: Sequence[RecordRow], names: Mapping[str, str], limits: Limits) -> list[Figure]:
    """Two figures for each pattern and parameters: bandwidth and time, against size or, if there is one, by case."""
    figures = []
    timed = [row for row in rows if row.p50_us is not None and row.p50_us > 0]
    groups = curve_groups(_over_starts(timed))
    for index, (title, members) in enumerate(list(groups.items())[:MOST_PATTERNS]):
        if _is_one_size(members):
            figures += parameter_figures(str(index), title, members, names, limits)
            continue
        column, what = rate_column(members)
        if column is not None:
            figures.append(_bandwidth(f"bandwidth-{index}", f"{title}: {what}", column, members, names, limits))
        figures.append(_latency(f"latency-{index}", title, members, names, limits))
    return figures


def curve_groups(rows: Sequence[RecordRow]) -> dict[str, list[RecordRow]]:
    """The rows of each plot, by its title: a pattern, with its parameters where those are many."""
    patterns: dict[str, list[RecordRow]] = {}
    for row in rows:
        patterns.setdefault(row.pattern, []).append(row)
    groups: dict[str, list[RecordRow]] = {}
    for pattern, members in patterns.items():
        sets = {row.params: params_of(row) for row in members}
        if len(sets) <= _MOST_PARAMS or _is_one_size(members):
            groups[pattern] = members
            continue
        labels = short_labels([Facets(params, {}) for params in sets.values()])
        for text, label in zip(sets, labels, strict=True):
            stated = " ".join(part for part in label.split() if not part.endswith("=default"))
            title = visible(f"{pattern} {stated}".strip(), 120)
            groups.setdefault(title, []).extend(row for row in members if row.params == text)
    return groups


def _is_one_size(rows: Sequence[RecordRow]) -> bool:
    """Whether there are many cases, and no two that differ in their size alone: there is no curve to draw."""
    sizes: dict[tuple[object, ...], set[int]] = {}
    for row in rows:
        key = (row.run, row.params, row.timing, row.dtype, row.redop, row.world_size)
        sizes.setdefault(key, set()).add(_size(row))
    return len(rows) > _MOST_PARAMS and all(len(found) == 1 for found in sizes.values())


def _over_starts(rows: Sequence[RecordRow]) -> list[RecordRow]:
    """One row per case and run."""
    found: dict[tuple[str, str], list[RecordRow]] = {}
    for row in rows:
        found.setdefault((row.run, row.case), []).append(row)
    return [_merged(starts) if len(starts) > 1 else starts[0] for starts in found.values()]


def _merged(starts: Sequence[RecordRow]) -> RecordRow:
    first = starts[0]
    times = sorted(row.p50_us for row in starts if row.p50_us is not None)
    middle = statistics.median(times)
    share = (first.p50_us or middle) / middle
    merged = replace(
        first,
        p50_us=middle,
        p50_lo_us=times[0],
        p50_hi_us=times[-1],
        bus_gb_per_s=first.bus_gb_per_s * share if first.bus_gb_per_s else None,
        bottleneck_gb_per_s=first.bottleneck_gb_per_s * share if first.bottleneck_gb_per_s else None,
    )
    return _SeveralStarts(**vars(merged), starts=len(starts))


def _series(rows: Sequence[RecordRow], names: Mapping[str, str]) -> dict[str, list[RecordRow]]:
    """The rows of each curve, by its name: the timing regime, and what else differs."""
    keys = [key for key in ("params", "dtype", "redop", "world_size") if len({row.value(key) for row in rows}) > 1]
    found: dict[str, list[RecordRow]] = {}
    for row in sorted(rows, key=_size):
        shown = {key: str(row.value(key) or "") for key in keys} | (
            {"params": _params(row)} if "params" in keys else {}
        )
        parts = [row.timing, *(text for text in shown.values() if text)]
        parts += [names[row.run]] if len(names) > 1 else []
        found.setdefault(" · ".join(parts), []).append(row)
    return found


def _params(row: RecordRow) -> str:
    return visible(" ".join(f"{name}={value}" for name, value in params_of(row).items()), 80)


def _curves(
    rows: Sequence[RecordRow], column: str, unit: str, names: Mapping[str, str], limits: Limits
) -> tuple[list[Plot], list[float]]:
    """The traces of a plot, and all values in it."""
    shown = [row for row in rows if row.figure(column)]
    # The same style in the plot of rates, which may lack some curves, as in that of times.
    styles = {name: index for index, name in enumerate(sorted(_series(rows, names)))}
    traces: list[Plot] = []
    values: list[float] = []
    for name, members in _series(shown, names).items():
        points = points_of(members, column)
        traces.append(_curve(name, members, points, UNITS[unit], styles[name]))
        values += extent(points)
    for trace, limit_values in _limit_curves(shown, limits, unit):
        traces.append(trace)
        values += limit_values
    return traces, values


def _bandwidth(
    key: str, title: str, column: str, rows: Sequence[RecordRow], names: Mapping[str, str], limits: Limits
) -> Figure:
    data, values = _curves(rows, column, "gb_per_s", names, limits)
    shown = [row for row in rows if row.figure(column)]
    best = max(shown, key=lambda row: row.figure(column) or 0.0)
    pattern, _, what = title.rpartition(": ")
    alt = (
        f"{what} of {pattern} against size on logarithmic axes, {len(_series(shown, names))} curves; "
        f"the highest is {best.figure(column):.4g} GB/s at {_size(best)} bytes."
    )
    layout: Plot = {"xaxis": size_axis(_size(row) for row in rows), "yaxis": log_axis(f"{what} (GB/s)", values)}
    return Figure(id=key, title=title, alt=visible(alt), caption="", data=data, layout=layout)


def _latency(key: str, title: str, rows: Sequence[RecordRow], names: Mapping[str, str], limits: Limits) -> Figure:
    data, values = _curves(rows, "p50_us", "us", names, limits)
    least = min(rows, key=lambda row: row.p50_us or 0.0)
    alt = (
        f"time of {title} against size on logarithmic axes, {len(_series(rows, names))} curves; "
        f"the shortest is {least.p50_us:.4g} microseconds at {_size(least)} bytes."
    )
    layout: Plot = {"xaxis": size_axis(_size(row) for row in rows), "yaxis": log_axis("time (us)", values)}
    return Figure(id=key, title=f"{title}: time", alt=visible(alt), caption="", data=data, layout=layout)


def _size(row: RecordRow) -> int:
    return row.size_bytes or row.bytes


def _curve(name: str, rows: Sequence[RecordRow], points: Sequence[Point], unit: str, index: int) -> Plot:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plot_text(name),
        "x": [_size(row) for row in rows],
        "y": rounded([value or 0.0 for value, _, _ in points]),
        "error_y": error_bars(points),
        "text": [
            f"<b>{plot_text(name)}</b><br>{_size(row)} B: {value:.4g} {unit}<br>{_ends(point)}{_basis(row)}"
            for row, point in zip(rows, points, strict=True)
            if (value := point[0]) is not None
        ],
        "hovertemplate": "%{text}<extra></extra>",
        **style(index),
    }


def _ends(point: Point) -> str:
    value, low, high = point
    if (low is None or low == value) and (high is None or high == value):
        return ""
    return f"{value if low is None else low:.4g} to {value if high is None else high:.4g}, "


def _basis(row: RecordRow) -> str:
    if row.time_is == "mean":
        return "a mean over launches"
    return f"over {row.starts} starts" if isinstance(row, _SeveralStarts) else f"n {row.n}"


def _limit_curves(rows: Sequence[RecordRow], limits: Limits, unit: str) -> list[tuple[Plot, list[float]]]:
    """The profile's floor and the bound, where they are known, with their values."""
    found: list[tuple[Plot, list[float]]] = []
    for limit in LIMITS:
        key = f"{limit.key}_{unit}"
        points = sorted({(_size(row), limits[row.case][key]) for row in rows if key in limits.get(row.case, {})})
        values = [y for _, y in points]
        if points:
            trace: Plot = {
                "type": "scatter",
                "mode": "lines+markers",
                "name": limit.name,
                "x": [x for x, _ in points],
                "y": rounded(values),
                "line": {"color": limit.colour, "dash": limit.dash, "width": 2},
                "marker": {"symbol": "line-ew-open", "size": 12, "color": limit.colour},
                "hovertemplate": f"{limit.key} %{{y:.4g}} {UNITS[unit]}<extra></extra>",
            }
            found.append((trace, extent([(value, None, None) for value in values])))
    return found


def trend_figures(groups: Sequence[Sequence[RecordRow]], names: Mapping[str, str]) -> list[Figure]:
    """Time of each case from run to run; `groups` are those of `by_date`. The cases that changed most are drawn."""
    merged: dict[tuple[str, str, int | None], list[RecordRow]] = {}
    for group in groups:
        merged.setdefault((group[0].case, group[0].transport, group[0].world_size), []).extend(group)
    changed = sorted(merged.values(), key=lambda rows: -_spread(rows))[:_MOST_TRENDS]
    if not changed:
        return []
    one = "run" if len(names) > 1 else "start"
    layout: Plot = {
        "xaxis": {"title": {"text": "when the case began (UTC)"}, "type": "date"},
        "yaxis": {"title": {"text": f"time / first {one}'s"}},
    }
    alt = (
        f"median time of {len(changed)} cases over the {one}s, as a share of the first {one}'s; "
        f"{changed[0][0].case} changed most, by {100 * _spread(changed[0]):.3g}%."
    )
    caption = (
        f"The {len(changed)} of {len(merged)} cases that changed most. 1 is the first {one}'s median; above is slower."
    )
    return [
        Figure(
            id="trend",
            title=f"Trend over {'runs' if len(names) > 1 else 'process starts'}",
            alt=visible(alt),
            caption=caption,
            data=[_trend(rows, names, index) for index, rows in enumerate(changed)],
            layout=layout,
        )
    ]


def _trend(rows: Sequence[RecordRow], names: Mapping[str, str], index: int) -> Plot:
    times = _times(rows)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plot_text(rows[0].case),
        "x": [row.started for row in rows],
        "y": rounded([time / times[0] for time in times]),
        "text": [
            f"<b>{plot_text(row.case)}</b><br>{plot_text(names[row.run])}, start {row.start}, "
            f"{plot_text(row.transport)}, {row.world_size} ranks<br>"
            f"{plot_text(row.started)}: {time:.4g} us"
            for row, time in zip(rows, times, strict=True)
        ],
        "hovertemplate": "%{text}<extra></extra>",
        **style(index),
    }


def _times(rows: Sequence[RecordRow]) -> list[float]:
    return [row.p50_us for row in rows if row.p50_us is not None]


def _spread(rows: Sequence[RecordRow]) -> float:
    times = [time for time in _times(rows) if time > 0]
    return max(times) / min(times) - 1 if times else 0.0
