"""Comma-separated values (RFC 4180): a row a record, the columns of docs/formats.md, every digit.

A spreadsheet runs what begins with = + - @ (or a tab or a carriage return before one). Such text gets an apostrophe in
front, as OWASP advises under "CSV injection"; numbers are numbers and stay. Carriage returns become line feeds.
"""

from collections.abc import Sequence

import pandas as pd

from ncclbench.store.escapes import csv_cell
from ncclbench.store.run_directory import Run
from ncclbench_reports.common.record_frame import flat_frame

SUFFIX = ".csv"


def render(runs: Sequence[Run]) -> str:
    """All records of the runs; the header alone where there are none."""
    return as_csv(flat_frame(runs))


def as_csv(frame: pd.DataFrame) -> str:
    """`frame` as CSV, its text neutralised."""
    safe = frame.copy()
    for name in safe.columns:
        if safe[name].dtype == "string":
            safe[name] = safe[name].map(csv_cell, na_action="ignore")
    return str(safe.to_csv(index=False, lineterminator="\n"))
