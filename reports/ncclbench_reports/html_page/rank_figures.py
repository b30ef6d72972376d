"""Figures of ranks: sorted residuals, how late each rank arrives, and the distribution of durations on each rail."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ncclbench.analysis.residuals import LEVELS, RankResiduals, rank_residuals
from ncclbench.store.records import Record
from ncclbench.store.run_directory import Run
from ncclbench_reports.common.text_format import visible
from ncclbench_reports.html_page.case_labels import titles
from ncclbench_reports.html_page.endpoint_names import EndpointNames
from ncclbench_reports.html_page.figures import Figure, Plot, log_axis, plot_text, rounded, style, whole_ticks
from ncclbench_reports.html_page.flow_heatmaps import residual_figure

_MOST_ECDF = 6
_MOST_RAILS = 16

Floats = NDArray[np.float64]


def rank_statistics(run: Run, endpoints: EndpointNames) -> RankResiduals:
    """The residuals of all ranks, with the distributions of the cases that are drawn."""
    return rank_residuals(run, endpoints.rails_R, _largest_cases(run.records), _MOST_RAILS)


def _largest_cases(records: Sequence[Record]) -> set[str]:
    """The largest case of each pattern, timing and parameters that has samples."""
    largest: dict[tuple[str, str, str], Record] = {}
    for record in sorted(records, key=lambda record: record.bytes):
        if record.samples and record.status == "ok":
            largest[record.pattern, record.timing, str(record.params)] = record
    return {record.case for record in list(largest.values())[:_MOST_ECDF]}


def rank_figures(found: RankResiduals, run: Run, endpoints: EndpointNames, prefix: str) -> list[Figure]:
    """Sorted residuals, lateness, and one ECDF per case; nothing if no case has samples."""
    if not found.cases:
        return []
    names = [endpoints.rank(rank) for rank in range(len(endpoints.nodes_R))]
    caption = (
        f"Each rank's median duration against the median rank's, the median over {found.cases} cases. In a "
        "synchronising collective the last rank to arrive has the shortest duration: read this together with the skew."
    )
    residuals = residual_figure(
        f"{prefix}rank-residuals", "Every rank, sorted", {"duration": (names, found.residual_R.tolist())}, caption
    )
    late = [] if np.isnan(found.late_us_R).all() else [_late_figure(found, names, prefix)]
    return [residuals, *late, *_ecdf_figures(found, run, prefix)]


def _late_figure(found: RankResiduals, names: list[str], prefix: str) -> Figure:
    last = int(np.nanargmax(found.late_us_R))
    many = len(names) > 512
    data: Plot = {
        "type": "scatter" if many else "bar",
        "x": list(range(len(names))),
        "y": rounded(found.late_us_R),
        "text": [plot_text(name, 64) for name in names],
        "textposition": "none" if not many else None,
        "hovertemplate": "%{text}<br>%{y:.4g} us after the first<extra></extra>",
        "marker": {"color": "#0b7abf"},
    }
    if many:
        data |= {"mode": "lines", "line": {"color": "#0b7abf", "width": 1}}
        data.pop("textposition")
    alt = (
        f"arrival of {len(names)} ranks after the first; "
        f"the last is {names[last]} with {found.late_us_R[last]:.4g} microseconds."
    )
    caption = (
        "How much later than the first each rank arrived: the median over iterations, then over cases. Rounds of flows "
        "between pairs are left out: there the ranks do not wait for each other."
    )
    layout = {
        "xaxis": {"title": {"text": "rank"}, **whole_ticks(len(names))},
        "yaxis": {"title": {"text": "after the first (us)"}, "rangemode": "tozero"},
    }
    return Figure(
        id=f"{prefix}skew",
        title="Skew: when each rank arrives",
        alt=visible(alt),
        caption=caption,
        data=[data],
        layout=layout,
    )


def _ecdf_figures(found: RankResiduals, run: Run, prefix: str) -> list[Figure]:
    figures = []
    named = titles(run.records)
    variants = {record.case: record.variants for record in run.records}
    levels = rounded(100 * LEVELS)
    for index, (case, rails) in enumerate(found.quantiles.items()):
        data: list[Plot] = [
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"rail {rail}",
                "x": rounded(us),
                "y": levels,
                "hovertemplate": f"rail {rail}: %{{y:.4g}}% within %{{x:.4g}} us<extra></extra>",
                "line": style(number)["line"],
            }
            for number, (rail, us) in enumerate(rails.items())
        ]
        middle = {rail: float(np.interp(0.5, LEVELS, us)) for rail, us in rails.items()}
        slowest = max(middle, key=lambda rail: middle[rail])
        alt = (
            f"distribution of all ranks' durations in {case}, one curve for each of {len(rails)} rails; "
            f"the slowest median is {middle[slowest]:.4g} microseconds on rail {slowest}."
        )
        layout = {
            "xaxis": log_axis("duration (us)", [float(value) for us in rails.values() for value in us]),
            "yaxis": {"title": {"text": "share of samples (%)"}, "range": [0, 101]},
        }
        title = f"{named[case]}: distribution on each rail"
        caption = f"{visible(case, 300)}: all ranks of a rail and all iterations. A curve to the right is slower."
        if variants.get(case, 1) > 1:
            caption += f" Iterations rotate through {variants[case]} schedules; a rank may be idle in some."
        figures.append(
            Figure(id=f"{prefix}ecdf-{index}", title=title, alt=visible(alt), caption=caption, data=data, layout=layout)
        )
    return figures
