"""Cases that differ in their parameters and not in size: a plot with one row per case, its interval and its limits."""

from collections.abc import Mapping, Sequence

from ncclbench_reports.common.record_rows import RecordRow
from ncclbench_reports.common.text_format import visible
from ncclbench_reports.html_page.case_labels import facets_of_row, short_labels
from ncclbench_reports.html_page.figures import Figure, Plot, Point, error_bars, extent, log_axis, plot_text, rounded
from ncclbench_reports.html_page.rates import LIMITS, UNITS, Limits, points_of, rate_column

_MOST_CASES = 40


def parameter_figures(
    key: str, pattern: str, rows: Sequence[RecordRow], names: Mapping[str, str], limits: Limits
) -> list[Figure]:
    """Rate of the busiest rank or bus bandwidth, and time, of each of `rows`, in their order."""
    shown = list(rows[:_MOST_CASES])
    labels = short_labels([facets_of_row(row, names if len(names) > 1 else {}) for row in shown])
    figures = []
    column, what = rate_column(shown)
    if column is not None:
        figures.append(
            _figure(f"bandwidth-{key}", pattern, what, "gb_per_s", labels, shown, points_of(shown, column), limits)
        )
    figures.append(_figure(f"latency-{key}", pattern, "time", "us", labels, shown, points_of(shown, "p50_us"), limits))
    return figures


def _figure(
    key: str,
    pattern: str,
    what: str,
    unit: str,
    labels: Sequence[str],
    rows: Sequence[RecordRow],
    points: Sequence[Point],
    limits: Limits,
) -> Figure:
    values = [float("nan") if point[0] is None else point[0] for point in points]
    trace: Plot = {
        "type": "scatter",
        "mode": "markers",
        "name": what,
        "x": rounded(values),
        "y": list(range(len(rows))),
        "error_x": error_bars(points, 1.5),
        "marker": {"color": "#0b7abf", "size": 9},
        "text": [
            f"<b>{plot_text(label, 80)}</b><br>{_point_text(point, UNITS[unit])}, n {row.n}"
            for label, point, row in zip(labels, points, rows, strict=True)
        ],
        "hovertemplate": "%{text}<extra></extra>",
    }
    drawn, limit_points = _limits(rows, limits, unit)
    best = max(range(len(rows)), key=lambda k: values[k] if values[k] == values[k] else -1.0)
    layout: Plot = {
        "xaxis": log_axis(f"{what} ({UNITS[unit]})", extent([*points, *limit_points])),
        "yaxis": {
            "tickvals": list(range(len(rows))),
            "ticktext": [plot_text(label) for label in labels],
            "autorange": "reversed",
        },
        "bars": len(rows),
    }
    alt = f"{what} of {len(rows)} cases of {pattern}; the most is {values[best]:.4g} {UNITS[unit]}, {labels[best]}."
    caption = "One row per case, named by what distinguishes it; bars are 95% intervals, where there are any."
    return Figure(
        id=key, title=f"{pattern}: {what}", alt=visible(alt), caption=caption, data=[trace, *drawn], layout=layout
    )


def _point_text(point: Point, unit: str) -> str:
    value, low, high = point
    if value is None:
        return "not known"
    return f"{value:.4g} {unit}" + (f" ({low:.4g} to {high:.4g})" if low is not None and high is not None else "")


def _limits(rows: Sequence[RecordRow], limits: Limits, unit: str) -> tuple[list[Plot], list[Point]]:
    """Traces of the floors and bounds, and the values in them."""
    found: list[Plot] = []
    points: list[Point] = []
    for limit in LIMITS:
        known = [
            (k, limits[row.case][f"{limit.key}_{unit}"])
            for k, row in enumerate(rows)
            if f"{limit.key}_{unit}" in limits.get(row.case, {})
        ]
        if known:
            points += [(value, None, None) for _, value in known]
            found.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": limit.name,
                    "x": rounded([value for _, value in known]),
                    "y": [k for k, _ in known],
                    "marker": {"symbol": "line-ns-open", "size": 16, "color": limit.colour, "line": {"width": 3}},
                    "hovertemplate": f"{limit.key} %{{x:.4g}} {UNITS[unit]}<extra></extra>",
                }
            )
    return found, points
