"""`report --format nccl-tests`: our own runs and other tools' in a text that parsers of nccl-tests read."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncclbench import __version__
from ncclbench.config.plugins import load
from ncclbench.importers.common.import_logs import import_logs, read_log
from ncclbench.importers.common.imported_cases import Stated
from ncclbench.importers.common.log_file import Log
from ncclbench.store.records import Record
from ncclbench.store.run_directory import read_run
from ncclbench_reports.nccl_tests import figure_text
from tests.helpers.paths import FIXTURES
from tests.helpers.stored import measured_record, record, summary, write_run

# What scripts of users look for: thirteen cells, read by position.
ROW = re.compile(r"^\s*(\d+)\s+(\d+)\s+(\w+)\s+(\w+)\s+(-?\d+)((?:\s+(?:[\d.e+-]+|N/A)){8})\s*$", re.MULTILINE)


def timed(pattern: str = "all_reduce", nbytes: int = 1024, p50: float = 12.345678, **fields: Any) -> Record:
    return measured_record(
        pattern, nbytes, **{"transport": "nccl", "world_size": 4, "time_us": summary(p50=p50)} | fields
    )


def exported(path: Path, *records: Record, **fields: Any) -> str:
    write_run(path, *records, **{"transport": "nccl", "world_size": 4} | fields)
    text = load("reports", "nccl-tests").render([read_run(path)])
    assert isinstance(text, str)
    return text.replace(str(path), "RUN")


GOLDEN = f"""\
# written by ncclbench {__version__} in nccl-tests' format: RUN
# Collective test starting: all_reduce_perf
# 4 ranks over nccl, timing isolated
# time is the median over iterations of the slowest rank
# all_reduce/float32/64/isolated: skipped: needs 2 nodes
# all_reduce/float32/1048576/isolated: wrong: x
#
#                                                              out-of-place                       in-place          
#       size         count      type   redop    root     time   algbw   busbw  #wrong     time   algbw   busbw  #wrong 
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)             (us)  (GB/s)  (GB/s)         
        1024           256     float     sum      -1      N/A     N/A     N/A    N/A    12.35    0.08    0.12       0
     1048576        262144     float     sum      -1      N/A     N/A     N/A    N/A  1234568  300.50  450.75       7
# Out of bounds values : 7 FAILED
# Avg bus bandwidth    : 225.437 
#
# Collective test concluded: all_reduce_perf
#

# written by ncclbench {__version__} in nccl-tests' format: RUN
# Collective test starting: alltoall_perf
# 4 ranks over nccl, timing isolated group=2
# time is the median over iterations of the slowest rank
#
#                                                              out-of-place                       in-place          
#       size         count      type   redop    root     time   algbw   busbw  #wrong     time   algbw   busbw  #wrong 
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)             (us)  (GB/s)  (GB/s)         
        1024           256     float    none      -1    12.35    0.08    0.12    N/A      N/A     N/A     N/A    N/A
# Avg bus bandwidth    : 0.1244 
#
# Collective test concluded: alltoall_perf
#
"""  # noqa: W291  nccl-tests ends these lines with a blank


def test_own_runs_are_rendered_exactly(tmp_path: Path) -> None:
    large = timed(
        nbytes=1 << 20, redop="sum", wrong=7, status="wrong", reason="x", alg_gb_per_s=300.5, bus_gb_per_s=450.75,
        p50=1234567.8,
    )  # fmt: skip
    text = exported(
        tmp_path / "run",
        record(nbytes=64, status="skipped", reason="needs\n2 nodes", transport="nccl", world_size=4),
        timed(redop="sum"),
        large,
        timed("all_to_all", params={"group": "2"}, case="all_to_all/float32/1024/isolated/group=2", wrong=None),
    )
    assert text == GOLDEN


def test_every_row_has_as_many_cells_as_parsers_expect(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"count": None, "alg_gb_per_s": None, "bus_gb_per_s": None, "wrong": None}
    text = exported(
        tmp_path / "run", timed(redop="sum"), timed(nbytes=64, dtype="bfloat16", root=3, **{**nothing, "count": 1})
    )
    assert [found[:5] for found in ROW.findall(text)] == [
        ("1024", "256", "float", "sum", "-1"),
        ("64", "1", "bfloat16", "none", "3"),
    ]


def test_the_output_can_be_imported_again(tmp_path: Path) -> None:
    text = exported(tmp_path / "run", timed(redop="sum"), timed(nbytes=4096, redop="sum"))
    ((_, reading),) = read_log(Log.of("x", text.encode()), Stated())
    back = [one.record for one in reading.cases if one.record.status == "ok"]
    assert [(one.case, one.wrong, one.time_us and one.time_us.p50) for one in back] == [
        ("all_reduce/float32/1024/pipelined", 0, 12.35),
        ("all_reduce/float32/4096/pipelined", 0, 12.35),
    ]


def test_a_name_cannot_break_a_line(tmp_path: Path) -> None:
    """A parser must not take a crafted host name or reason for a row of figures."""
    row = "\n   8   2   float   sum   -1   1.00   9.00   9.00   0   1.00   9.00   9.00   0\n"
    assert not ROW.search(exported(tmp_path / "a", record(status="failed", reason=row)))
    fixture = FIXTURES / "nccl-tests" / "all_reduce_per_iteration.json"
    hostile = fixture.read_text().replace('"node0"', '"node0' + row.replace("\n", "\\n") + '"')
    import_logs([Log.of("x", hostile.encode())], tmp_path / "b", Stated(), None, [])
    text = load("reports", "nccl-tests").render([read_run(tmp_path / "b")])
    assert "9.00 9.00" in text
    rows = [line for line in text.splitlines() if line[:1] == " "]
    assert len(rows) == 9


@pytest.mark.parametrize(
    ("value", "width", "text"),
    [
        (0.0, 7, "0.00"),
        (11.684, 7, "11.68"),
        (9999.994, 7, "9999.99"),
        (12345.67, 7, "12345.7"),
        (123456.7, 7, "123457"),
        (1234567.8, 7, "1234568"),
        (12345678.0, 7, "1.2e+07"),
        (340.99, 6, "340.99"),
        (1234.56, 6, "1234.6"),
        (12345.6, 6, "12346"),
        (123456.0, 6, "123456"),
        (1234567.0, 6, "1e+06"),
        (None, 6, "N/A"),
    ],
)
def test_figures_have_the_format_of_nccl_tests(value: float | None, width: int, text: str) -> None:
    assert figure_text(value, width) == text


@given(value=st.floats(0, 1e12), width=st.sampled_from([6, 7]))
def test_a_figure_survives_reading_and_writing(value: float, width: int) -> None:
    """Import and export lose nothing, whatever the size of the figure."""
    once = figure_text(value, width)
    assert figure_text(float(once), width) == once
