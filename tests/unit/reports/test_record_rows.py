"""Rows and frames of records, process starts, stamps, and text that is made visible."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from ncclbench.config.plugins import load
from ncclbench.importers.common.import_logs import import_logs
from ncclbench.importers.common.imported_cases import Stated
from ncclbench.importers.common.log_file import Log
from ncclbench.store.run_directory import read_run, read_runs
from ncclbench.store.run_writer import RunWriter
from ncclbench_reports.common.process_starts import across_starts, by_date
from ncclbench_reports.common.record_rows import COLUMNS, NAMES, flat_frame, phase_rows, record_rows
from ncclbench_reports.common.run_summary import stamps
from ncclbench_reports.common.text_format import visible
from tests.helpers.cluster_runs import (
    cluster_manifest,
    collective,
    rich_run,
    small_run,
)
from tests.helpers.paths import FIXTURES
from tests.helpers.rendered import html


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    return rich_run(tmp_path / "rich")


# ---- rows and frames -------------------------------------------------------------------------------------------------


def test_frame_has_the_documented_columns_and_types(rich: Path) -> None:
    frame = flat_frame([read_run(rich)])
    assert tuple(frame.columns) == NAMES
    assert {name: str(kind) for name, kind in frame.dtypes.items()} == {c.name: c.dtype for c in COLUMNS}


def test_empty_frame_has_the_same_columns_and_types(tmp_path: Path) -> None:
    RunWriter.create(tmp_path / "run", cluster_manifest())
    frame = flat_frame([read_run(tmp_path / "run")])
    assert len(frame) == 0
    assert {name: str(kind) for name, kind in frame.dtypes.items()} == {c.name: c.dtype for c in COLUMNS}


def test_rows_have_the_numbers_of_records(rich: Path) -> None:
    run = read_run(rich)
    for row, record in zip(record_rows([run]), run.records, strict=True):
        assert row.p50_us == (record.time_us.p50 if record.time_us else None)
        assert row.skew_max_us == (record.skew_us.max if record.skew_us else None)
        assert row.bus_gb_per_s == record.bus_gb_per_s
        assert row.sent_cross_rail_bytes == (record.ledger.sent_bytes["cross_rail"] if record.ledger else None)
        assert msgspec.json.decode(row.params) == record.params


def test_phases_have_their_bytes_and_times(rich: Path) -> None:
    rows = phase_rows([read_run(rich)])
    (dispatch,) = (row for row in rows if row.phase == "dispatch" and "flat" in row.case)
    assert dispatch.sent_cross_rail_bytes == 2 << 20
    assert dispatch.p50_us is not None
    assert dispatch.p50_us > 0


# ---- several process starts ------------------------------------------------------------------------------------------


def starts(tmp_path: Path, scales: list[float]) -> list[Path]:
    return [small_run(tmp_path / f"run{k}", scale=scale) for k, scale in enumerate(scales)]


def test_medians_over_starts(tmp_path: Path) -> None:
    runs = read_runs(starts(tmp_path, [1.0, 1.2, 1.1]))
    rows = across_starts(record_rows(runs))
    assert len(rows) == 6  # the skipped case has no time
    medians = sorted(record.time_us.p50 for run in runs for record in run.records[:1] if record.time_us)
    first = rows[0]
    assert (first.runs, first.starts) == (3, 3)
    assert first.p50_us == medians[1]
    assert (first.p50_min_us, first.p50_max_us) == (medians[0], medians[2])
    assert first.p50_lo_us is None  # fewer than 6 starts have no 95% interval
    # The rate at the median time, not the mean of rates.
    assert first.bus_gb_per_s == pytest.approx(1024 / medians[1] / 1e3 * 2 * 5 / 6)


def test_six_starts_have_an_interval(tmp_path: Path) -> None:
    rows = across_starts(record_rows(read_runs(starts(tmp_path, [1, 1.1, 1.2, 1.3, 1.4, 1.5]))))
    assert rows[0].p50_lo_us == rows[0].p50_min_us
    assert rows[0].p50_hi_us == rows[0].p50_max_us


def test_one_start_and_unlike_devices_are_not_aggregated(tmp_path: Path) -> None:
    one = small_run(tmp_path / "one")
    assert across_starts(record_rows(read_runs([one]))) == []
    other = small_run(tmp_path / "other", device="cuda")
    assert across_starts(record_rows(read_runs([one, other]))) == []


def test_starts_of_one_run_are_aggregated(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", cluster_manifest())
    for start in range(2):
        writer.append(collective(1024, start=start, scale=1 + start)[0])
    run = read_run(tmp_path / "run")
    assert [record.start for record in run.records] == [0, 1]
    (row,) = across_starts(record_rows([run]))
    assert (row.runs, row.starts) == (1, 2)
    assert "over process starts" in load("reports", "table").render([run])


def test_trends_are_ordered_by_date(tmp_path: Path) -> None:
    for name, day in (("late", "2026-02-01"), ("early", "2026-01-01")):
        RunWriter.create(tmp_path / name, cluster_manifest()).append(collective(1024, started=f"{day}T00:00:00Z")[0])
    (group,) = by_date(record_rows(read_runs([tmp_path / "late", tmp_path / "early"])))
    assert [Path(row.run).name for row in group] == ["early", "late"]


# ---- stamps and text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"device": "cpu"}, ["CPU only: proves logic, not a fabric"]),
        ({"device": "cuda", "transport": "nccl"}, []),
        ({"device": "cpu", "transport": "model"}, ["simulated"]),
        ({"device": "cuda", "redacted": True}, ["redacted"]),
        ({"device": "cuda", "synthetic": True}, ["synthetic"]),
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
def test_run_is_stamped(fields: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    run = read_run(small_run(tmp_path / "run", **fields))
    assert stamps(run, None) == expected
    for stamp in expected:
        assert f"<li>{stamp}</li>" in html(tmp_path / "run")


def test_imported_run_is_stamped_with_its_tool(tmp_path: Path) -> None:
    log = FIXTURES / "nccl-tests" / "all_reduce.txt"
    import_logs([Log.open(log)], tmp_path / "run", Stated(), None, ["import"])
    assert stamps(read_run(tmp_path / "run"), None) == ["imported from nccl-tests 2.19.6"]
    assert "<li>imported from nccl-tests 2.19.6</li>" in html(tmp_path / "run")


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
def test_invisible_characters_are_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown
