"""Every text format against a stored text, all formats with the same numbers, and text from outside that stays text.

After a deliberate change: ``UPDATE_GOLDEN=1 pytest tests/unit/reports/test_formats.py``, then look at the difference.
"""

import csv
import io
import json
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from ncclbench import __version__
from ncclbench.analysis.summary import summarise
from ncclbench.config.plugins import load, names
from ncclbench.store.export_writers import csv_text
from ncclbench.store.records import ComparableRate, OriginRecord, Record
from ncclbench.store.run_directory import Run, read_run
from ncclbench.store.run_writer import RunWriter
from ncclbench_reports.common.record_rows import COLUMNS, record_rows
from ncclbench_reports.html_page.page_content import page_of
from ncclbench_reports.html_page.tables import results_table
from tests.helpers.cluster_runs import (
    CASE,
    HOSTILE,
    cluster_manifest,
    collective,
    rich_run,
    small_run,
)
from tests.helpers.paths import DOCS, TESTS
from tests.helpers.rendered import rendered
from tests.helpers.stored import like, manifest

GOLDEN = TESTS / "unit" / "reports" / "golden"
TEXT_FORMATS = {"table": "txt", "csv": "csv", "json": "json", "markdown": "md", "junit": "xml", "prometheus": "prom"}
FIGURES = [column.name for column in COLUMNS if column.dtype in ("Float64", "Int64")]
FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1"]


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run that is kept in the repository, named as a user in its directory names it."""
    monkeypatch.chdir(GOLDEN)
    return read_run(Path("run-v1"))


@pytest.mark.parametrize("fmt", sorted(TEXT_FORMATS))
def test_text_formats_are_unchanged(fmt: str, stored: Run) -> None:
    text = str(rendered(fmt, stored)).rstrip("\n").replace(__version__, "VERSION") + "\n"
    file = GOLDEN / f"report.{TEXT_FORMATS[fmt]}"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


# ---- the same numbers in all -----------------------------------------------------------------------------------------


@pytest.fixture
def rich(tmp_path: Path) -> Run:
    return read_run(rich_run(tmp_path / "rich"))


def numbers_of_csv(run: Run) -> list[dict[str, float | None]]:
    rows = csv.DictReader(io.StringIO(rendered("csv", run)))
    return [{name: float(row[name]) if row[name] else None for name in FIGURES} for row in rows]


def numbers_of_json(run: Run) -> list[dict[str, float | None]]:
    return [{name: row[name] for name in FIGURES} for row in json.loads(rendered("json", run))["results"]]


def numbers_of_parquet(run: Run) -> list[dict[str, float | None]]:
    rows = pq.read_table(io.BytesIO(rendered("parquet", run))).to_pylist()
    return [{name: row[name] for name in FIGURES} for row in rows]


def numbers_of_junit(run: Run) -> list[dict[str, float | None]]:
    cases = [
        case for case in ET.fromstring(rendered("junit", run)).iter("testcase") if case.find("properties") is not None
    ]
    properties = [{p.get("name"): float(p.get("value") or "nan") for p in case.iter("property")} for case in cases]
    return [{name: one.get(name) for name in FIGURES} for one in properties]


@pytest.mark.parametrize("read", [numbers_of_csv, numbers_of_parquet, numbers_of_junit])
def test_the_same_numbers_in_all_formats(read: Callable[[Run], Any], rich: Run) -> None:
    expected = numbers_of_json(rich)
    assert any(row["p50_us"] for row in expected)
    assert read(rich) == expected


def test_the_same_numbers_for_prometheus(rich: Run) -> None:
    rows = {row.case: row for row in record_rows([rich])}
    seen = 0
    for line in rendered("prometheus", rich).splitlines():
        match = re.fullmatch(
            r'ncclbench_(p50_us|bus_gb_per_s|wrong|bottleneck_bytes)\{.*?case="((?:[^"\\]|\\.)*)".*\} (\S+)', line
        )
        if match:
            case = match[2].replace(r"\"", '"').replace(r"\n", "\n").replace(r"\\", "\\")
            assert float(match[3]) == rows[case].figure(match[1])
            seen += 1
    assert seen > 20


def test_the_table_and_markdown_round_the_same_numbers(rich: Run) -> None:
    texts = [rendered(fmt, rich) for fmt in ("table", "markdown")]
    shown = [row.p50_us for row in record_rows([rich]) if row.p50_us is not None]
    assert len(shown) > 5
    for time in shown:
        assert all(f"{time:.4g}" in text for text in texts if time < 1000)


# ---- what the formats promise ----------------------------------------------------------------------------------------


def test_every_format_is_rendered_for_a_run_without_records(tmp_path: Path) -> None:
    RunWriter.create(tmp_path / "run", manifest(plan={}))
    empty = read_run(tmp_path / "run")
    for fmt in names("reports"):
        if fmt in (*TEXT_FORMATS, "html", "parquet"):
            assert rendered(fmt, empty)
    for fmt in ("table", "markdown", "html"):
        assert "no case has finished" in rendered(fmt, empty)


@pytest.mark.parametrize("fmt", [*sorted(TEXT_FORMATS), "html"])
def test_a_document_does_not_depend_on_the_clock(fmt: str, rich: Run) -> None:
    assert rendered(fmt, rich) == rendered(fmt, rich)


def test_the_json_report_matches_its_schema(rich: Run, tmp_path: Path) -> None:
    schema = json.loads((DOCS / "report.schema.json").read_text())
    report = json.loads(rendered("json", rich, read_run(small_run(tmp_path / "other"))))
    jsonschema.validate(report, schema)
    assert set(report["results"][0]) == {column.name for column in COLUMNS}
    assert report["across_starts"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda report: report.pop("results"),
        lambda report: report["results"][0].pop("p50_us"),
        lambda report: report["results"][0].update(p50_us="12"),
        lambda report: report["results"][0].update(status="good"),
        lambda report: report["results"][0].update(extra=1),
        lambda report: report["runs"][0]["verdict"].update(verdict="FINE"),
        lambda report: report.update(schema=2),
    ],
)
def test_the_report_schema_refuses(spoil: Callable[[Any], Any], rich: Run) -> None:
    report = json.loads(rendered("json", rich))
    spoil(report)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report, json.loads((DOCS / "report.schema.json").read_text()))


def test_stored_records_of_every_version_match_the_schema(rich: Run) -> None:
    schema = json.loads((DOCS / "record.schema.json").read_text())
    lines = [line for file in sorted(GOLDEN.glob("run-v*/results.jsonl")) for line in file.read_text().splitlines()]
    assert {json.loads(line)["schema"] for line in lines} == {1}  # a new version needs a run-v2 beside it
    validator = jsonschema.validators.validator_for(schema)(schema)  # looks at the schema itself only once
    for stored in (*map(json.loads, lines), *map(msgspec.to_builtins, rich.records)):
        validator.validate(stored)


@pytest.mark.parametrize(
    "spoil",
    [
        {"status": "good"},
        {"bytes": "1K"},
        {"schema": 2},
        {"time_us": {"n": 1}},
        {"phases": [{"label": "x"}]},
        {"world_size": 0},
    ],
)
def test_the_record_schema_refuses(spoil: dict[str, Any], rich: Run) -> None:
    record = msgspec.to_builtins(rich.records[0]) | spoil
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(record, json.loads((DOCS / "record.schema.json").read_text()))


def test_every_column_is_documented_with_its_unit() -> None:
    text = (DOCS / "formats.md").read_text().partition("### Columns")[2]
    for column in COLUMNS:
        row = next((line for line in text.splitlines() if line.startswith(f"| `{column.name}` |")), None)
        assert row is not None, column.name
        assert row.split("|")[2].strip() == column.unit


# ---- figures as another program defines them -------------------------------------------------------------------------


@pytest.fixture
def as_deepep_counts(tmp_path: Path) -> Run:
    """A case with DeepEP's dispatch figure and no combine, and one that has nothing of the kind."""
    figure = ComparableRate(gb_per_s=123.456, bytes=8192, over="dispatch", definition="as DeepEP counts")
    writer = RunWriter.create(tmp_path / "run", cluster_manifest())
    for nbytes, comparable in ((64, {"deepep_dispatch": figure}), (128, {})):
        record, _ = collective(nbytes, bus_gb_per_s=7.5, comparable=comparable)
        writer.append(record)
    return read_run(tmp_path / "run")


def test_figures_as_deepep_counts_have_columns_of_their_own(as_deepep_counts: Run) -> None:
    report = json.loads(rendered("json", as_deepep_counts))
    jsonschema.validate(report, json.loads((DOCS / "report.schema.json").read_text()))
    first, second = report["results"]
    assert (first["deepep_dispatch_gb_per_s"], first["deepep_combine_gb_per_s"]) == (123.456, None)
    assert second["deepep_dispatch_gb_per_s"] is None
    assert first["bus_gb_per_s"] == 7.5
    (column,) = (column for column in COLUMNS if column.name == "deepep_dispatch_gb_per_s")
    assert "no bus bandwidth" in column.what
    assert f"# HELP ncclbench_{column.name} {column.what}" in rendered("prometheus", as_deepep_counts)


def test_deepep_figures_are_labelled_apart_from_bus_bandwidth(as_deepep_counts: Run) -> None:
    lines = rendered("markdown", as_deepep_counts).splitlines()
    (head, _, first, second) = ([cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| "))
    labelled = "dispatch as DeepEP counts (GB/s)"
    assert [row[head.index(labelled)] for row in (first, second)] == ["123.456", "-"]
    assert first[head.index("busbw (GB/s)")] == "7.500"
    assert "combine as DeepEP counts (GB/s)" not in head  # nothing has one
    shown = results_table(record_rows([as_deepep_counts]), {})
    titles = [column.title for column in shown.columns]
    assert [row[titles.index(labelled)] for row in shown.rows] == ["123.456", ""]
    assert "combine as DeepEP counts (GB/s)" not in titles
    table = rendered("table", as_deepep_counts)
    assert re.search(r" dispatch as\n.* busbw .* DeepEP counts\n.* \(GB/s\)\n", table)
    assert re.search(r" 7\.500 .* 123\.456\n", table)
    for text in (*lines, shown.caption, *table.splitlines()):
        if "R/(R-1)" in text:
            assert "beside DeepEP's own figures only, no bus bandwidth" in text
    assert all("R/(R-1) too high" in text for text in ("".join(lines), shown.caption, table))


def test_runs_without_deepep_figures_have_no_such_columns(rich: Run) -> None:
    shown = results_table(record_rows([rich]), {})
    for text in (rendered("table", rich), rendered("markdown", rich), shown.caption, str(shown.columns)):
        assert "DeepEP" not in text


# ---- text from outside -----------------------------------------------------------------------------------------------


def hostile_run(path: Path, text: str) -> Run:
    writer = RunWriter.create(path, manifest(plan={"name": text}, world_size=6))
    record, _ = collective(64, case=text, reason=text, notes=[text], redop=text, status="wrong", wrong=3)
    writer.append(record)
    return read_run(path)


@pytest.mark.parametrize("text", FORMULAS)
def test_csv_neutralises_formulas(text: str, tmp_path: Path) -> None:
    run = hostile_run(tmp_path / "run", text)
    row = next(csv.DictReader(io.StringIO(rendered("csv", run))))
    for name in ("case", "reason", "notes", "redop", "plan"):
        assert row[name] == f"'{text}".replace("\r", "\n")
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) for cell in row.values())


def test_csv_leaves_numbers_alone() -> None:
    assert csv_text(("case", "p50_us"), [("-x", -1.5)]) == "case,p50_us\n'-x,-1.5\n"


@pytest.mark.parametrize("text", [HOSTILE, "a\x00b\x1b[31m\ud800", "]]></x>&amp;", 'a"b\\c\nd', "| a | `b` |"])
def test_junit_and_prometheus_stay_well_formed(text: str, tmp_path: Path) -> None:
    text = text.encode("utf-8", "replace").decode()
    run = hostile_run(tmp_path / "run", text)
    root = ET.fromstring(rendered("junit", run))
    shown = "".join(one if one in "\t\n\r" or one >= " " else "\ufffd" for one in text)
    message = root.find(".//failure").get("message")  # type: ignore[union-attr]
    assert message == shown.replace("\t", " ") if "\n" not in text else message is not None
    for line in rendered("prometheus", run).splitlines():
        assert line.startswith("#") or re.fullmatch(r'\w+\{(\w+="(?:[^"\\]|\\[\\n"])*",?)*\} \S+', line), line


def test_the_junit_test_notices_missing_escapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation that the test before must catch."""
    monkeypatch.setattr("ncclbench.store.export_writers.xml_text", str)
    with pytest.raises(ET.ParseError):
        ET.fromstring(rendered("junit", hostile_run(tmp_path / "run", "a\x00b")))


def test_markdown_escapes_text(tmp_path: Path) -> None:
    text = rendered("markdown", hostile_run(tmp_path / "run", "a|b `c` <img src=x> [d](e)"))
    assert r"a\|b \`c\` \<img src=x\> \[d\](e)" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| a"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 12


def test_a_junit_suite_counts_what_is_in_it(rich: Run) -> None:
    suite = ET.fromstring(rendered("junit", rich)).find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name) or -1) for name in ("tests", "failures", "errors", "skipped")}
    # The verdict is FAIL; checks: one FAIL, one INCONCLUSIVE, one NOT_RUN; records: one failed.
    assert counts == {"tests": len(rich.records) + 5, "failures": 2, "errors": 2, "skipped": 1}


def test_a_run_lost_between_cases_is_shown_as_lost(tmp_path: Path) -> None:
    """Its records are all good; the planned cases that it did not reach must be visible."""
    cases = [{"id": CASE}, {"id": "all_reduce/float32/2048/isolated"}, {"id": "all_reduce/float32/4096/isolated"}]
    writer = RunWriter.create(tmp_path / "run", cluster_manifest(plan={"name": "made", "starts": 1, "cases": cases}))
    record, seconds_RN = collective(1 << 10)
    writer.append(record, ["total"], seconds_RN[:, :, None])
    writer.event("warning", text="the samples of another case are gone")
    writer.event("lost", ranks=[0], reason="rank 0: no space left")
    writer.event("end", exit_code=3)
    run = read_run(tmp_path / "run")
    for name in ("table", "markdown", "json", "html", "nccl-tests"):
        shown = load("reports", name).render([run])
        for words in ("rank 0: no space left", "2 of the plan's cases were not measured", "another case are gone"):
            assert words in shown.replace("&#39;", "'"), (name, words)
    suite = ET.fromstring(load("reports", "junit").render([run]))[0]
    assert (suite.get("tests"), suite.get("errors")) == ("3", "2")
    assert [case.get("name") for case in suite.iter("testcase") if case.find("error") is not None] == [
        "all_reduce/float32/2048/isolated",
        "all_reduce/float32/4096/isolated",
    ]


# ---- medians and means -----------------------------------------------------------------------------------------------


def test_the_suffix_decides_and_a_failed_write_keeps_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ncclbench.cli import main

    rich = rich_run(tmp_path / "rich")

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
def test_every_format_distinguishes_medians_and_means_of_logs(
    records: list[Record], kinds: list[str | None], words: str
) -> None:
    sources = [{"tool": "nccl-tests", "version": "2.19.6", "file": "x.txt"}] if "mean" in kinds else []
    run = Run(Path("run"), cluster_manifest(imported=sources), tuple(records), ())
    assert [row.time_is for row in record_rows([run])] == kinds
    texts = {fmt: str(load("reports", fmt).render([run])) for fmt in ("table", "markdown", "prometheus", "junit")}
    assert words in texts["table"]
    assert words in texts["markdown"]
    assert ('time_is="mean"' in texts["prometheus"]) is ("mean" in kinds)
    assert ('name="time_is" value="mean"' in texts["junit"]) is ("mean" in kinds)
    page = page_of([run])
    assert words in page.times[:1].lower() + page.times[1:]
    if kinds == ["mean"]:
        assert "edian" not in texts["table"] + texts["markdown"] + page.times
        intro = next(section.intro for section in page.sections if section.id == "curves")
        assert intro.startswith("Means over launches")
