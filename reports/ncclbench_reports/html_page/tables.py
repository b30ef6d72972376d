"""Tables of the HTML report, as text; the browser sorts and filters them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ncclbench_reports.common.process_starts import AcrossStarts
from ncclbench_reports.common.record_rows import PhaseRow, RecordRow
from ncclbench_reports.common.run_summary import DEEPEP_NOTE, DEEPEP_RATES, deepep_rates
from ncclbench_reports.common.text_format import visible


@dataclass(frozen=True)
class TableColumn:
    """A column.

    Attributes:
        title: its heading.
        number: whether its cells are numbers.
        paper: whether it is printed; paper is not wide enough for all columns.
        long: whether its cells are long texts, which are folded.
    """

    title: str
    number: bool = False
    paper: bool = True
    long: bool = False

    @property
    def kind(self) -> str:
        """For the browser: n for numbers, t for text, d for folded text; a capital letter is for the screen only."""
        kind = "n" if self.number else "d" if self.long else "t"
        return kind if self.paper else kind.upper()


@dataclass(frozen=True, kw_only=True)
class DataTable:
    """A table that sorts and filters.

    Attributes:
        id: unique on the page.
        title: its heading.
        caption: what one row is.
        columns: the headings.
        rows: cells as text; a number is written so that the browser can read it back.
    """

    id: str
    title: str
    caption: str
    columns: Sequence[TableColumn]
    rows: Sequence[Sequence[str]] = field(default_factory=list)

    def trimmed(self) -> "DataTable":
        """Without the columns that are empty in all rows."""
        kept = [k for k in range(len(self.columns)) if any(row[k] for row in self.rows)]
        columns = [self.columns[k] for k in kept]
        return replace(self, columns=columns, rows=[[row[k] for k in kept] for row in self.rows])


def number(value: float | None) -> str:
    """A figure with six significant digits; "" where it is not known."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


_RESULTS = (
    ("case", "case"), ("status", "status"), ("size (B)", "size_bytes"), ("dtype", "dtype"), ("timing", "timing"),
    ("p50 (us)", "p50_us"), ("p50 low (us)", "p50_lo_us"), ("p50 high (us)", "p50_hi_us"), ("p95 (us)", "p95_us"),
    ("p99 (us)", "p99_us"), ("min (us)", "min_us"), ("max (us)", "max_us"), ("skew p50 (us)", "skew_p50_us"),
    ("n", "n"), ("time is", "time_is"), ("algbw (GB/s)", "alg_gb_per_s"), ("busbw (GB/s)", "bus_gb_per_s"),
    ("bottleneck (GB/s)", "bottleneck_gb_per_s"), ("bottleneck (B)", "bottleneck_bytes"),
    *((f"{head} (GB/s)", name) for name, head in DEEPEP_RATES), ("wrong", "wrong"), ("path proof", "path_proof"),
    ("reason", "reason"), ("notes", "notes"),
)  # fmt: skip
# Paper is not wide enough for these; they are on the screen and in the CSV.
_SCREEN_ONLY = {
    "dtype", "timing", "p95_us", "min_us", "max_us", "bottleneck_bytes", "bottleneck_gb_per_s", "reason", "notes",
    "p50_lo_us", "p50_hi_us", "sent_self_bytes", "transport", "time_is", "path_proof",
    *(name for name, _ in DEEPEP_RATES),
}  # fmt: skip
_TEXT = frozenset(
    {"run", "case", "status", "dtype", "timing", "reason", "notes", "phase", "time_is", "transport", "path_proof"}
)

Row = RecordRow | PhaseRow | AcrossStarts
# Heading and name of a column.
Heads = list[tuple[str, str]]


def results_table(rows: Sequence[RecordRow], names: Mapping[str, str]) -> DataTable:
    """Every record; with the name of its run if there are several."""
    means = any(row.time_is == "mean" for row in rows)
    columns = [*_origin(rows, names), *((head, name) for head, name in _RESULTS if means or name != "time_is")]
    caption = "One row per case; times are those of the slowest rank."
    if means:
        caption = "One row per case. A time that is a mean is over launches, as the imported log has it."
    if deepep_rates(rows):
        caption += f" {DEEPEP_NOTE[0].upper()}{DEEPEP_NOTE[1:]}."
    return _table("results", "Results", caption, columns, rows, names)


def phases_table(rows: Sequence[PhaseRow], names: Mapping[str, str]) -> DataTable:
    """Every phase of every record, with its bytes by link class."""
    columns = [*_origin(rows, names), ("case", "case"), ("phase", "phase"), ("p50 (us)", "p50_us")]
    columns += [
        (f"{link.replace('_', ' ')} (B)", f"sent_{link}_bytes")
        for link in ("self", "node", "domain", "same_rail", "cross_rail", "cross_site")
    ]
    columns += [("bottleneck (B)", "bottleneck_bytes"), ("bottleneck (GB/s)", "bottleneck_gb_per_s")]
    caption = "One row per phase; bytes are those sent by all ranks over links of a class."
    return _table("phases", "Phases and bytes", caption, columns, rows, names)


def _origin(rows: Sequence[RecordRow] | Sequence[PhaseRow], names: Mapping[str, str]) -> Heads:
    """The run and the process start, where there are several."""
    columns = [("run", "run")] if len(names) > 1 else []
    return columns + ([("start", "start")] if len({row.start for row in rows}) > 1 else [])


def across_table(rows: Sequence[AcrossStarts]) -> DataTable:
    """Medians over process starts."""
    columns = [
        ("case", "case"), ("transport", "transport"), ("ranks", "world_size"), ("runs", "runs"), ("starts", "starts"),
        ("median (us)", "p50_us"), ("low (us)", "p50_lo_us"), ("high (us)", "p50_hi_us"), ("least (us)", "p50_min_us"),
        ("most (us)", "p50_max_us"), ("spread", "spread"), ("busbw (GB/s)", "bus_gb_per_s"),
    ]  # fmt: skip
    caption = "The median over process starts of each start's median, with its 95% interval from 6 starts on."
    return _table("across", "The same case over process starts", caption, columns, rows, {})


def _table(
    key: str, title: str, caption: str, columns: Heads, rows: Sequence[Row], names: Mapping[str, str]
) -> DataTable:
    cells = [[_cell(row, name, names) for _, name in columns] for row in rows]
    heads = [TableColumn(head, name not in _TEXT, name not in _SCREEN_ONLY) for head, name in columns]
    return DataTable(id=key, title=title, caption=caption, columns=heads, rows=cells).trimmed()


def _cell(row: Row, column: str, names: Mapping[str, str]) -> str:
    value: str | float | None = getattr(row, column)
    if isinstance(value, str):
        return visible(names.get(value, value) if column == "run" else value)
    return number(value)
