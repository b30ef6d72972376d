"""The frame behind every report, raw samples read lazily, and the HTML that is made of them (as text; no browser)."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from ncclbench.config.plugins import load
from ncclbench.errors import UsageError
from ncclbench.importers.common.import_logs import import_logs
from ncclbench.importers.common.imported_cases import Stated
from ncclbench.importers.common.log_file import Log
from ncclbench.store.records import FlowTimes, Record
from ncclbench.store.run_directory import read_run, read_runs
from ncclbench.store.run_writer import RunWriter
from ncclbench.store.samples import lateness, seconds_of_ranks
from ncclbench.store.verdict import read_verdict
from ncclbench_reports.common.across_starts import across_starts, by_date
from ncclbench_reports.common.record_frame import COLUMNS, NAMES, flat_frame, phases_frame, plain_rows
from ncclbench_reports.common.wording import stamps, visible
from ncclbench_reports.html_page.figures import plot_text, short_names
from ncclbench_reports.html_page.flow_heatmaps import flows_of, nic_residuals, percent
from ncclbench_reports.html_page.page import make_page
from ncclbench_reports.html_page.rank_figures import rank_statistics
from ncclbench_reports.html_page.rank_places import Places
from tests.helpers.cluster_runs import (
    HOSTILE,
    SLOW_RANK,
    WORLD,
    cluster_manifest,
    collective,
    flows,
    rich_run,
    small_run,
)
from tests.helpers.paths import FIXTURES
from tests.helpers.stored import like, plain


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    return rich_run(tmp_path / "rich")


# ---- the frame -------------------------------------------------------------------------------------------------------


def test_columns_and_types_are_the_documented_ones(rich: Path) -> None:
    frame = flat_frame([read_run(rich)])
    assert tuple(frame.columns) == NAMES
    assert {name: str(kind) for name, kind in frame.dtypes.items()} == {c.name: c.dtype for c in COLUMNS}


def test_an_empty_frame_has_the_same_columns_and_types(tmp_path: Path) -> None:
    RunWriter.create(tmp_path / "run", cluster_manifest())
    frame = flat_frame([read_run(tmp_path / "run")])
    assert len(frame) == 0
    assert {name: str(kind) for name, kind in frame.dtypes.items()} == {c.name: c.dtype for c in COLUMNS}


def test_the_numbers_are_the_records(rich: Path) -> None:
    run = read_run(rich)
    for row, record in zip(plain_rows(flat_frame([run])), run.records, strict=True):
        assert row["p50_us"] == (record.time_us.p50 if record.time_us else None)
        assert row["skew_max_us"] == (record.skew_us.max if record.skew_us else None)
        assert row["bus_gb_per_s"] == record.bus_gb_per_s
        assert row["sent_cross_rail_bytes"] == (record.ledger.sent_bytes["cross_rail"] if record.ledger else None)
        assert msgspec.json.decode(row["params"]) == record.params


def test_phases_have_their_bytes_and_times(rich: Path) -> None:
    rows = plain_rows(phases_frame([read_run(rich)]))
    (dispatch,) = (row for row in rows if row["phase"] == "dispatch" and "flat" in row["case"])
    assert dispatch["sent_cross_rail_bytes"] == 2 << 20
    assert dispatch["p50_us"] > 0


def test_every_directory_that_cannot_be_read_is_named_in_one_line(tmp_path: Path, rich: Path) -> None:
    (tmp_path / "foreign").mkdir()
    newer, damaged = small_run(tmp_path / "newer"), small_run(tmp_path / "damaged")
    (newer / "manifest.json").write_text(json.dumps(plain(cluster_manifest()) | {"schema": 99}))
    with (damaged / "results.jsonl").open("a") as file:
        file.write('{"schema": 1, "case": \n')
    with pytest.raises(UsageError) as refused:
        read_runs([rich, tmp_path / "foreign", newer, damaged, tmp_path / "absent"])
    message = str(refused.value)
    assert message.startswith("4 of 5 runs cannot be read: ")
    assert "\n" not in message
    for words in ("foreign is no run directory", "schema 99", "results.jsonl, line 8 is damaged", "absent is no run"):
        assert words in message


def test_a_directory_of_runs_names_the_runs_in_it(tmp_path: Path) -> None:
    small_run(tmp_path / "runs" / "a")
    with pytest.raises(UsageError, match=r"it has runs in it: .*runs/a\)"):
        read_runs([tmp_path / "runs"])


# ---- several process starts ------------------------------------------------------------------------------------------


def starts(tmp_path: Path, scales: list[float]) -> list[Path]:
    return [small_run(tmp_path / f"run{k}", scale=scale) for k, scale in enumerate(scales)]


def test_medians_over_starts(tmp_path: Path) -> None:
    runs = read_runs(starts(tmp_path, [1.0, 1.2, 1.1]))
    rows = plain_rows(across_starts(flat_frame(runs)))
    assert len(rows) == 6  # the skipped case has no time
    medians = sorted(record.time_us.p50 for run in runs for record in run.records[:1] if record.time_us)
    first = rows[0]
    assert (first["runs"], first["starts"]) == (3, 3)
    assert first["p50_us"] == medians[1]
    assert (first["p50_min_us"], first["p50_max_us"]) == (medians[0], medians[2])
    assert first["p50_lo_us"] is None  # fewer than 6 starts have no 95% interval
    # The rate at the median time, not the mean of rates.
    assert first["bus_gb_per_s"] == pytest.approx(1024 / medians[1] / 1e3 * 2 * 5 / 6)


def test_six_starts_have_an_interval(tmp_path: Path) -> None:
    rows = plain_rows(across_starts(flat_frame(read_runs(starts(tmp_path, [1, 1.1, 1.2, 1.3, 1.4, 1.5])))))
    assert rows[0]["p50_lo_us"] == rows[0]["p50_min_us"]
    assert rows[0]["p50_hi_us"] == rows[0]["p50_max_us"]


def test_one_start_has_nothing_to_aggregate_and_other_rank_counts_are_other_cases(tmp_path: Path) -> None:
    one = small_run(tmp_path / "one")
    assert across_starts(flat_frame(read_runs([one]))).empty
    other = small_run(tmp_path / "other", device="cuda")
    assert across_starts(flat_frame(read_runs([one, other]))).empty


def test_starts_of_one_run_are_starts(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", cluster_manifest())
    for start in range(2):
        writer.append(collective(1024, start=start, scale=1 + start)[0])
    run = read_run(tmp_path / "run")
    assert [record.start for record in run.records] == [0, 1]
    (row,) = plain_rows(across_starts(flat_frame([run])))
    assert (row["runs"], row["starts"]) == (1, 2)
    assert "over process starts" in load("reports", "table").render([run])


def test_trends_go_by_date(tmp_path: Path) -> None:
    for name, day in (("late", "2026-02-01"), ("early", "2026-01-01")):
        RunWriter.create(tmp_path / name, cluster_manifest()).append(collective(1024, started=f"{day}T00:00:00Z")[0])
    frame = by_date(flat_frame(read_runs([tmp_path / "late", tmp_path / "early"])))
    assert [Path(run).name for run in frame["run"]] == ["early", "late"]


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_samples_come_back_by_phase(rich: Path) -> None:
    run = read_run(rich)
    record = next(record for record in run.records if record.pattern == "moe_dispatch")
    total, dispatch = (seconds_of_ranks(run, record, phase) for phase in ("total", "dispatch"))
    assert total is not None
    assert dispatch is not None
    assert total.shape == (WORLD, 40)
    np.testing.assert_allclose(dispatch, 0.45 * total)
    assert seconds_of_ranks(run, record, "nothing") is None
    assert record.time_us is not None
    assert np.median(total.max(axis=0)) * 1e6 == pytest.approx(record.time_us.p50)


def test_only_the_named_columns_are_read(rich: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    read = pq.read_table

    def noted(*arguments: Any, **options: Any) -> Any:
        asked.append(options["columns"])
        return read(*arguments, **options)

    monkeypatch.setattr(pq, "read_table", noted)
    run = read_run(rich)
    assert asked == []  # reading a run reads no samples
    seconds_of_ranks(run, run.records[0])
    assert asked == [["rank", "iteration", "phase", "seconds"]]


def spoiled(record: Record, run: Path, how: str) -> Record:
    assert record.samples is not None
    file = run / record.samples
    if how == "outside":
        return like(record, samples="../elsewhere.parquet")
    if how == "absolute":
        return like(record, samples="/etc/passwd")
    if how == "missing":
        file.unlink()
    if how == "damaged":
        file.write_bytes(file.read_bytes()[:200])
    if how == "no parquet":
        file.write_text("rank,iteration")
    if how == "more ranks":
        return like(record, world_size=2)
    return record


@pytest.mark.parametrize("how", ["outside", "absolute", "missing", "damaged", "no parquet", "more ranks"])
def test_samples_that_cannot_be_read_are_one_line_and_do_not_stop_the_report(how: str, rich: Path) -> None:
    run = read_run(rich)
    record = spoiled(run.records[0], rich, how)
    with pytest.raises(UsageError) as refused:
        seconds_of_ranks(run, record)
    assert "\n" not in str(refused.value)
    (rich / "results.jsonl").write_bytes(b"".join(msgspec.json.encode(r) + b"\n" for r in (record, *run.records[1:])))
    (card,) = make_page([read_run(rich)]).cards
    assert any(visible(str(refused.value)) == warning for warning in card.warnings)


def test_the_rank_that_comes_last_has_the_shortest_duration() -> None:
    seconds_RN = np.array([[10e-6, 10e-6], [10e-6, 12e-6], [4e-6, 4e-6]])
    np.testing.assert_allclose(lateness(seconds_RN) * 1e6, [1, 0, 7])


def test_rank_statistics_find_the_slow_rank(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", cluster_manifest())
    record, seconds_RN = collective(1 << 20)
    seconds_RN[SLOW_RANK] *= 1.5
    writer.append(record, ["total"], seconds_RN[:, :, None])
    run = read_run(tmp_path / "run")
    found = rank_statistics(run, Places.of(run))
    assert int(np.argmax(found.residual_R)) == SLOW_RANK
    assert percent(float(found.residual_R[SLOW_RANK])) == pytest.approx(50, abs=5)


# ---- flows -----------------------------------------------------------------------------------------------------------


def test_flows_are_rates_and_what_never_ended_is_unknown() -> None:
    found = flows_of(flows(1 << 20), WORLD)
    assert found is not None
    assert len(found.src_F) == 24
    assert found.gb_per_s_F[0] == pytest.approx((1 << 20) / 100.2 / 1e3)
    assert np.isnan(found.gb_per_s_F[-1])


def test_the_slow_nic_is_named(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", cluster_manifest())
    writer.append(flows())
    run = read_run(tmp_path / "run")
    nics = nic_residuals(run, Places.of(run))
    slow = min(nics, key=lambda nic: nic.send)
    assert slow.name == "n1 rail 1 rail1"
    assert percent(slow.send) == pytest.approx(-50, abs=2)
    assert abs(percent(slow.receive)) < 2
    assert slow.peers == 4
    assert all(abs(percent(nic.send)) < 2 for nic in nics if nic is not slow)


@pytest.mark.parametrize("flows_field", [{"src": [0]}, {"src": [99], "dst": [0], "nbytes": [1], "p50_us": [1]}, {}])
def test_damaged_flows_are_no_flows(flows_field: dict[str, Any]) -> None:
    record = flows()
    phase = msgspec.structs.replace(record.phases[0], flows=msgspec.convert(flows_field, FlowTimes))
    assert flows_of(like(record, phases=[phase]), WORLD) is None


# ---- the page --------------------------------------------------------------------------------------------------------


def html(*runs: Path) -> str:
    text = load("reports", "html").render([read_run(run) for run in runs])
    assert isinstance(text, str)
    return text


def island(text: str, key: str) -> Any:
    match = re.search(rf'<script type="application/json" id="{key}">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def own(text: str) -> str:
    """The page without plotly.js."""
    return re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)


def test_the_verdict_stands_before_everything_else(rich: Path) -> None:
    text = own(html(rich))
    places = [text.index(what) for what in ('class="word">FAIL', "n1 rail 1 sends", "What was measured", 'id="curves"')]
    assert places == sorted(places)
    for stamp in ("CPU only: proves logic, not a fabric", "redacted"):
        assert f"<li>{stamp}</li>" in text


def test_a_run_that_nobody_judged_says_so(tmp_path: Path) -> None:
    text = html(rich_run(tmp_path / "run", word=None))
    assert "no verdict: this run was measured, not judged" in text
    assert 'class="verdict none"' in text


@pytest.mark.parametrize("content", ["{", '{"schema": 2, "verdict": "PASS"}', '{"schema": 1, "verdict": "GOOD"}'])
def test_a_verdict_that_cannot_be_read_is_not_no_verdict(content: str, rich: Path) -> None:
    (rich / "verdict.json").write_text(content)
    with pytest.raises(UsageError, match=r"verdict\.json"):
        read_verdict(rich)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"device": "cpu"}, ["CPU only: proves logic, not a fabric"]),
        ({"device": "cuda", "transport": "nccl"}, []),
        ({"device": "cpu", "transport": "model"}, ["simulated"]),
        ({"device": "cuda", "redacted": True}, ["redacted"]),
        ({"device": "cuda", "provenance": {"transport": {"ranks_per_gpu": 1}}}, []),
        (
            {"device": "cuda", "provenance": {"transport": {"ranks_per_gpu": 2}}},
            ["ranks share GPUs: proves logic, not a fabric"],
        ),
        (
            {"device": "cuda", "ranks": [{"host": "n0", "boot": "b"}, {"host": "n1", "boot": "b"}]},
            ["nodes of one machine: proves logic, not a fabric"],
        ),
        ({"device": "cuda", "ranks": [{"host": "n0", "boot": "b"}, {"host": "n0", "boot": "b"}]}, []),
        ({"device": "cuda", "ranks": [{"host": "n0", "boot": "b"}, {"host": "n1", "boot": "c"}]}, []),
        ({"device": "cuda", "ranks": [{"host": "n0", "boot": ""}, {"host": "n1", "boot": ""}]}, []),
    ],
)
def test_stamps(fields: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    run = read_run(small_run(tmp_path / "run", **fields))
    assert stamps(run, None) == expected
    for stamp in expected:
        assert f"<li>{stamp}</li>" in html(tmp_path / "run")


def test_an_imported_run_is_stamped_with_its_tool(tmp_path: Path) -> None:
    log = FIXTURES / "nccl-tests" / "all_reduce.txt"
    import_logs([Log.open(log)], tmp_path / "run", Stated(), None, ["import"])
    assert stamps(read_run(tmp_path / "run"), None) == ["imported from nccl-tests 2.19.6"]
    assert "<li>imported from nccl-tests 2.19.6</li>" in html(tmp_path / "run")


def test_nothing_is_fetched(rich: Path) -> None:
    text = own(html(rich))
    assert "default-src 'none'" in text
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", text)
    assert "@import" not in text
    assert "url(" not in text
    assert len(text) < 2_000_000


def test_hostile_names_are_text_everywhere(tmp_path: Path) -> None:
    run = rich_run(tmp_path / "run", hosts=("n0", HOSTILE, "=cmd"))
    text = own(html(run))
    assert "<script>alert" not in text
    assert "\u202e" not in text
    assert "&lt;script&gt;alert" in text
    figures = json.dumps(island(text, "figure-data"))
    assert "<script" not in figures
    assert "&lt;script&gt;alert" in figures


def test_without_escaping_a_hostile_name_would_get_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation that the test before must catch."""
    monkeypatch.setattr("ncclbench_reports.html_page.flow_heatmaps.plot_text", lambda text, _limit=0: str(text))
    text = own(html(rich_run(tmp_path / "run", hosts=("n0", HOSTILE, "n2"))))
    assert "<script" in json.dumps(island(text, "figure-data"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u202eb", "a\\u202eb"),
        ("a\x00\n\tb", "a\\u0000\\u000a\\u0009b"),
        ("zero\u200bwidth", "zero\\u200bwidth"),
        ("schön 北京", "schön 北京"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_cannot_be_seen_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_names_in_plots_are_cut_and_escaped() -> None:
    assert plot_text("<b>" + "x" * 100, 10) == "&lt;b&gt;xxxxxx…"
    assert short_names(["/a/x/run", "/a/y/run"]) == ["x/run", "y/run"]
    assert short_names(["/a/x", "/a/y"]) == ["x", "y"]


def test_every_figure_has_a_place_an_alternative_and_data(rich: Path, tmp_path: Path) -> None:
    other = rich_run(tmp_path / "other", word=None)
    page = make_page(read_runs([rich, other]))
    ids = [figure.id for figure in page.figures]
    assert len(ids) == len(set(ids))
    assert len({table.id for table in page.tables}) == len(page.tables)
    for figure in page.figures:
        assert len(figure.alt) > 40
        assert figure.data
    for words in (
        "rail",
        "leaves",
        "nics",
        "nic-residuals",
        "rank-residuals",
        "skew",
        "ecdf",
        "phases",
        "bytes",
        "trend",
    ):
        assert any(words in key for key in ids), words


def test_the_floor_and_the_bound_are_drawn(rich: Path) -> None:
    names = {t["name"]: t for f in make_page(read_runs([rich])).figures for t in f.data if "name" in t}
    assert names["the profile's floor"]["y"] == [2.0]
    assert names["bound"]["y"] == [80.0]


def test_ratios_and_sums_of_phases_have_tables(rich: Path) -> None:
    tables = {table.id: table for table in make_page(read_runs([rich])).tables}
    assert [row[1:] for row in tables["ratios"].rows] == [["skew_penalty", "1.25"]] * 3
    assert {row[2] for row in tables["subtotals"].rows} == {"dispatch, combine"}


def test_phases_that_take_turns_are_not_stacked(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", cluster_manifest())
    base = flows()
    assert base.time_us is not None
    half = msgspec.structs.replace(base.time_us, n=base.time_us.n // 2)
    turns = [msgspec.structs.replace(base.phases[0], label=f"round={k}", time_us=half) for k in range(2)]
    writer.append(like(base, phases=turns))
    page = make_page([read_run(tmp_path / "run")])
    assert not [figure for figure in page.figures if figure.id.startswith(("phases", "bytes"))]
    bound = next(t for f in page.figures if f.id == "latency-0" for t in f.data if t["name"] == "bound")
    assert bound["y"] == [80.0]  # of one round, not of both


ODD_MANIFESTS: list[dict[str, Any]] = [
    {"topology": {}, "plan": {}, "provenance": {}},
    {"topology": {"nodes": [0, 1], "rails": [], "node_names": []}},
    {"topology": {"nodes": [-1] * 6, "wiring": {"leaves": [None] * 6}}},
]


@pytest.mark.parametrize("fields", ODD_MANIFESTS)
def test_a_manifest_that_says_little_is_still_shown(fields: dict[str, Any], tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", **fields)
    assert 'id="rank-residuals"' in html(run).replace("fig-", "")
    for fmt in ("table", "json", "markdown", "csv"):
        assert load("reports", fmt).render([read_run(run)])


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_suffix_decides_and_what_was_there_stays_until_all_is_written(
    rich: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ncclbench.cli import main

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["ncclbench", "report", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0), capsys.readouterr().err

    starts_with: dict[str, bytes] = {
        "html": b"<!doctype",
        "csv": b"run,",
        "json": b"{",
        "parquet": b"PAR1",
        "txt": b"# ",
    }
    for suffix, head in starts_with.items():
        out = tmp_path / f"report.{suffix}"
        assert call(str(rich), "-o", str(out)) == (0, "")
        assert out.read_bytes().startswith(head)
    before = (tmp_path / "report.csv").read_bytes()
    replaced: list[Path] = []
    replace: Callable[..., Path] = Path.replace

    def failing(_: Path, target: Path) -> Path:
        replaced.append(target)
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", failing)
    code, err = call(str(rich), "--format", "json", "-o", str(tmp_path / "report.csv"))
    monkeypatch.setattr(Path, "replace", replace)
    assert code == 2
    assert "disk full" in err
    assert replaced
    assert (tmp_path / "report.csv").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    code, err = call(str(rich), str(rich.parent / "." / rich.name))
    assert code == 2
    assert "is named twice" in err
