"""The summary table of a run as a piece of HTML, as a notebook shows it: what the run is, then one row per case."""

from html import escape

from ncclbench.store.run_directory import Run
from ncclbench.units import counted
from ncclbench_reports.common.record_rows import RecordRow, record_rows
from ncclbench_reports.common.run_summary import stamps, times_are, verdict_line, verdicts_of, warnings_of
from ncclbench_reports.common.text_format import interval, microseconds, rate, visible, whole

_HEADER = ("case", "status", "size (B)", "time (us)", "p50 95% (us)", "algbw (GB/s)", "busbw (GB/s)", "n")
# The frame and the report have all rows.
_MOST_ROWS = 100


def summary_html(run: Run) -> str:
    """The run's name, stamps, verdict and warnings, and its records; text from outside is escaped."""
    (verdict,) = verdicts_of([run])
    lines = [f"{counted(len(run.records), 'record')}; {times_are(run)}", *stamps(run, verdict)]
    lines += [verdict_line(verdict)] if verdict else []
    lines += [f"! {warning}" for warning in warnings_of(run)]
    head = "".join(f"<th>{escape(name)}</th>" for name in _HEADER)
    rows = "".join(_row(row) for row in record_rows([run])[:_MOST_ROWS])
    more = len(run.records) - _MOST_ROWS
    return (
        f"<p><b>{_text(run.path)}</b><br>{'<br>'.join(_text(line) for line in lines)}</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f"{f'<p>and {more} more</p>' if more > 0 else ''}"
    )


def _row(row: RecordRow) -> str:
    cells = [row.case, row.status, whole(row.size_bytes), microseconds(row.p50_us)]
    cells += [interval(row.p50_lo_us, row.p50_hi_us), rate(row.alg_gb_per_s), rate(row.bus_gb_per_s), whole(row.n)]
    return f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>"


def _text(value: object) -> str:
    return escape(visible(value))
