"""Per rank, from raw samples: its residual, its lateness, and the distribution of durations on its rail.

One pass over the cases, with one case in memory at a time; only medians and quantiles of it are kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import UsageError
from ncclbench.store.records import Record
from ncclbench.store.run_directory import Run
from ncclbench.store.samples import MICRO, lateness, rank_medians, seconds_of_ranks
from ncclbench_reports.common.text_format import visible
from ncclbench_reports.html_page.case_labels import titles
from ncclbench_reports.html_page.endpoint_names import EndpointNames
from ncclbench_reports.html_page.figures import Figure, Plot, log_axis, plot_text, rounded, style, whole_ticks
from ncclbench_reports.html_page.flow_heatmaps import residual_figure

_MOST_ECDF = 6
_MOST_RAILS = 16
# Every half percent, and the far tail.
_LEVELS = np.concatenate([np.linspace(0, 0.99, 199), [0.995, 0.999, 1.0]])

Floats = NDArray[np.float64]


@dataclass
class RankStatistics:
    """Statistics of the R ranks of a run.

    Attributes:
        residual_R: log of the rank's median duration over the median rank's; the median over cases.
        late_us_R: how much later than the first rank it arrived; the median over synchronising cases, NaN without one.
        cases: how many cases had samples.
        quantiles: case -> rail -> durations in microseconds at ``_LEVELS``.
        problems: samples that could not be read.
        titles: of the cases.
        variants: through how many schedules the iterations of each case rotate.
    """

    residual_R: Floats
    late_us_R: Floats
    cases: int = 0
    quantiles: dict[str, dict[int, Floats]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    titles: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, int] = field(default_factory=dict)


def rank_statistics(run: Run, endpoints: EndpointNames) -> RankStatistics:
    """Read every case's samples once."""
    world = len(endpoints.nodes_R)
    residual_CR, late_CR = [], []
    found = RankStatistics(np.full(world, np.nan), np.full(world, np.nan), titles=titles(run.records))
    found.variants = {record.case: record.variants for record in run.records}
    drawn = _largest_cases(run.records)
    for record in run.records:
        seconds_RN = _samples_of(run, record, world, found.problems)
        if seconds_RN is None:
            continue
        median_R = rank_medians(seconds_RN)
        middle = np.median(median_R)
        if middle <= 0:
            continue
        with np.errstate(divide="ignore"):
            residual_CR.append(np.log(median_R / middle))
        if _synchronises(record):
            late_CR.append(lateness(seconds_RN) * MICRO)
        if record.case in drawn:
            found.quantiles[record.case] = _rail_quantiles(seconds_RN, endpoints)
    if residual_CR:
        found.cases = len(residual_CR)
        found.residual_R = np.median(np.stack(residual_CR), axis=0)
    if late_CR:
        found.late_us_R = np.median(np.stack(late_CR), axis=0)
    return found


def _samples_of(run: Run, record: Record, world: int, problems: list[str]) -> Floats | None:
    """The samples of a case, if every rank of the run has some."""
    try:
        seconds_RN = seconds_of_ranks(run, record) if record.status == "ok" else None
    except UsageError as error:
        problems.append(str(error))
        return None
    if seconds_RN is None or len(seconds_RN) != world or np.isnan(seconds_RN).all(axis=1).any():
        return None
    return seconds_RN


def _synchronises(record: Record) -> bool:
    """Whether no rank finishes before the last has arrived; flows between pairs do not wait for other ranks."""
    return not any(phase.flows for phase in record.phases)


def _largest_cases(records: Sequence[Record]) -> set[str]:
    """The largest case of each pattern, timing and parameters that has samples."""
    largest: dict[tuple[str, str, str], Record] = {}
    for record in sorted(records, key=lambda record: record.bytes):
        if record.samples and record.status == "ok":
            largest[record.pattern, record.timing, str(record.params)] = record
    return {record.case for record in list(largest.values())[:_MOST_ECDF]}


def _rail_quantiles(seconds_RN: Floats, endpoints: EndpointNames) -> dict[int, Floats]:
    rails = np.unique(endpoints.rails_R)[:_MOST_RAILS]
    return {int(rail): np.nanquantile(seconds_RN[endpoints.rails_R == rail], _LEVELS) * MICRO for rail in rails}


def rank_figures(found: RankStatistics, endpoints: EndpointNames, prefix: str) -> list[Figure]:
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
    return [residuals, *late, *_ecdf_figures(found, prefix)]


def _late_figure(found: RankStatistics, names: list[str], prefix: str) -> Figure:
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


def _ecdf_figures(found: RankStatistics, prefix: str) -> list[Figure]:
    figures = []
    levels = rounded(100 * _LEVELS)
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
        middle = {rail: float(np.interp(0.5, _LEVELS, us)) for rail, us in rails.items()}
        slowest = max(middle, key=lambda rail: middle[rail])
        alt = (
            f"distribution of all ranks' durations in {case}, one curve for each of {len(rails)} rails; "
            f"the slowest median is {middle[slowest]:.4g} microseconds on rail {slowest}."
        )
        layout = {
            "xaxis": log_axis("duration (us)", [float(value) for us in rails.values() for value in us]),
            "yaxis": {"title": {"text": "share of samples (%)"}, "range": [0, 101]},
        }
        title = f"{found.titles[case]}: distribution on each rail"
        caption = f"{visible(case, 300)}: all ranks of a rail and all iterations. A curve to the right is slower."
        if found.variants.get(case, 1) > 1:
            caption += f" Iterations rotate through {found.variants[case]} schedules; a rank may be idle in some."
        figures.append(
            Figure(id=f"{prefix}ecdf-{index}", title=title, alt=visible(alt), caption=caption, data=data, layout=layout)
        )
    return figures
