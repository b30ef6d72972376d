"""Heat maps of flows (rail by rail, leaf by leaf, NIC by NIC), and figures of sorted residuals."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ncclbench.analysis.residuals import CaseFlows, case_flows, percent
from ncclbench.store.records import Record
from ncclbench.store.run_directory import Run
from ncclbench_reports.common.text_format import visible
from ncclbench_reports.html_page.case_labels import titles
from ncclbench_reports.html_page.endpoint_names import EndpointNames
from ncclbench_reports.html_page.figures import Figure, Plot, plot_text, rounded, whole_ticks

_MOST_CASES = 6
# A heat map of more single NICs is unreadable.
_MOST_NICS = 64
_MOST_LABELS = 16
_LEAST_SPAN = 0.8

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def flow_figures(run: Run, endpoints: EndpointNames, prefix: str) -> list[Figure]:
    """Heat maps of the largest case with flows per pattern, timing and parameters."""
    chosen: dict[tuple[str, str, str], Record] = {}
    for record in sorted(run.records, key=lambda record: record.bytes):
        if any(phase.flows for phase in record.phases):
            chosen[record.pattern, record.timing, str(record.params)] = record
    figures = []
    named = titles(run.records)
    for index, record in enumerate(list(chosen.values())[:_MOST_CASES]):
        flows = case_flows(record, len(endpoints.nodes_R))
        if flows is None:
            continue
        title = named[record.case]
        figures.append(
            _heat_map(
                f"{prefix}rails-{index}", title, "rail", flows, endpoints.rails_R, lambda k: f"rail {k}", endpoints
            )
        )
        if endpoints.leaves_R is not None:
            figures.append(
                _heat_map(
                    f"{prefix}leaves-{index}", title, "leaf", flows, endpoints.leaves_R, endpoints.leaf_name, endpoints
                )
            )
        nic_R, names = nics_of(endpoints)
        if len(names) <= _MOST_NICS:
            figures.append(_heat_map(f"{prefix}nics-{index}", title, "NIC", flows, nic_R, names.__getitem__, endpoints))
    return figures


def nics_of(endpoints: EndpointNames) -> tuple[Ints, list[str]]:
    """The NIC of each rank, and the names of all NICs."""
    pairs, first_N, nic_R = np.unique(
        np.stack([endpoints.nodes_R, endpoints.rails_R]), axis=1, return_index=True, return_inverse=True
    )
    del pairs
    return nic_R.reshape(-1).astype(np.int64), [endpoints.nic(int(rank)) for rank in first_N]


def _heat_map(
    key: str,
    case: str,
    kind: str,
    flows: CaseFlows,
    group_R: Ints,
    name: Callable[[int], str],
    endpoints: EndpointNames,
) -> Figure:
    """Medians of the flows from each group (a row) to each group (a column)."""
    groups, index_R = np.unique(group_R, return_inverse=True)
    names = [name(int(group)) for group in groups]
    size = len(groups)
    cell_F = index_R.reshape(-1)[flows.src_F] * size + index_R.reshape(-1)[flows.dst_F]
    order = np.argsort(cell_F, kind="stable")
    cells, starts = np.unique(cell_F[order], return_index=True)
    rate_GG = np.full((size, size), np.nan)
    text_GG = [[f"{plot_text(a)} → {plot_text(b)}<br>no flow" for b in names] for a in names]
    for cell, members in zip(cells, np.split(order, starts[1:]), strict=True):
        row, column = divmod(int(cell), size)
        known = members[~np.isnan(flows.gb_per_s_F[members])]
        pair = f"<b>{plot_text(names[row])} → {plot_text(names[column])}</b>"
        if len(known):
            rate_GG[row, column] = np.median(flows.gb_per_s_F[known])
            slowest = known[np.argmin(flows.gb_per_s_F[known])]
            pair += f"<br>median {rate_GG[row, column]:.4g} GB/s over {len(known)} flows"
            pair += f"<br>slowest {_pair(flows, slowest, endpoints)}: {flows.gb_per_s_F[slowest]:.4g} GB/s"
        lost = [f for f in members if np.isnan(flows.gb_per_s_F[f])]
        pair += f"<br>{len(lost)} flows did not end, among them {_pair(flows, lost[0], endpoints)}" if lost else ""
        text_GG[row][column] = pair
    return _as_figure(key, f"{case}: {kind} by {kind}", kind, flows, names, rate_GG, text_GG)


def _pair(flows: CaseFlows, flow: int, endpoints: EndpointNames) -> str:
    return f"{plot_text(endpoints.rank(int(flows.src_F[flow])))} → {plot_text(endpoints.rank(int(flows.dst_F[flow])))}"


def _as_figure(
    key: str, title: str, kind: str, flows: CaseFlows, names: list[str], rate_GG: Floats, text_GG: list[list[str]]
) -> Figure:
    known = rate_GG[~np.isnan(rate_GG)]
    alt = f"heat map of {flows.case}, {kind} by {kind}: no flow ended."
    if len(known):
        row, column = np.unravel_index(np.nanargmin(rate_GG), rate_GG.shape)
        alt = (
            f"heat map of {flows.case}, {len(names)} by {len(names)} {kind}s: median {np.median(known):.4g} GB/s, "
            f"slowest {names[row]} to {names[column]} with {known.min():.4g} GB/s."
        )
    labels = [plot_text(name, 24) for name in names]
    data: Plot = {
        "type": "heatmap",
        # Categories are numbers, with names as tick texts: two names may be cut to the same text.
        "z": [rounded(row) for row in rate_GG],
        "text": text_GG,
        "hovertemplate": "%{text}<extra></extra>",
        "hoverongaps": True,
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": "GB/s"}, "thickness": 14},
        "xgap": 1,
        "ygap": 1,
    }
    if len(known):  # colours that span less than a fifth would exaggerate
        data |= {"zmin": min(float(known.min()), _LEAST_SPAN * float(known.max())), "zmax": float(known.max())}
    if len(names) <= _MOST_LABELS:
        data |= (
            {"texttemplate": "%{z:.3g}"} if len(names) <= 5 else {"texttemplate": "%{z:.2g}", "textfont": {"size": 10}}
        )
    ticks = _ticks(labels)
    layout = {
        "xaxis": {"title": {"text": f"receiving {kind}"}, "constrain": "domain", **ticks},
        "yaxis": {"title": {"text": f"sending {kind}"}, "autorange": "reversed", **ticks},
        "square": True,
    }
    caption = (
        f"{visible(flows.case, 300)}: each cell is the median of the flows from a {kind} (row) to a {kind} (column). "
        "Hover over a cell for the slowest pair."
    )
    return Figure(id=key, title=title, alt=visible(alt), caption=caption, data=[data], layout=layout)


def _ticks(labels: list[str]) -> Plot:
    step = -(-len(labels) // 32)
    return {"tickvals": list(range(0, len(labels), step)), "ticktext": labels[::step]}


def residual_figure(
    key: str, title: str, series: Mapping[str, tuple[Sequence[str], Sequence[float]]], caption: str
) -> Figure:
    """Each series (logarithms of ratios, shown in percent) sorted, with the name of each point on hover."""
    data: list[Plot] = []
    extremes = []
    for index, (name, (labels, logs)) in enumerate(series.items()):
        values = [percent(log) for log in logs]
        order = [k for k in np.argsort(values, kind="stable").tolist() if not np.isnan(values[k])]
        if not order:
            continue
        colour = ("#0b7abf", "#d55e00")[index % 2]
        data.append(
            {
                "type": "scatter",
                "mode": "markers" if len(order) <= 512 else "lines",
                "name": name,
                "x": list(range(1, len(order) + 1)),
                "y": rounded([values[k] for k in order]),
                "text": [plot_text(labels[k], 64) for k in order],
                "hovertemplate": "%{text}<br>%{y:+.3g}%<extra>" + name + "</extra>",
                "marker": {"color": colour, "symbol": ("circle", "diamond-open")[index % 2], "size": 7},
                "line": {"color": colour, "width": 2},
            }
        )
        extremes.append(
            f"{name} from {labels[order[0]]} ({values[order[0]]:+.3g}%) "
            f"to {labels[order[-1]]} ({values[order[-1]]:+.3g}%)"
        )
    alt = f"sorted residuals: {'; '.join(extremes)}."
    layout: Plot = {
        "xaxis": {
            "title": {"text": "position in the sorted order"},
            **whole_ticks(max((len(s[0]) for s in series.values()), default=0)),
        },
        "yaxis": {"title": {"text": "from the median of all (%)"}, "zeroline": True},
        "hovermode": "closest",
    }
    return Figure(id=key, title=title, alt=visible(alt), caption=caption, data=data, layout=layout)
