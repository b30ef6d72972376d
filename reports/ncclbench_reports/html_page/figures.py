"""A figure as plain data for plotly.js: text, colours, axes and intervals.

plotly.js reads a few HTML tags in every text that it draws (``<b>``, ``<a href>``) and decodes entities after that.
Therefore text from outside is escaped as HTML here, and appears character by character.
"""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from ncclbench.units import format_size
from ncclbench_reports.common.text_format import visible

# Colours of Okabe and Ito, darkened or lightened to a contrast of 3:1 on the light page and on the dark one.
COLOURS = ("#0b7abf", "#d55e00", "#00916a", "#c0609a", "#a97900", "#5a86d6", "#9c6ade", "#7b8494")
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "star", "hexagon")
# Names longer than this are cut in a plot; the tables have them whole.
NAME_LENGTH = 48
# A logarithmic axis shows at least this factor from end to end.
_LEAST_SPAN = 4.0

# Plain data for plotly.js: a trace, a layout, or a part of one.
Plot = dict[str, object]
# A figure with the lower and the upper end of its interval; None where it is unknown.
Point = tuple[float | None, float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One plot.

    Attributes:
        id: unique on the page.
        title: its heading.
        alt: the same in words, for screen readers; ends up in ``aria-label``.
        caption: how to read it.
        data: plotly traces.
        layout: plotly layout, without anything of the theme.
    """

    id: str
    title: str
    alt: str
    caption: str
    data: Sequence[Plot]
    layout: Plot = field(default_factory=dict)


def plot_text(text: object, limit: int = NAME_LENGTH) -> str:
    """Text from outside, for a plot."""
    return html.escape(visible(text, limit), quote=False)


def rounded(values: ArrayLike) -> list[float | None]:
    """Figures with six significant digits, enough for a plot; None where one is not finite."""
    return [
        None if not math.isfinite(value) else float(f"{value:.6g}") for value in np.asarray(values, np.float64).tolist()
    ]


def style(index: int) -> Plot:
    """Colour, dash and symbol of trace number `index`: colour is never the only difference."""
    return {
        "line": {
            "color": COLOURS[index % len(COLOURS)],
            "dash": DASHES[index // len(COLOURS) % len(DASHES)],
            "width": 2,
        },
        "marker": {"color": COLOURS[index % len(COLOURS)], "symbol": SYMBOLS[index % len(SYMBOLS)], "size": 7},
    }


def size_axis(sizes: Iterable[float]) -> Plot:
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


def log_axis(title: str, values: Iterable[float]) -> Plot:
    """A logarithmic axis with marks at powers of ten, and between them on a short axis."""
    known = [value for value in values if value and math.isfinite(value) and value > 0] or [1.0]
    decades = range(math.floor(math.log10(min(known))) - 1, math.ceil(math.log10(max(known))) + 1)
    span = math.log10(max(known) / min(known))
    leads = (1,) if span > 3 else (1, 3) if span > 1.5 else (1, 2, 5) if span > 0.8 else (1, 1.5, 2, 3, 4, 5, 7)
    ticks = [lead * 10.0**power for power in decades for lead in leads]
    axis: Plot = {
        "title": {"text": title},
        "type": "log",
        "tickvals": ticks,
        "ticktext": [_short(tick) for tick in ticks],
    }
    if max(known) / min(known) < _LEAST_SPAN:  # a narrower axis would exaggerate
        middle, half = math.log10(max(known) * min(known)) / 2, math.log10(_LEAST_SPAN) / 2
        axis["range"] = [middle - half, middle + half]
    return axis


def extent(points: Iterable[Point]) -> list[float]:
    """All figures and the ends of their intervals as they are drawn: none may lie beyond the plot."""
    found: list[float] = []
    for value, low, high in points:
        if value is not None:
            drawn, below, above = (
                number or 0.0
                for number in rounded(
                    [value, 0.0 if low is None else value - low, 0.0 if high is None else high - value]
                )
            )
            found += [drawn, drawn - below, drawn + above]
    return found


def error_bars(points: Sequence[Point], thickness: float = 1) -> Plot:
    """The intervals of figures, as plotly draws them; of no length where there is none."""
    ends = [(value, value if low is None else low, value if high is None else high) for value, low, high in points]
    return {
        "type": "data",
        "symmetric": False,
        "array": rounded([_distance(value, high) for value, _, high in ends]),
        "arrayminus": rounded([_distance(low, value) for value, low, _ in ends]),
        "thickness": thickness,
    }


def _distance(low: float | None, high: float | None) -> float:
    return math.nan if low is None or high is None else high - low


def _short(tick: float) -> str:
    """As plotly.js writes its own marks: 20k, 1.5M."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tick >= factor:
            return f"{tick / factor:g}{letter}"
    return f"{tick:g}"


def whole_ticks(count: int) -> Plot:
    """For an axis with `count` things in order: marks only at whole numbers."""
    return {"dtick": 1} if count <= 16 else {}


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of each path, as many as distinguish it from the others."""
    for parts in range(1, 8):
        names = ["/".join(path.rstrip("/").split("/")[-parts:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return list(paths)
