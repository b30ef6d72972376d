"""Figures of the HTML report as data: labels, curves, skewed routing, bounds, flows and ranks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ncclbench.analysis.summary import summarise
from ncclbench.store.records import PhaseResult, Record, Subtotal
from ncclbench.store.run_directory import Run, read_run
from ncclbench.store.run_writer import RunWriter
from ncclbench_reports.common.record_rows import record_rows
from ncclbench_reports.html_page.case_labels import Facets, short_labels
from ncclbench_reports.html_page.endpoint_names import EndpointNames
from ncclbench_reports.html_page.figures import extent, log_axis, plot_text, short_names
from ncclbench_reports.html_page.rank_figures import rank_figures, rank_statistics
from ncclbench_reports.html_page.rates import bounds_of
from ncclbench_reports.html_page.routing_skew import skew_figures
from ncclbench_reports.html_page.size_curves import curve_figures
from tests.helpers.cluster_runs import (
    WORLD,
    cluster_manifest,
    collective,
    flows,
    ledger,
    moe,
    seconds_of,
)
from tests.helpers.stored import like, plain


def run_of(*records: Record) -> Run:
    return Run(Path("run"), cluster_manifest(), records, ())


# ---- labels ----------------------------------------------------------------------------------------------------------


def facets(params: dict[str, str], **further: str) -> Facets:
    return Facets(params, {"timing": "isolated", "size": "1K", "dtype": "float32", **further})


@pytest.mark.parametrize(
    ("cases", "labels"),
    [
        ([facets({"a": "1", "b": "x"}), facets({"a": "2", "b": "x"})], ["a=1", "a=2"]),
        ([facets({}), facets({"routing": "zipf:1"})], ["routing=default", "routing=zipf:1"]),
        ([facets({}, size="1K"), facets({}, size="2K")], ["1K", "2K"]),
        ([facets({"f": "1"}, dtype="uint8"), facets({"f": "2"}, dtype="int8")], ["f=1", "f=2"]),
        ([facets({"f": "1"}), facets({"f": "1"}, timing="graph"), facets({"f": "2"})],
         ["f=1 isolated", "f=1 graph", "f=2 isolated"]),
        ([facets({"a": "1"})], [""]),
    ],
)  # fmt: skip
def test_a_short_label_has_only_what_differs(cases: list[Facets], labels: list[str]) -> None:
    assert short_labels(cases) == labels


def test_names_in_plots_are_cut_and_escaped() -> None:
    assert plot_text("<b>" + "x" * 100, 10) == "&lt;b&gt;xxxxxx…"
    assert short_names(["/a/x/run", "/a/y/run"]) == ["x/run", "y/run"]
    assert short_names(["/a/x", "/a/y"]) == ["x", "y"]


# ---- curves and rows -------------------------------------------------------------------------------------------------


def routed(routing: str, skew: float, *, slower: float = 1.0, penalty: float | None = None) -> Record:
    """A dispatch whose payload's all-to-alls take `slower` times 100 us; with `penalty` a control."""
    params = {"variant": "cached" if penalty is None else "control", "routing": routing}
    base, _, _ = moe(params, 1.0)
    payload = int(1e6 * skew)  # more bytes as well: the time per byte is compared
    subtotals = {"comm_only": total(100 * slower * skew if penalty is None else 100 * penalty)}
    if penalty is not None:
        subtotals["control_comm_only"] = total(100)
    fact = {"max_over_mean_received": skew, "bases": {"rank_dedup": {"remote_bytes": payload}}}
    ratios = {"skew_penalty": penalty} if penalty is not None else {}
    return like(base, facts=[fact], subtotals=subtotals, ratios=ratios)


def total(us: float) -> Subtotal:
    return Subtotal(labels=["dispatch", "combine"], time_us=summarise(np.full(8, us * 1e-6)))


def test_cases_of_one_size_share_a_plot() -> None:
    rows = record_rows([run_of(*(routed(f"zipf:{k}", 1 + k) for k in range(6)))])
    figures = curve_figures(rows, {"run": "run"}, {rows[2].case: {"floor_us": 99.0}})
    assert [figure.id for figure in figures] == ["bandwidth-0", "latency-0"]
    times = figures[1]
    assert times.layout["bars"] == 6
    assert plain(times.layout)["yaxis"]["ticktext"] == [f"routing=zipf:{k}" for k in range(6)]
    assert [(trace["name"], trace["y"]) for trace in times.data[1:]] == [("the profile's floor", [2])]
    # Sizes make it curves again.
    larger = [replace(row, case=f"{row.case} larger", size_bytes=1 << 25) for row in rows]
    curves = curve_figures([*rows, *larger], {"run": "run"}, {})
    assert "bars" not in curves[0].layout


def test_a_curve_has_the_same_colour_in_both_plots() -> None:
    """Also where the first size has no rate: nccl-tests rounds small ones to 0."""
    cases = [collective(nbytes, timing)[0] for nbytes in (8, 1024) for timing in ("pipelined", "graph")]
    records = [like(c, bus_gb_per_s=None) if (c.bytes, c.timing) == (8, "pipelined") else c for c in cases]
    rates, times = curve_figures(record_rows([run_of(*records)]), {"run": "run"}, {})
    colours = [{trace["name"]: trace["line"]["color"] for trace in plain(figure.data)} for figure in (rates, times)]
    assert colours[0] == colours[1]
    assert len(set(colours[0].values())) == 2


def test_no_interval_ends_beyond_its_axis() -> None:
    points = [(100.0, 40.0, 350.0), (None, None, None)]
    assert sorted(set(extent(points))) == [40.0, 100.0, 350.0]
    low, high = plain(log_axis("us", [100.0, 90.0]))["range"]
    assert 10**low < 90
    assert 10**high > 100
    assert "range" not in log_axis("us", extent(points))  # wide enough to be left to plotly, which sees the bars


# ---- skewed routing --------------------------------------------------------------------------------------------------


def test_slowdown_under_skew_of_controls_and_of_others() -> None:
    controls = [routed("uniform", 1.1, penalty=1.0), routed("zipf:1", 2.2, penalty=1.8)]
    cached = [routed("zipf:1", 2.2, slower=1.5), routed("uniform", 1.1)]
    curve, bars = skew_figures(run_of(*controls, *cached), "")
    found = {trace["name"]: list(zip(trace["x"], trace["y"], strict=True)) for trace in plain(curve.data)}
    assert found["variant=control"] == [(1.1, 1.0), (2.2, 1.8)]
    assert found["variant=cached"] == [
        (1.1, 1.0),
        (2.2, 1.5),
    ]  # though it moves twice the bytes in three times the time
    assert found["in proportion"] == [(1, 1), (2.2, 2.2)]
    assert "zipf:1" in curve.alt
    assert [trace["x"] for trace in plain(bars.data)] == [[100, 180], [100, 100]]
    assert plain(bars.layout)["yaxis"]["ticktext"] == ["routing=uniform (1.00)", "routing=zipf:1 (1.80)"]


def test_one_routing_has_no_curve_and_none_has_no_figure() -> None:
    assert [figure.id for figure in skew_figures(run_of(routed("uniform", 1.1, penalty=1.2)), "")] == ["moe-penalty"]
    assert skew_figures(run_of(moe({"variant": "flat"}, 1.0)[0]), "") == []
    failed = like(routed("uniform", 1.1, penalty=1.2), status="failed", time_us=None)
    assert skew_figures(run_of(failed), "") == []


# ---- bounds ----------------------------------------------------------------------------------------------------------


def test_the_bound_of_variants_is_that_of_a_rotation() -> None:
    """A median over iterations of unlike schedules is not the rate of all of them."""
    base, _ = collective(1 << 20)
    times = [summarise(np.full(10, us * 1e-6)) for us in (100, 400)]
    phases = [
        PhaseResult(label=f"round_{k}", ledger=ledger(1), time_us=time_us, bound_us=50.0)
        for k, time_us in enumerate(times)
    ]
    whole = summarise(np.array([100e-6] * 11 + [400e-6] * 9))
    record = like(base, phases=phases, time_us=whole, bus_gb_per_s=4.0)
    assert bounds_of([record])[record.case] == {"bound_us": 50.0, "bound_gb_per_s": pytest.approx(4.0 * 500 / 100)}


# ---- flows and ranks -------------------------------------------------------------------------------------------------


def test_flows_between_pairs_give_no_lateness(tmp_path: Path) -> None:
    """Half of the ranks may be idle in a round: their short durations are no lateness."""
    writer = RunWriter.create(tmp_path / "run", cluster_manifest())
    seconds_RN = seconds_of(1e-4, 20, 1)
    seconds_RN[::2] *= 0.01
    writer.append(flows(), ["total"], seconds_RN[:, :, None])
    run = read_run(tmp_path / "run")
    found = rank_statistics(run, EndpointNames.of(run))
    assert np.isnan(found.late_us_R).all()
    assert "skew" not in [figure.id for figure in rank_figures(found, run, EndpointNames.of(run), "")]
    record, seconds_RN = collective(1024)
    writer.append(record, ["total"], seconds_RN[:, :, None])
    run = read_run(tmp_path / "run")
    found = rank_statistics(run, EndpointNames.of(run))
    assert found.late_us_R.max() < 20
    assert len(found.late_us_R) == WORLD
