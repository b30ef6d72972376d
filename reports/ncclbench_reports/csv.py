"""Comma-separated values (RFC 4180): one row per record, the columns of docs/formats.md, all digits.

A spreadsheet runs a cell that begins with = + - @, a tab or a line end. Such text gets an apostrophe in front, as OWASP
advises under "CSV injection"; numbers stay numbers. Carriage returns become line feeds.
"""

from collections.abc import Sequence

from ncclbench.store.export_writers import csv_text
from ncclbench.store.run_directory import Run
from ncclbench_reports.common.record_rows import NAMES, record_rows

SUFFIX = ".csv"


def render(runs: Sequence[Run]) -> str:
    """All records of the runs; the header alone if there are none."""
    return csv_text(NAMES, ([row.value(name) for name in NAMES] for row in record_rows(runs)))
