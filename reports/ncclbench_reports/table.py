"""Text for the terminal: the columns of nccl-tests, with the median's interval, p99, skew and n beside them."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ncclbench.store.records import Record
from ncclbench.store.run_directory import Run
from ncclbench.units import counted
from ncclbench_reports.common.process_starts import across_starts
from ncclbench_reports.common.record_rows import RecordRow, record_rows, row_of
from ncclbench_reports.common.run_summary import (
    DEEPEP_NOTE,
    IMPORTED_FROM,
    NO_REASON,
    and_more,
    deepep_rates,
    losses_of,
    stamps,
    times_are,
    verdict_line,
    verdicts_of,
)
from ncclbench_reports.common.text_format import interval, microseconds, rate, whole, wrong_elements

# Heading and unit.
_COLUMNS = (
    ("size", "(B)"),
    ("count", "(elements)"),
    ("type", ""),
    ("redop", ""),
    ("root", ""),
    ("time", "(us)"),
    ("algbw", "(GB/s)"),
    ("busbw", "(GB/s)"),
    ("#wrong", ""),
    ("p50 95%", "(us)"),
    ("p99", "(us)"),
    ("skew", "(us)"),
    ("n", ""),
)
_LEFT = ("type", "redop")
# The slowest come first; the record has all of them.
_MOST_GROUPS = 8


@dataclass(frozen=True)
class _TableRow:
    """A record, and its row."""

    record: Record
    row: RecordRow

    @property
    def pattern(self) -> str:
        """The pattern with the parameters that are no columns."""
        params = self.record.params.items()
        return self.record.pattern + "".join(
            f" {name}={value}" for name, value in params if name not in ("redop", "root")
        )


def render(runs: Sequence[Run]) -> str:
    """The runs, one after the other, as text."""
    return "\n\n".join([*(_render_run(run) for run in runs), *_render_across(runs)])


def as_text(table: Table) -> str:
    """A table as lines, wide enough for all of its columns."""
    out = io.StringIO()
    # Wide enough for every column, also where stdout is a pipe of 80 columns: a figure must not be cut.
    Console(file=out, width=200, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())


def _render_run(run: Run) -> str:
    parts = [_header(run)]
    sections: dict[str, list[_TableRow]] = {}
    for record in run.records:
        case = _TableRow(record, row_of(run, record))
        sections.setdefault(f"{case.pattern}, {record.timing}", []).append(case)
    parts += [_render_section(title, cases) for title, cases in sections.items()] or ["no case has finished"]
    parts += _render_timings([case for cases in sections.values() for case in cases])
    parts += [f"! {loss}" for loss in losses_of(run)]
    return "\n\n".join(parts)


def _render_timings(cases: Iterable[_TableRow]) -> list[str]:
    """The timing regimes side by side, where a case was measured in several, and the launch cost that they imply.

    A graph runs without the host. Back-to-back launches run as fast as the host can launch, or the device can run.
    Their difference is the cost of launching.
    """
    times: dict[tuple[str, str, int], dict[str, list[float]]] = {}
    for case in cases:
        row = case.row
        if row.p50_us is not None and row.dtype is not None and row.size_bytes is not None:
            by_regime = times.setdefault((case.pattern, row.dtype, row.size_bytes), {})
            by_regime.setdefault(row.timing, []).append(row.p50_us)
    times = {key: by_regime for key, by_regime in times.items() if len(by_regime) > 1}
    regimes = [name for name in ("isolated", "pipelined", "graph") if any(name in found for found in times.values())]
    if not times:
        return []
    implied = ["launch cost\n(us)"] if {"pipelined", "graph"} <= set(regimes) else []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in ("pattern", "type", "size\n(B)", *(f"{name}\n(us)" for name in regimes), *implied):
        table.add_column(name, justify="left" if name in ("pattern", "type") else "right")
    for (pattern, dtype, size), by_regime in times.items():
        known = {name: fmean(found) for name, found in by_regime.items()}  # over process starts
        cells = [pattern, dtype, whole(size), *(microseconds(known.get(name)) for name in regimes)]
        if implied:
            both = "graph" in known and "pipelined" in known
            cells.append(microseconds(known["pipelined"] - known["graph"]) if both else "-")
        table.add_row(*cells)
    return ["timing regimes side by side; time is the median of the slowest rank\n" + as_text(table)]


def _render_across(runs: Sequence[Run]) -> list[str]:
    """The same cases over several process starts: each start counts once, whatever its number of iterations."""
    across = across_starts(record_rows(runs))
    if not across:
        return []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in ("case", "ranks", "starts", "time\n(us)", "95%\n(us)", "least\n(us)", "most\n(us)", "busbw\n(GB/s)"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for row in across:
        cells = [row.case, whole(row.world_size), whole(row.starts), microseconds(row.p50_us)]
        cells += [interval(row.p50_lo_us, row.p50_hi_us), microseconds(row.p50_min_us), microseconds(row.p50_max_us)]
        table.add_row(*(Text(cell) for cell in (*cells, rate(row.bus_gb_per_s))))
    return [
        "the same case over process starts; time is the median over starts, with an interval from 6 starts on\n"
        + as_text(table)
    ]


def _header(run: Run) -> str:
    manifest = run.manifest
    nodes = (len(manifest.topology.node_names) or None) if manifest.topology else None
    transport = manifest.transport or "several transports"
    lines = [f"# {run.path}: {counted(manifest.world_size, 'rank')} on {counted(nodes, 'node')} over {transport}"]
    (verdict,) = verdicts_of([run])
    lines += [f"# {stamp}" for stamp in stamps(run, verdict) if not stamp.startswith(IMPORTED_FROM)]
    if verdict:
        lines.append(f"# {verdict_line(verdict)}")
    if manifest.imported:
        return "\n".join([*lines, *_imported_lines(run)])
    lines += _mode_lines(run)
    lines.append(f"# {times_are(run)}; p50 95% is its interval; GB is 1e9 bytes")
    return "\n".join(lines)


def _mode_lines(run: Run) -> list[str]:
    """How the processes of each mode were started, where the plan has modes."""
    return [
        f"# mode {mode}: processes started with {' '.join(f'{name}={value}' for name, value in variables.items())}"
        for mode, variables in run.mode_variables.items()
    ]


def _imported_lines(run: Run) -> list[str]:
    """Where another tool's figures come from, and what they are."""
    lines = [
        f"# imported from {one.file} ({one.tool} {one.version or ''})".replace(" )", ")")
        for one in run.manifest.imported
    ]
    return [*lines, f"# rates are as the log has them; {times_are(run)}; GB is 1e9 bytes"]


def _render_section(title: str, cases: Sequence[_TableRow]) -> str:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title_justify="left")
    for name, unit in _COLUMNS:
        table.add_column(f"{name}\n{unit}" if unit else name, justify="left" if name in _LEFT else "right")
    others = deepep_rates([case.row for case in cases])
    for _, head in others:
        table.add_column(head.replace(" as ", " as\n") + "\n(GB/s)", justify="right")
    remarks = []
    for case in cases:
        record, row = case.record, case.row
        if row.p50_us is not None or row.alg_gb_per_s is not None:
            table.add_row(*(Text(cell) for cell in [*_cells(row), *(rate(row.figure(name)) for name, _ in others)]))
        if row.status != "ok":
            remarks.append(f"! {row.case}: {row.status}: {row.reason or NO_REASON}")
        remarks += [f"! {row.case}: {note}" for note in record.notes]
    body = as_text(table) if table.row_count else ""
    overlaps = [
        f"  size {whole(row.size_bytes)}: {row.overlap_percent:.1f}% hidden behind computing, as OSU defines it"
        for row in (case.row for case in cases)
        if row.overlap_percent is not None
    ]
    defined = [f"  {DEEPEP_NOTE}"] if others else []
    groups = [line for case in cases for line in _group_lines(case)]
    return "\n".join(part for part in (title, body, *defined, *overlaps, *groups, *_folded(remarks)) if part)


def _group_lines(case: _TableRow) -> list[str]:
    """Groups that ran side by side, one by one: a slow group must not hide behind the others."""
    shown = sorted(case.record.groups, key=lambda group: -group.time_us.p50)
    lines = [
        f"  size {whole(case.row.size_bytes)}, ranks {_ranks(group.ranks)}: "
        f"time {microseconds(group.time_us.p50)} us, busbw {rate(group.bus_gb_per_s)} GB/s"
        for group in shown[:_MOST_GROUPS]
    ]
    if len(shown) > _MOST_GROUPS:
        lines.append(f"  and {len(shown) - _MOST_GROUPS} faster groups")
    return lines


def _ranks(ranks: Sequence[int]) -> str:
    return ",".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]},{ranks[1]},...,{ranks[-1]}"


def _folded(remarks: Iterable[str]) -> list[str]:
    """The same remark on every size of a sweep is written once."""
    counts: dict[str, list[str]] = {}
    for remark in remarks:
        counts.setdefault(remark.partition(": ")[2], []).append(remark)
    return [same[0] + and_more(len(same) - 1) for same in counts.values()]


def _cells(row: RecordRow) -> list[str]:
    return [
        whole(row.moved_bytes),
        whole(row.count),
        row.dtype or "-",
        row.redop or "none",
        "-1" if row.root is None else whole(row.root),
        microseconds(row.p50_us),
        rate(row.alg_gb_per_s),
        rate(row.bus_gb_per_s),
        wrong_elements(row.wrong),
        interval(row.p50_lo_us, row.p50_hi_us),
        microseconds(row.p99_us),
        microseconds(row.skew_p50_us),
        whole(row.n),
    ]
