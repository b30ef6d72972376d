"""Cases that differ in their parameters and not in size: one row a case, with its interval and the profile's floor."""

from collections.abc import Mapping, Sequence
from typing import Any

from ncclbench_reports.common.wording import visible
from ncclbench_reports.html_page.case_labels import facets_of_row, short_labels
from ncclbench_reports.html_page.figures import Figure, extent, log_axis, plot_text, rounded

_MOST_CASES = 40

Row = dict[str, Any]


def dot_figures(
    key: str, pattern: str, rows: Sequence[Row], names: Mapping[str, str], limits: Mapping[str, Mapping[str, float]]
) -> list[Figure]:
    """Rate of the busiest rank or bus bandwidth, and time, of each of `rows`, in their order."""
    shown = list(rows[:_MOST_CASES])
    labels = short_labels([facets_of_row(row, names if len(names) > 1 else {}) for row in shown])
    figures = []
    column = next((name for name in ("bus_gb_per_s", "bottleneck_gb_per_s") if any(row[name] for row in shown)), None)
    if column is not None:
        what = "bus bandwidth" if column == "bus_gb_per_s" else "bandwidth of the busiest rank"
        points = [_rate(row, column) for row in shown]
        figures.append(_figure(f"bandwidth-{key}", pattern, what, "gb_per_s", labels, shown, points, limits))
    points = [(row["p50_us"], row["p50_lo_us"], row["p50_hi_us"]) for row in shown]
    figures.append(_figure(f"latency-{key}", pattern, "time", "us", labels, shown, points, limits))
    return figures


Point = tuple[float | None, float | None, float | None]
_UNITS = {"gb_per_s": "GB/s", "us": "us"}


def _rate(row: Row, column: str) -> Point:
    """A rate and its interval, which is the time's turned over."""
    rate = row[column]
    if not rate:
        return None, None, None
    low, high = (rate * row["p50_us"] / row[end] if row[end] else None for end in ("p50_hi_us", "p50_lo_us"))
    return rate, low, high


def _figure(
    key: str,
    pattern: str,
    what: str,
    unit: str,
    labels: Sequence[str],
    rows: Sequence[Row],
    points: Sequence[Point],
    limits: Mapping[str, Mapping[str, float]],
) -> Figure:
    unknown = float("nan")
    values = [unknown if point[0] is None else point[0] for point in points]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": what,
            "x": rounded(values),
            "y": list(range(len(rows))),
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": rounded([(p[2] or v) - v for p, v in zip(points, values, strict=True)]),
                "arrayminus": rounded([v - (p[1] or v) for p, v in zip(points, values, strict=True)]),
                "thickness": 1.5,
            },
            "marker": {"color": "#0b7abf", "size": 9},
            "text": [
                f"<b>{plot_text(label, 80)}</b><br>{_said(point, _UNITS[unit])}, n {row['n']}"
                for label, point, row in zip(labels, points, rows, strict=True)
            ],
            "hovertemplate": "%{text}<extra></extra>",
        }
    ]
    data += _limits(rows, limits, unit)
    best = max(range(len(rows)), key=lambda k: values[k] if values[k] == values[k] else -1.0)
    title = f"{what} ({_UNITS[unit]})"
    layout = {
        "xaxis": log_axis(title, extent(data, "x")),
        "yaxis": {
            "tickvals": list(range(len(rows))),
            "ticktext": [plot_text(label) for label in labels],
            "autorange": "reversed",
        },
        "bars": len(rows),
    }
    return Figure(
        id=key,
        title=f"{pattern}: {what}",
        alt=visible(f"{what} of {len(rows)} cases of {pattern}; the most is {values[best]:.4g} {_UNITS[unit]}, "
                    f"{labels[best]}."),
        caption="One row a case, named by what tells it from the others; bars are 95% intervals, where there are any.",
        data=data,
        layout=layout,
    )  # fmt: skip


def _said(point: Point, unit: str) -> str:
    value, low, high = point
    if value is None:
        return "not known"
    return f"{value:.4g} {unit}" + (f" ({low:.4g} to {high:.4g})" if low is not None and high is not None else "")


def _limits(rows: Sequence[Row], limits: Mapping[str, Mapping[str, float]], unit: str) -> list[dict[str, Any]]:
    found = []
    for word, colour in (("floor", "#d1483f"), ("bound", "#7b8494")):
        known = [(k, limits[row["case"]][f"{word}_{unit}"]) for k, row in enumerate(rows)
                 if f"{word}_{unit}" in limits.get(row["case"], {})]  # fmt: skip
        if known:
            found.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": "the profile's floor" if word == "floor" else "bound",
                    "x": rounded([value for _, value in known]),
                    "y": [k for k, _ in known],
                    "marker": {"symbol": "line-ns-open", "size": 16, "color": colour, "line": {"width": 3}},
                    "hovertemplate": f"{word} %{{x:.4g}} {_UNITS[unit]}<extra></extra>",
                }
            )
    return found
