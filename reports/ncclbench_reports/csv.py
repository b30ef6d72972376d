"""Comma-separated values (RFC 4180): a row a record, the columns of docs/formats.md, every digit.

A spreadsheet runs what begins with = + - @ (or a tab or a carriage return before one). Such text gets an apostrophe in
front, as OWASP advises under "CSV injection"; numbers are numbers and stay. Carriage returns become line feeds.
"""

from collections.abc import Sequence

import pandas as pd

from ncclbench.store.run_directory import Run
from ncclbench_reports.common.record_frame import flat_frame

SUFFIX = ".csv"

_STARTS_A_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def render(runs: Sequence[Run]) -> str:
    """All records of the runs; the header alone where there are none."""
    return as_csv(flat_frame(runs))


def as_csv(frame: pd.DataFrame) -> str:
    """`frame` as CSV, its text neutralised."""
    safe = frame.copy()
    for name in safe.columns:
        if safe[name].dtype == "string":
            safe[name] = safe[name].map(_neutralised, na_action="ignore")
    return str(safe.to_csv(index=False, lineterminator="\n"))


def _neutralised(cell: str) -> str:
    # pandas does not quote a lone carriage return, and readers take it for the end of the row.
    text = cell.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{text}" if cell.startswith(_STARTS_A_FORMULA) else text
