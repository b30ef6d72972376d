"""Tables of the HTML report: text, ready to be shown; sorting and filtering is done in the browser."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ncclbench.units import format_size
from ncclbench_reports.common.wording import AS_DEEPEP, AS_OTHERS_COUNT, visible


@dataclass(frozen=True)
class TableColumn:
    """A heading, whether numbers or long texts stand below it, and whether there is room for it on paper."""

    title: str
    number: bool = False
    paper: bool = True
    long: bool = False

    @property
    def kind(self) -> str:
        """For the browser: n for numbers, t for text, d for text that is folded; a capital is for the screen only."""
        kind = "n" if self.number else "d" if self.long else "t"
        return kind if self.paper else kind.upper()


@dataclass(frozen=True, kw_only=True)
class DataTable:
    """A table that sorts and filters.

    Attributes:
        id: unique on the page.
        title: its heading.
        caption: what a row is.
        columns: the headings.
        rows: cells as text; a number is written so that the browser can read it back.
    """

    id: str
    title: str
    caption: str
    columns: Sequence[TableColumn]
    rows: Sequence[Sequence[str]] = field(default_factory=list)

    def trimmed(self) -> "DataTable":
        """Without the columns in which no row has anything to say."""
        kept = [k for k in range(len(self.columns)) if any(row[k] for row in self.rows)]
        columns = [self.columns[k] for k in kept]
        return replace(self, columns=columns, rows=[[row[k] for k in kept] for row in self.rows])


def number(value: Any) -> str:
    """A figure with six significant digits; nothing where it is not known."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


_RESULTS = (
    ("case", "case"), ("status", "status"), ("size (B)", "size_bytes"), ("dtype", "dtype"), ("timing", "timing"),
    ("p50 (us)", "p50_us"), ("p50 low (us)", "p50_lo_us"), ("p50 high (us)", "p50_hi_us"), ("p95 (us)", "p95_us"),
    ("p99 (us)", "p99_us"), ("min (us)", "min_us"), ("max (us)", "max_us"), ("skew p50 (us)", "skew_p50_us"),
    ("n", "n"), ("time is", "time_is"), ("algbw (GB/s)", "alg_gb_per_s"), ("busbw (GB/s)", "bus_gb_per_s"),
    ("bottleneck (GB/s)", "bottleneck_gb_per_s"), ("bottleneck (B)", "bottleneck_bytes"),
    *((f"{head} (GB/s)", name) for name, head in AS_OTHERS_COUNT), ("wrong", "wrong"), ("path proof", "path_proof"),
    ("reason", "reason"), ("notes", "notes"),
)  # fmt: skip
# A page is not wide enough for more than the figures that are quoted; the others are on the screen and in the CSV.
_SCREEN_ONLY = {
    "dtype", "timing", "p95_us", "min_us", "max_us", "bottleneck_bytes", "bottleneck_gb_per_s", "reason", "notes",
    "p50_lo_us", "p50_hi_us", "sent_self_bytes", "transport", "time_is", "path_proof",
    *(name for name, _ in AS_OTHERS_COUNT),
}  # fmt: skip
_TEXT = {
    "path_proof",
    "run",
    "case",
    "status",
    "dtype",
    "timing",
    "reason",
    "notes",
    "phase",
    "time_is",
    "transport",
    "device",
    "simulated",
}


def results_table(rows: Sequence[dict[str, Any]], names: dict[str, str]) -> DataTable:
    """Every record; with the run's name in front where there are several runs."""
    means = any(row["time_is"] == "mean" for row in rows)
    columns = [*_where(rows, names), *((head, name) for head, name in _RESULTS if means or name != "time_is")]
    caption = "One row a case; times are of the slowest rank."
    if means:
        caption = "One row a case. Where time is a mean, it is over launches, as the imported log has it."
    if any(row[name] is not None for row in rows for name, _ in AS_OTHERS_COUNT):
        caption += f" {AS_DEEPEP[0].upper()}{AS_DEEPEP[1:]}."
    return _table("results", "Results", caption, columns, rows, names)


def phases_table(rows: Sequence[dict[str, Any]], names: dict[str, str]) -> DataTable:
    """Every phase of every record, with its bytes by link class."""
    columns = [*_where(rows, names), ("case", "case"), ("phase", "phase"), ("p50 (us)", "p50_us")]
    columns += [
        (f"{link.replace('_', ' ')} (B)", f"sent_{link}_bytes")
        for link in ("self", "node", "domain", "same_rail", "cross_rail", "cross_site")
    ]
    columns += [("bottleneck (B)", "bottleneck_bytes"), ("bottleneck (GB/s)", "bottleneck_gb_per_s")]
    caption = "One row a phase; bytes are those sent by all ranks over links of a class."
    return _table("phases", "Phases and bytes", caption, columns, rows, names)


def _where(rows: Sequence[dict[str, Any]], names: dict[str, str]) -> list[tuple[str, str]]:
    """The run and the process start, where there are several."""
    columns = [("run", "run")] if len(names) > 1 else []
    return columns + ([("start", "start")] if len({row["start"] for row in rows}) > 1 else [])


def across_table(rows: Sequence[dict[str, Any]]) -> DataTable:
    """Medians across runs."""
    columns = [
        ("case", "case"), ("transport", "transport"), ("ranks", "world_size"), ("runs", "runs"), ("starts", "starts"),
        ("median (us)", "p50_us"), ("low (us)", "p50_lo_us"), ("high (us)", "p50_hi_us"), ("least (us)", "p50_min_us"),
        ("most (us)", "p50_max_us"), ("spread", "spread"), ("busbw (GB/s)", "bus_gb_per_s"),
    ]  # fmt: skip
    caption = "The median over process starts of each start's median, with its 95% interval from 6 starts on."
    return _table("across", "The same case over process starts", caption, columns, rows, {})


def _table(
    key: str,
    title: str,
    caption: str,
    columns: Iterable[tuple[str, str]],
    rows: Sequence[dict[str, Any]],
    names: dict[str, str],
) -> DataTable:
    chosen = list(columns)
    cells = []
    for row in rows:
        shown = {**row, "run": names.get(row.get("run", ""), row.get("run", ""))}
        cells.append([visible(shown[c] or "") if c in _TEXT else number(shown[c]) for _, c in chosen])
    heads = [TableColumn(head, name not in _TEXT, name not in _SCREEN_ONLY) for head, name in chosen]
    return DataTable(id=key, title=title, caption=caption, columns=heads, rows=cells).trimmed()


def size_name(row: dict[str, Any]) -> str:
    """A record's size for a reader."""
    return format_size(row["bytes"] if row["size_bytes"] is None else row["size_bytes"])
