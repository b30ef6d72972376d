"""Bandwidth and latency against size, for each pattern with its parameters, and how they changed from run to run."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from ncclbench.store.records import LedgerRecord, Record
from ncclbench.store.verdict import RunVerdict
from ncclbench_reports.common.wording import visible
from ncclbench_reports.html_page.case_labels import Facets, short_labels
from ncclbench_reports.html_page.figures import Figure, extent, log_axis, plot_text, rounded, size_axis, style
from ncclbench_reports.html_page.parameter_dots import dot_figures
from ncclbench_reports.html_page.phase_figures import alternatives

# Two plots each: beyond this a page is no longer looked at. The tables have everything.
MOST_PATTERNS = 24
_MOST_TRENDS = 8
# Up to so many sets of parameters of a pattern share a plot.
_MOST_PARAMS = 4
# What a floor of the profile is about, and in which plot it belongs.
_FLOOR_UNITS = {"bus_gb_per_s": "gb_per_s", "bottleneck_gb_per_s": "gb_per_s", "p50_us": "us"}

Row = dict[str, Any]


def limits_of(judged: Sequence[RunVerdict | None]) -> dict[str, dict[str, float]]:
    """The profile's floors, as the evidence of the check ``floor`` states them, by case."""
    found: dict[str, dict[str, float]] = {}
    for judgement in judged:
        for check in judgement.checks if judgement else []:
            for evidence in check.evidence if check.check == "floor" else []:
                limit, unit = evidence.get("limit"), _FLOOR_UNITS.get(str(evidence.get("metric")))
                if unit and isinstance(limit, int | float) and math.isfinite(limit) and limit > 0:
                    found.setdefault(check.subject, {})[f"floor_{unit}"] = float(limit)
    return found


def bounds_of(records: Iterable[Record]) -> dict[str, dict[str, float]]:
    """What the wires of a topology file allow: for each case whose phases all have a bound, ``bound_us`` and rate."""
    found = {}
    for record in records:
        bounds = [phase.bound_us for phase in record.phases]
        if bounds and all(bound is not None for bound in bounds) and record.time_us:
            known = [bound for bound in bounds if bound is not None]
            by_turns = alternatives(record)
            bound_us = statistics.median(known) if by_turns else sum(known)
            # A rate of phases that take turns is that of a whole rotation, and so is its bound.
            times = [phase.time_us.p50 for phase in record.phases if phase.time_us]
            share = sum(times) / sum(known) if by_turns and bound_us > 0 else record.time_us.p50 / (bound_us or 1.0)
            rate = record.bus_gb_per_s or (record.ledger or LedgerRecord()).bottleneck_gb_per_s
            if bound_us > 0:
                found[record.case] = {"bound_us": bound_us}
                if rate:
                    found[record.case]["bound_gb_per_s"] = rate * share
    return found


def curve_figures(
    rows: Sequence[Row], names: Mapping[str, str], limits: Mapping[str, Mapping[str, float]]
) -> list[Figure]:
    """Two figures for each pattern and parameters: bandwidth, and time, against size or, where it is one, by case."""
    figures = []
    timed = [row for row in rows if row["p50_us"] is not None and row["p50_us"] > 0]
    groups = curve_groups(one_a_case(timed))
    for place, (title, members) in enumerate(list(groups.items())[:MOST_PATTERNS]):
        if _is_one_size(members):
            figures += dot_figures(str(place), title, members, names, limits)
            continue
        figures += _bandwidth(f"bandwidth-{place}", title, members, names, limits)
        figures.append(_latency(f"latency-{place}", title, members, names, limits))
    return figures


def curve_groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each plot, by its title: a pattern, or a pattern with its parameters where they are many."""
    patterns: dict[str, list[Row]] = {}
    for row in rows:
        patterns.setdefault(row["pattern"], []).append(row)
    groups: dict[str, list[Row]] = {}
    for pattern, members in patterns.items():
        params = list(dict.fromkeys(row["params"] for row in members))
        if len(params) <= _MOST_PARAMS or _is_one_size(members):
            groups[pattern] = members
            continue
        labels = short_labels([Facets(_params(text), {}) for text in params])
        for text, label in zip(params, labels, strict=True):
            stated = " ".join(part for part in label.split() if not part.endswith("=default"))
            title = visible(f"{pattern} {stated}".strip(), 120)
            groups.setdefault(title, []).extend(row for row in members if row["params"] == text)
    return groups


def _is_one_size(rows: Sequence[Row]) -> bool:
    """Whether there are many cases, and no two that differ in their size alone: there is no curve to draw."""
    sizes: dict[tuple[Any, ...], set[int]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("run", "params", "timing", "dtype", "redop", "world_size"))
        sizes.setdefault(key, set()).add(_size(row))
    return len(rows) > _MOST_PARAMS and all(len(found) == 1 for found in sizes.values())


def one_a_case(rows: Sequence[Row]) -> list[Row]:
    """One row a case and run: over several process starts the median of their medians, and the whole of their range."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["run"], row["case"]), []).append(row)
    return [_over_starts(starts) if len(starts) > 1 else starts[0] for starts in found.values()]


def _over_starts(starts: list[Row]) -> Row:
    times = sorted(row["p50_us"] for row in starts)
    middle = statistics.median(times)
    rates = {
        name: starts[0][name] * starts[0]["p50_us"] / middle if starts[0][name] else None
        for name in ("bus_gb_per_s", "bottleneck_gb_per_s")
    }
    return {
        **starts[0],
        **rates,
        "p50_us": middle,
        "p50_lo_us": times[0],
        "p50_hi_us": times[-1],
        "starts": len(starts),
    }


def _params(text: str) -> dict[str, str]:
    return {name: str(value) for name, value in msgspec.json.decode(text).items()}


def _shown_params(params: str) -> str:
    return visible(" ".join(f"{name}={value}" for name, value in _params(params).items()), 80)


def _series(rows: Sequence[Row], names: Mapping[str, str]) -> dict[str, list[Row]]:
    """The rows of each curve, by its name: the timing regime, and what else differs."""
    several = {key: len({row[key] for row in rows}) > 1 for key in ("params", "dtype", "redop", "world_size")}
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["size_bytes"] or row["bytes"]):
        shown = {**row, "params": _shown_params(row["params"])}
        parts = [row["timing"], *(str(shown[key]) for key in several if several[key] and shown[key])]
        parts += [names[row["run"]]] if len(names) > 1 else []
        found.setdefault(" · ".join(parts), []).append(row)
    return found


def _places(rows: Sequence[Row], names: Mapping[str, str]) -> dict[str, int]:
    """Which style each curve has: the same in the plot of rates, which may lack some, as in that of times."""
    return {name: place for place, name in enumerate(sorted(_series(rows, names)))}


def _bandwidth(
    key: str, title: str, rows: list[Row], names: Mapping[str, str], limits: Mapping[str, Mapping[str, float]]
) -> list[Figure]:
    column = next((name for name in ("bus_gb_per_s", "bottleneck_gb_per_s") if any(row[name] for row in rows)), None)
    if column is None:
        return []
    what = "bus bandwidth" if column == "bus_gb_per_s" else "bandwidth of the busiest rank"
    data = []
    shown = [row for row in rows if row[column]]
    places = _places(rows, names)
    for name, members in _series(shown, names).items():
        # A rate's interval is the time's, turned over: the longest time is the lowest rate.
        low = [row[column] * (1 - row["p50_us"] / row["p50_hi_us"]) if row["p50_hi_us"] else 0 for row in members]
        high = [row[column] * (row["p50_us"] / row["p50_lo_us"] - 1) if row["p50_lo_us"] else 0 for row in members]
        data.append(_curve(name, members, [row[column] for row in members], high, low, "GB/s", places[name]))
    data += _limit_curves(shown, limits, "gb_per_s", "GB/s")
    best = max(shown, key=lambda row: row[column])
    alt = (
        f"{what} of {title} against size on logarithmic axes, {len(_series(shown, names))} curves; "
        f"the highest is {best[column]:.4g} GB/s at {_size(best)} bytes."
    )
    layout = {"xaxis": size_axis(_size(row) for row in rows), "yaxis": log_axis(f"{what} (GB/s)", extent(data, "y"))}
    return [Figure(id=key, title=f"{title}: {what}", alt=visible(alt), caption="", data=data, layout=layout)]


def _latency(
    key: str, title: str, rows: list[Row], names: Mapping[str, str], limits: Mapping[str, Mapping[str, float]]
) -> Figure:
    data = []
    places = _places(rows, names)
    for name, members in _series(rows, names).items():
        times = [row["p50_us"] for row in members]
        high = [row["p50_hi_us"] - row["p50_us"] if row["p50_hi_us"] else 0 for row in members]
        low = [row["p50_us"] - row["p50_lo_us"] if row["p50_lo_us"] else 0 for row in members]
        data.append(_curve(name, members, times, high, low, "us", places[name]))
    data += _limit_curves(rows, limits, "us", "us")
    least = min(rows, key=lambda row: row["p50_us"])
    alt = (
        f"time of {title} against size on logarithmic axes, {len(_series(rows, names))} curves; "
        f"the shortest is {least['p50_us']:.4g} microseconds at {_size(least)} bytes."
    )
    layout = {
        "xaxis": size_axis(_size(row) for row in rows),
        "yaxis": log_axis("time (us)", extent(data, "y")),
    }
    return Figure(id=key, title=f"{title}: time", alt=visible(alt), caption="", data=data, layout=layout)


def _size(row: Row) -> int:
    return int(row["size_bytes"] or row["bytes"])


def _curve(
    name: str, rows: Sequence[Row], y: list[float], high: list[float], low: list[float], unit: str, place: int
) -> Row:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plot_text(name),
        "x": [_size(row) for row in rows],
        "y": rounded(y),
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": rounded(high),
            "arrayminus": rounded(low),
            "thickness": 1,
        },
        "text": [
            f"<b>{plot_text(name)}</b><br>{_size(row)} B: {value:.4g} {unit}<br>"
            + (f"{value - down:.4g} to {value + up:.4g}, " if up or down else "")
            + _basis(row)
            for row, value, up, down in zip(rows, y, high, low, strict=True)
        ],
        "hovertemplate": "%{text}<extra></extra>",
        **style(place),
    }


def _basis(row: Row) -> str:
    if row.get("time_is") == "mean":
        return "a mean over launches"
    return f"over {row['starts']} starts" if "starts" in row else f"n {row['n']}"


def _limit_curves(rows: Sequence[Row], limits: Mapping[str, Mapping[str, float]], unit: str, shown: str) -> list[Row]:
    """The profile's floor and the bound, where the verdict's evidence states them."""
    found = []
    for word, dash in (("floor", "dash"), ("bound", "dot")):
        limited = [row for row in rows if f"{word}_{unit}" in limits.get(row["case"], {})]
        points = sorted({(_size(row), limits[row["case"]][f"{word}_{unit}"]) for row in limited})
        if points:
            found.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": "the profile's floor" if word == "floor" else "bound",
                    "x": [x for x, _ in points],
                    "y": rounded([y for _, y in points]),
                    "line": {"color": "#d1483f" if word == "floor" else "#7b8494", "dash": dash, "width": 2},
                    "marker": {
                        "symbol": "line-ew-open",
                        "size": 12,
                        "color": "#d1483f" if word == "floor" else "#7b8494",
                    },
                    "hovertemplate": f"{word} %{{y:.4g}} {shown}<extra></extra>",
                }
            )
    return found


def trend_figures(rows: Sequence[Row], names: Mapping[str, str]) -> list[Figure]:
    """Time of each case from run to run; `rows` are those of `by_date`. The cases that moved most are drawn."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["transport"], row["world_size"]), []).append(row)
    moved = sorted(groups.items(), key=lambda item: -_spread(item[1]))[:_MOST_TRENDS]
    if not moved:
        return []
    data = []
    for place, ((case, transport, ranks), members) in enumerate(moved):
        first = members[0]["p50_us"]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plot_text(case),
                "x": [row["started"] for row in members],
                "y": rounded([row["p50_us"] / first for row in members]),
                "text": [
                    f"<b>{plot_text(case)}</b><br>{plot_text(names[row['run']])}, start {row['start']}, "
                    f"{plot_text(transport)}, {ranks} ranks<br>"
                    f"{plot_text(row['started'])}: {row['p50_us']:.4g} us"
                    for row in members
                ],
                "hovertemplate": "%{text}<extra></extra>",
                **style(place),
            }
        )
    one = "run" if len(names) > 1 else "start"
    layout = {
        "xaxis": {"title": {"text": "when the case began (UTC)"}, "type": "date"},
        "yaxis": {"title": {"text": f"time / first {one}'s"}},
    }
    worst_case, worst_rows = moved[0]
    alt = (
        f"median time of {len(moved)} cases over the {one}s, as a share of the first {one}'s; "
        f"{worst_case[0]} moved most, by {100 * _spread(worst_rows):.3g}%."
    )
    caption = (
        f"The {len(moved)} of {len(groups)} cases that moved most. 1 is the first {one}'s median; above is slower."
    )
    return [
        Figure(
            id="trend",
            title=f"Trend over {'runs' if len(names) > 1 else 'process starts'}",
            alt=visible(alt),
            caption=caption,
            data=data,
            layout=layout,
        )
    ]


def _spread(rows: Sequence[Row]) -> float:
    times = [row["p50_us"] for row in rows if row["p50_us"] > 0]
    return max(times) / min(times) - 1 if times else 0.0
