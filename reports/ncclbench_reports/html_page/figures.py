"""A figure as plain data for plotly.js, and the two ways in which text gets into one.

plotly.js reads a few HTML tags in every text that it draws (``<b>``, ``<a href>``) and decodes entities after that. So
text from outside is escaped as HTML here, and shows up letter by letter.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ncclbench.units import format_size
from ncclbench_reports.common.wording import visible

# Okabe and Ito's colours, darkened or lightened so far that each has 3:1 on the light page and on the dark one.
COLOURS = ("#0b7abf", "#d55e00", "#00916a", "#c0609a", "#a97900", "#5a86d6", "#9c6ade", "#7b8494")
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "star", "hexagon")
# Names longer than this are cut in a plot; the tables have them whole.
NAME_LENGTH = 48
# A logarithmic axis shows at least this factor from end to end.
_LEAST_SPAN = 4.0


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One plot.

    Attributes:
        id: unique on the page.
        title: its heading.
        alt: what a reader who cannot see it should know; ends up in ``aria-label``.
        caption: how to read it.
        data: plotly traces.
        layout: plotly layout, without anything of the theme.
    """

    id: str
    title: str
    alt: str
    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)


def plot_text(text: object, limit: int = NAME_LENGTH) -> str:
    """Text from outside, for a plot."""
    return html.escape(visible(text, limit), quote=False)


def rounded(values: ArrayLike) -> list[float | None]:
    """Figures with six significant digits, as a plot needs them; None where there is none."""
    return [
        None if not math.isfinite(value) else float(f"{value:.6g}") for value in np.asarray(values, np.float64).tolist()
    ]


def style(place: int) -> dict[str, Any]:
    """Colour, dash and symbol of the trace at `place`: never told apart by colour alone."""
    return {
        "line": {
            "color": COLOURS[place % len(COLOURS)],
            "dash": DASHES[place // len(COLOURS) % len(DASHES)],
            "width": 2,
        },
        "marker": {"color": COLOURS[place % len(COLOURS)], "symbol": SYMBOLS[place % len(SYMBOLS)], "size": 7},
    }


def size_axis(sizes: Iterable[float]) -> dict[str, Any]:
    """A logarithmic axis of bytes, with marks at powers of two that read 1K, 1M."""
    known = sorted({float(size) for size in sizes if size > 0}) or [1.0]
    low, high = math.floor(math.log2(known[0])), math.ceil(math.log2(known[-1]))
    step = max(1, math.ceil((high - low) / 8))
    ticks = [2.0**power for power in range(low, high + 1, step)]
    margin = max(0.15, 0.05 * math.log10(known[-1] / known[0]))
    return {
        "range": [math.log10(known[0]) - margin, math.log10(known[-1]) + margin],
        "title": {"text": "size"},
        "type": "log",
        "tickvals": ticks,
        "ticktext": [format_size(tick) for tick in ticks],
        "minor": {"ticks": ""},
    }


def log_axis(title: str, values: Iterable[float]) -> dict[str, Any]:
    """A logarithmic axis with marks at powers of ten, and between them where there is room."""
    known = [value for value in values if value and math.isfinite(value) and value > 0] or [1.0]
    decades = range(math.floor(math.log10(min(known))) - 1, math.ceil(math.log10(max(known))) + 1)
    span = math.log10(max(known) / min(known))
    leads = (1,) if span > 3 else (1, 3) if span > 1.5 else (1, 2, 5) if span > 0.8 else (1, 1.5, 2, 3, 4, 5, 7)
    ticks = [lead * 10.0**power for power in decades for lead in leads]
    axis = {"title": {"text": title}, "type": "log", "tickvals": ticks, "ticktext": [_short(tick) for tick in ticks]}
    if max(known) / min(known) < _LEAST_SPAN:  # else an axis as narrow as one interval would make much of nothing
        middle, half = math.log10(max(known) * min(known)) / 2, math.log10(_LEAST_SPAN) / 2
        axis["range"] = [middle - half, middle + half]
    return axis


def extent(traces: Iterable[Mapping[str, Any]], axis: str) -> list[float]:
    """All values of the traces on an axis, and the ends of their intervals: none may lie beyond the plot."""
    found: list[float] = []
    for trace in traces:
        error = trace.get(f"error_{axis}") or {}
        for k, value in enumerate(trace[axis]):
            low, high = (error[name][k] if name in error else 0 for name in ("arrayminus", "array"))
            found += [value, value - (low or 0), value + (high or 0)] if value is not None else []
    return found


def _short(tick: float) -> str:
    """As plotly.js writes its own marks: 20k, 1.5M."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tick >= factor:
            return f"{tick / factor:g}{letter}"
    return f"{tick:g}"


def whole_ticks(count: int) -> dict[str, Any]:
    """For an axis of so many things in order: no mark stands between two of them."""
    return {"dtick": 1} if count <= 16 else {}


def short_names(paths: Sequence[str]) -> list[str]:
    """The least of each path's end that tells it from the others."""
    for parts in range(1, 8):
        names = ["/".join(path.rstrip("/").split("/")[-parts:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return list(paths)
