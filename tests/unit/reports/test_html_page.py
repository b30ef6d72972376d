"""What the HTML report is made of, as data: names, plots of skewed routing, bounds, reasons, and what a figure is."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ncclbench.analysis.summary import summarise
from ncclbench.config.plugins import load
from ncclbench.store.records import OriginRecord, PhaseResult, Record, Subtotal
from ncclbench.store.run_directory import Run, read_run
from ncclbench.store.run_writer import RunWriter
from ncclbench_reports.common.record_frame import flat_frame, plain_rows
from ncclbench_reports.html_page.case_labels import Facets, short_labels
from ncclbench_reports.html_page.curves import bounds_of, curve_figures
from ncclbench_reports.html_page.figures import extent, log_axis
from ncclbench_reports.html_page.page import make_page
from ncclbench_reports.html_page.rank_figures import rank_figures, rank_statistics
from ncclbench_reports.html_page.rank_places import Places
from ncclbench_reports.html_page.routing_skew import skew_figures
from ncclbench_reports.html_page.tables import DataTable, TableColumn
from tests.helpers.cluster_runs import (
    WORLD,
    cluster_manifest,
    collective,
    flows,
    ledger,
    moe,
    rich_run,
    seconds_of,
    verdict,
)
from tests.helpers.paths import SCRIPTS
from tests.helpers.stored import like


def run_of(*records: Record) -> Run:
    return Run(Path("run"), cluster_manifest(), records, ())


# ---- names -----------------------------------------------------------------------------------------------------------


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
def test_a_short_name_is_what_tells_cases_apart(cases: list[Facets], labels: list[str]) -> None:
    assert short_labels(cases) == labels


# ---- plots of one size -----------------------------------------------------------------------------------------------


def routed(routing: str, skew: float, *, slower: float = 1.0, penalty: float | None = None) -> Record:
    """A dispatch whose payload's all-to-alls take `slower` times 100 us; with `penalty` a control."""
    params = {"variant": "cached" if penalty is None else "control", "routing": routing}
    base, _, _ = moe(params, 1.0)
    payload = int(1e6 * skew)  # more bytes as well: what is compared is the time a byte
    subtotals = {"comm_only": total(100 * slower * skew if penalty is None else 100 * penalty)}
    if penalty is not None:
        subtotals["control_comm_only"] = total(100)
    fact = {"max_over_mean_received": skew, "bases": {"rank_dedup": {"remote_bytes": payload}}}
    ratios = {"skew_penalty": penalty} if penalty is not None else {}
    return like(base, facts=[fact], subtotals=subtotals, ratios=ratios)


def total(us: float) -> Subtotal:
    return Subtotal(labels=["dispatch", "combine"], time_us=summarise(np.full(8, us * 1e-6)))


def test_cases_of_one_size_share_a_plot_with_a_row_each() -> None:
    rows = plain_rows(flat_frame([run_of(*(routed(f"zipf:{k}", 1 + k) for k in range(6)))]))
    figures = curve_figures(rows, {"run": "run"}, {rows[2]["case"]: {"floor_us": 99.0}})
    assert [figure.id for figure in figures] == ["bandwidth-0", "latency-0"]
    times = figures[1]
    assert times.layout["bars"] == 6
    assert times.layout["yaxis"]["ticktext"] == [f"routing=zipf:{k}" for k in range(6)]
    assert [(trace["name"], trace["y"]) for trace in times.data[1:]] == [("the profile's floor", [2])]
    # Sizes make it curves again.
    larger = [{**row, "case": f"{row['case']} larger", "size_bytes": 1 << 25} for row in rows]
    curves = curve_figures([*rows, *larger], {"run": "run"}, {})
    assert "bars" not in curves[0].layout


def test_a_curve_has_the_same_colour_in_both_plots() -> None:
    """Also where the first size has no rate: nccl-tests rounds small ones to 0."""
    cases = [collective(nbytes, timing)[0] for nbytes in (8, 1024) for timing in ("pipelined", "graph")]
    records = [like(c, bus_gb_per_s=None) if (c.bytes, c.timing) == (8, "pipelined") else c for c in cases]
    rates, times = curve_figures(plain_rows(flat_frame([run_of(*records)])), {"run": "run"}, {})
    colours = [{trace["name"]: trace["line"]["color"] for trace in figure.data} for figure in (rates, times)]
    assert colours[0] == colours[1]
    assert len(set(colours[0].values())) == 2


def test_no_interval_ends_beyond_its_axis() -> None:
    trace = {"y": [100.0, None], "error_y": {"array": [250.0, None], "arrayminus": [60.0, None]}}
    assert sorted(set(extent([trace], "y"))) == [40.0, 100.0, 350.0]
    low, high = log_axis("us", [100.0, 90.0])["range"]
    assert 10**low < 90
    assert 10**high > 100
    assert "range" not in log_axis("us", extent([trace], "y"))  # wide enough to be left to plotly, which sees the bars


# ---- skewed routing --------------------------------------------------------------------------------------------------


def test_slowdown_under_skew_is_the_penalty_or_the_time_a_byte_of_the_least_skewed() -> None:
    controls = [routed("uniform", 1.1, penalty=1.0), routed("zipf:1", 2.2, penalty=1.8)]
    cached = [routed("zipf:1", 2.2, slower=1.5), routed("uniform", 1.1)]
    curve, bars = skew_figures(run_of(*controls, *cached), "")
    found = {trace["name"]: list(zip(trace["x"], trace["y"], strict=True)) for trace in curve.data}
    assert found["variant=control"] == [(1.1, 1.0), (2.2, 1.8)]
    assert found["variant=cached"] == [
        (1.1, 1.0),
        (2.2, 1.5),
    ]  # though it moves twice the bytes in three times the time
    assert found["in proportion"] == [(1, 1), (2.2, 2.2)]
    assert "zipf:1" in curve.alt
    assert [trace["x"] for trace in bars.data] == [[100, 180], [100, 100]]
    assert bars.layout["yaxis"]["ticktext"] == ["routing=uniform (1.00)", "routing=zipf:1 (1.80)"]


def test_one_routing_has_no_curve_and_none_has_no_figure() -> None:
    assert [figure.id for figure in skew_figures(run_of(routed("uniform", 1.1, penalty=1.2)), "")] == ["moe-penalty"]
    assert skew_figures(run_of(moe({"variant": "flat"}, 1.0)[0]), "") == []
    failed = like(routed("uniform", 1.1, penalty=1.2), status="failed", time_us=None)
    assert skew_figures(run_of(failed), "") == []


# ---- bounds ----------------------------------------------------------------------------------------------------------


def test_the_bound_of_schedules_that_take_turns_is_that_of_a_rotation() -> None:
    """The median over iterations of unlike schedules says nothing of the rate of all of them."""
    base, _ = collective(1 << 20)
    times = [summarise(np.full(10, us * 1e-6)) for us in (100, 400)]
    phases = [
        PhaseResult(label=f"round_{k}", ledger=ledger(1), time_us=time_us, bound_us=50.0)
        for k, time_us in enumerate(times)
    ]
    whole = summarise(np.array([100e-6] * 11 + [400e-6] * 9))
    record = like(base, phases=phases, time_us=whole, bus_gb_per_s=4.0)
    assert bounds_of([record])[record.case] == {"bound_us": 50.0, "bound_gb_per_s": pytest.approx(4.0 * 500 / 100)}


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_card_says_what_decided_and_how_many_checks_did_not_run(tmp_path: Path) -> None:
    (card,) = make_page([read_run(rich_run(tmp_path / "run"))]).cards
    assert card.reasons[-1] == "fleet, n1 rail 1: 50% below its peers"
    assert card.starts == "3 of 3 process starts. Checks: 1 failed, 1 inconclusive, 1 not run, 1 passed"


def test_who_is_blamed_in_many_cases_is_named_once(tmp_path: Path) -> None:
    path = rich_run(tmp_path / "run")
    checks = [
        {
            "check": "fleet",
            "subject": f"same_rail/{nbytes}: send side of rank {rank}",
            "verdict": "FAIL",
            "reason": f"send side of rank {rank} takes twice as long",
            "action": "CHECK_CABLE",
        }
        for nbytes, rank in ((1, 3), (2, 3), (4, 3), (1, 5))
    ]
    (path / "verdict.json").write_text(json.dumps({**verdict(), "checks": checks}))
    (card,) = make_page([read_run(path)]).cards
    assert card.reasons[1:] == [
        "fleet, same_rail/1: send side of rank 3 takes twice as long (and in 2 more cases)",
        "fleet, same_rail/1: send side of rank 5 takes twice as long",
    ]
    assert card.actions == [
        "CHECK_CABLE: send side of rank 3 (and in 2 more cases)",
        "CHECK_CABLE: send side of rank 5",
    ]


def test_a_stamp_is_not_said_twice(tmp_path: Path) -> None:
    path = rich_run(tmp_path / "run")
    file = path / "verdict.json"
    file.write_text(file.read_text().replace('"cpu only"', '"proves logic, not a fabric", "cpu only"'))
    assert make_page([read_run(path)]).stamps == ["CPU only: proves logic, not a fabric", "redacted"]


def test_columns_that_say_nothing_are_left_out() -> None:
    columns = [TableColumn("a"), TableColumn("b", number=True), TableColumn("c")]
    table = DataTable(id="t", title="", caption="", columns=columns, rows=[["x", "", "1"], ["", "", "2"]]).trimmed()
    assert [column.title for column in table.columns] == ["a", "c"]
    assert table.rows == [["x", "1"], ["", "2"]]


def test_flows_between_pairs_tell_nothing_of_arrival(tmp_path: Path) -> None:
    """Half of the ranks may be idle in a round: their short durations are no lateness."""
    writer = RunWriter.create(tmp_path / "run", cluster_manifest())
    seconds_RN = seconds_of(1e-4, 20, 1)
    seconds_RN[::2] *= 0.01
    writer.append(flows(), ["total"], seconds_RN[:, :, None])
    run = read_run(tmp_path / "run")
    found = rank_statistics(run, Places.of(run))
    assert np.isnan(found.late_us_R).all()
    assert "skew" not in [figure.id for figure in rank_figures(found, Places.of(run), "")]
    record, seconds_RN = collective(1024)
    writer.append(record, ["total"], seconds_RN[:, :, None])
    run = read_run(tmp_path / "run")
    found = rank_statistics(run, Places.of(run))
    assert found.late_us_R.max() < 20
    assert len(found.late_us_R) == WORLD


# ---- what a figure is ------------------------------------------------------------------------------------------------


def single(**fields: Any) -> Record:
    record, _ = collective(1024, imported=OriginRecord(source=0, tool="nccl-tests", version="2.19.6"), **fields)
    return like(record, time_us=summarise(np.array([1e-4])))


@pytest.mark.parametrize(
    ("records", "kinds", "words"),
    [
        ([collective(1024)[0]], ["median"], "time is the median over iterations of the slowest rank"),
        ([single()], ["mean"], "time is a mean over launches, as the log has it"),
        (
            [single(), like(collective(64)[0], imported=OriginRecord(source=0, tool="nccl-tests"))],
            ["mean", "median"],
            "where n is 1",
        ),
        ([like(collective(64)[0], time_us=None)], [None], "median over iterations"),
    ],
)
def test_every_format_says_whether_a_figure_is_a_median_or_a_logs_mean(
    records: list[Record], kinds: list[str | None], words: str
) -> None:
    sources = [{"tool": "nccl-tests", "version": "2.19.6", "file": "x.txt"}] if "mean" in kinds else []
    run = Run(Path("run"), cluster_manifest(imported=sources), tuple(records), ())
    assert [row["time_is"] for row in plain_rows(flat_frame([run]))] == kinds
    texts = {fmt: str(load("reports", fmt).render([run])) for fmt in ("table", "markdown", "prometheus", "junit")}
    assert words in texts["table"]
    assert words in texts["markdown"]
    assert ('time_is="mean"' in texts["prometheus"]) is ("mean" in kinds)
    assert ('name="time_is" value="mean"' in texts["junit"]) is ("mean" in kinds)
    page = make_page([run])
    assert words in page.times[:1].lower() + page.times[1:]
    if kinds == ["mean"]:
        assert "edian" not in texts["table"] + texts["markdown"] + page.times
        intro = next(section.intro for section in page.sections if section.id == "curves")
        assert intro.startswith("Means over launches")


# ---- the scale benchmark ---------------------------------------------------------------------------------------------


def test_the_scale_benchmark_tells_linear_from_superlinear() -> None:
    path = SCRIPTS / "benchmarks" / "report_scale.py"
    spec = importlib.util.spec_from_file_location("report_scale", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = [128_000, 1_024_000, 4_096_000, 16_384_000]
    fixed, marginal = module.fixed_and_marginal({n: 0.8 + 1e-7 * n for n in sizes})
    assert (fixed, marginal) == (pytest.approx(0.8), pytest.approx(1e-7))
    lower, upper = module.marginal_halves({n: 0.8 + 1e-7 * n for n in sizes})
    assert upper == pytest.approx(lower)
    lower, upper = module.marginal_halves({n: 0.8 + 1e-14 * n**2 for n in sizes})
    assert upper > 1.5 * lower + 30e-9
