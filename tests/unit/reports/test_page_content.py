"""The HTML report: its cards, sections and tables, and the page as text; no browser."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ncclbench.config.plugins import load
from ncclbench.errors import UsageError
from ncclbench.store.records import Record
from ncclbench.store.run_directory import read_run, read_runs
from ncclbench.store.run_writer import RunWriter
from ncclbench.store.samples import seconds_of_ranks
from ncclbench.store.verdict import read_verdict
from ncclbench_reports.common.text_format import visible
from ncclbench_reports.html_page.page_content import page_of
from ncclbench_reports.html_page.tables import DataTable, TableColumn
from tests.helpers.cluster_runs import (
    HOSTILE,
    cluster_manifest,
    flows,
    rich_run,
    small_run,
    verdict,
)
from tests.helpers.rendered import html, inline_data, without_plotly
from tests.helpers.stored import like


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    return rich_run(tmp_path / "rich")


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_verdict_comes_first(rich: Path) -> None:
    text = without_plotly(html(rich))
    ordered = ('class="word">FAIL', "n1 rail 1 sends", "What was measured", 'id="curves"')
    offsets = [text.index(words) for words in ordered]
    assert offsets == sorted(offsets)
    for stamp in ("CPU only: proves logic, not a fabric", "redacted"):
        assert f"<li>{stamp}</li>" in text


def test_a_run_without_verdict_says_so(tmp_path: Path) -> None:
    text = html(rich_run(tmp_path / "run", word=None))
    assert "no verdict: this run was measured, not judged" in text
    assert 'class="verdict none"' in text


@pytest.mark.parametrize("content", ["{", '{"schema": 2, "verdict": "PASS"}', '{"schema": 1, "verdict": "GOOD"}'])
def test_an_unreadable_verdict_is_an_error(content: str, rich: Path) -> None:
    (rich / "verdict.json").write_text(content)
    with pytest.raises(UsageError, match=r"verdict\.json"):
        read_verdict(rich)


def test_nothing_is_fetched(rich: Path) -> None:
    text = without_plotly(html(rich))
    assert "default-src 'none'" in text
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", text)
    assert "@import" not in text
    assert "url(" not in text
    assert len(text) < 2_000_000


def test_hostile_names_are_text_everywhere(tmp_path: Path) -> None:
    run = rich_run(tmp_path / "run", hosts=("n0", HOSTILE, "=cmd"))
    text = without_plotly(html(run))
    assert "<script>alert" not in text
    assert "\u202e" not in text
    assert "&lt;script&gt;alert" in text
    figures = json.dumps(inline_data(text, "figure-data"))
    assert "<script" not in figures
    assert "&lt;script&gt;alert" in figures


def test_the_hostile_name_test_notices_missing_escapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation that the test before must catch."""
    monkeypatch.setattr("ncclbench_reports.html_page.flow_heatmaps.plot_text", lambda text, _limit=0: str(text))
    text = without_plotly(html(rich_run(tmp_path / "run", hosts=("n0", HOSTILE, "n2"))))
    assert "<script" in json.dumps(inline_data(text, "figure-data"))


SPARSE_MANIFESTS: list[dict[str, Any]] = [
    {"topology": {}, "plan": {}, "provenance": {}},
    {"topology": {"nodes": [0, 1], "rails": [], "node_names": []}},
    {"topology": {"nodes": [-1] * 6, "wiring": {"leaves": [None] * 6}}},
]


@pytest.mark.parametrize("fields", SPARSE_MANIFESTS)
def test_a_sparse_manifest_is_still_shown(fields: dict[str, Any], tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", **fields)
    assert 'id="rank-residuals"' in html(run).replace("fig-", "")
    for fmt in ("table", "json", "markdown", "csv"):
        assert load("reports", fmt).render([read_run(run)])


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
def test_unreadable_samples_are_a_warning_of_the_page(how: str, rich: Path) -> None:
    run = read_run(rich)
    record = spoiled(run.records[0], rich, how)
    with pytest.raises(UsageError) as refused:
        seconds_of_ranks(run, record)
    assert "\n" not in str(refused.value)
    (rich / "results.jsonl").write_bytes(b"".join(msgspec.json.encode(r) + b"\n" for r in (record, *run.records[1:])))
    (card,) = page_of([read_run(rich)]).cards
    assert any(visible(str(refused.value)) == warning for warning in card.warnings)


# ---- cards -----------------------------------------------------------------------------------------------------------


def test_the_card_names_the_deciding_check_and_counts(tmp_path: Path) -> None:
    (card,) = page_of([read_run(rich_run(tmp_path / "run"))]).cards
    assert card.reasons[-1] == "fleet, n1 rail 1: 50% below its peers"
    assert card.starts == "3 of 3 process starts. Checks: 1 failed, 1 inconclusive, 1 not run, 1 passed"


def test_a_part_at_fault_in_many_cases_is_named_once(tmp_path: Path) -> None:
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
    (card,) = page_of([read_run(path)]).cards
    assert card.reasons[1:] == [
        "fleet, same_rail/1: send side of rank 3 takes twice as long (and in 2 more cases)",
        "fleet, same_rail/1: send side of rank 5 takes twice as long",
    ]
    assert card.actions == [
        "CHECK_CABLE: send side of rank 3 (and in 2 more cases)",
        "CHECK_CABLE: send side of rank 5",
    ]


def test_a_stamp_is_shown_once(tmp_path: Path) -> None:
    path = rich_run(tmp_path / "run")
    file = path / "verdict.json"
    file.write_text(file.read_text().replace('"cpu only"', '"proves logic, not a fabric", "cpu only"'))
    assert page_of([read_run(path)]).stamps == ["CPU only: proves logic, not a fabric", "redacted"]


# ---- figures and tables ----------------------------------------------------------------------------------------------


def test_every_figure_has_an_id_a_description_and_data(rich: Path, tmp_path: Path) -> None:
    other = rich_run(tmp_path / "other", word=None)
    page = page_of(read_runs([rich, other]))
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
    names = {t["name"]: t for f in page_of(read_runs([rich])).figures for t in f.data if "name" in t}
    assert names["the profile's floor"]["y"] == [2.0]
    assert names["bound"]["y"] == [80.0]


def test_ratios_and_sums_of_phases_have_tables(rich: Path) -> None:
    tables = {table.id: table for table in page_of(read_runs([rich])).tables}
    assert [row[1:] for row in tables["ratios"].rows] == [["skew_penalty", "1.25"]] * 3
    assert {row[2] for row in tables["subtotals"].rows} == {"dispatch, combine"}


def test_rotating_phases_are_not_stacked(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", cluster_manifest())
    base = flows()
    assert base.time_us is not None
    half = msgspec.structs.replace(base.time_us, n=base.time_us.n // 2)
    turns = [msgspec.structs.replace(base.phases[0], label=f"round={k}", time_us=half) for k in range(2)]
    writer.append(like(base, phases=turns))
    page = page_of([read_run(tmp_path / "run")])
    assert not [figure for figure in page.figures if figure.id.startswith(("phases", "bytes"))]
    bound = next(t for f in page.figures if f.id == "latency-0" for t in f.data if t["name"] == "bound")
    assert bound["y"] == [80.0]  # of one round, not of both


def test_empty_columns_are_left_out() -> None:
    columns = [TableColumn("a"), TableColumn("b", number=True), TableColumn("c")]
    table = DataTable(id="t", title="", caption="", columns=columns, rows=[["x", "", "1"], ["", "", "2"]]).trimmed()
    assert [column.title for column in table.columns] == ["a", "c"]
    assert table.rows == [["x", "1"], ["", "2"]]
