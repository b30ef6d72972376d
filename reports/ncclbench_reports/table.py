"""Text for the terminal: the columns of nccl-tests, with the median's interval, p99, skew and n beside them."""

import io
from collections.abc import Sequence

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ncclbench.store.run_directory import Run
from ncclbench.units import counted
from ncclbench_reports.common.across_starts import across_starts
from ncclbench_reports.common.record_frame import flat_frame, records_frame
from ncclbench_reports.common.wording import (
    AS_DEEPEP,
    AS_OTHERS_COUNT,
    IMPORTED,
    judgements,
    losses_of,
    stamps,
    times_are,
    verdict_line,
)

# Header, unit, and how a row shows it.
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
# The slowest come first; all of them are in the record.
_MOST_GROUPS = 8


def render(runs: Sequence[Run]) -> str:
    """The runs, one after the other, as text."""
    return "\n\n".join([*(_render_run(run) for run in runs), *_render_across(runs)])


def _render_run(run: Run) -> str:
    parts = [_header(run)]
    frame = records_frame([run])
    if frame.empty:
        parts.append("no case has finished")
    else:
        frame["section"] = [_section(row) for row in _rows(frame)]
        for section, rows in frame.groupby("section", sort=False):
            parts.append(_render_section(str(section), rows))
        parts += _render_timings(frame)
    parts += [f"! {loss}" for loss in losses_of(run)]
    return "\n\n".join(parts)


def _render_timings(frame: pd.DataFrame) -> list[str]:
    """The timing regimes side by side, where a case was measured in several, and the launch cost they imply.

    A graph runs without the host; back-to-back launches run as fast as the host can launch, or the device can run.
    What the second takes longer is what launching costs.
    """
    timed = frame[frame["p50_us"].notna()].copy()
    timed["what"] = [_section(row).rpartition(", ")[0] for row in _rows(timed)]
    times = timed.pivot_table(index=["what", "dtype", "size_bytes"], columns="timing", values="p50_us", sort=False)
    times = times[times.notna().sum(axis=1) > 1]
    regimes = [name for name in ("isolated", "pipelined", "graph") if name in times]
    if times.empty:
        return []
    implied = ["launch cost\n(us)"] if {"pipelined", "graph"} <= set(regimes) else []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in ("pattern", "type", "size\n(B)", *(f"{name}\n(us)" for name in regimes), *implied):
        table.add_column(name, justify="left" if name in ("pattern", "type") else "right")
    for row in _rows(times.reset_index()):
        cells = [str(row["what"]), str(row["dtype"]), whole(row["size_bytes"])]
        cells += [figure(row.get(name)) for name in regimes]
        if implied:
            both = there(row["graph"]) and there(row["pipelined"])
            cells.append(figure(float(str(row["pipelined"])) - float(str(row["graph"]))) if both else "-")
        table.add_row(*cells)
    return ["timing regimes side by side; time is the median of the slowest rank\n" + as_text(table)]


def _render_across(runs: Sequence[Run]) -> list[str]:
    """The same cases over several process starts: each counts once, however long it iterated."""
    across = across_starts(flat_frame(runs))
    if across.empty:
        return []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in ("case", "ranks", "starts", "time\n(us)", "95%\n(us)", "least\n(us)", "most\n(us)", "busbw\n(GB/s)"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for row in _rows(across):
        interval = f"{figure(row['p50_lo_us'])}..{figure(row['p50_hi_us'])}" if there(row["p50_lo_us"]) else "-"
        cells = [str(row["case"]), whole(row["world_size"]), whole(row["starts"]), figure(row["p50_us"]), interval]
        cells += [figure(row["p50_min_us"]), figure(row["p50_max_us"]), rate(row["bus_gb_per_s"])]
        table.add_row(*(Text(cell) for cell in cells))
    return [
        "the same case over process starts; time is the median over starts, with an interval from 6 starts on\n"
        + as_text(table)
    ]


def _rows(frame: pd.DataFrame) -> list[dict[str, object]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _header(run: Run) -> str:
    manifest = run.manifest
    nodes = (len(manifest.topology.node_names) or None) if manifest.topology else None
    transport = manifest.transport or "several transports"
    lines = [f"# {run.path}: {counted(manifest.world_size, 'rank')} on {counted(nodes, 'node')} over {transport}"]
    (judgement,) = judgements([run])
    lines += [f"# {stamp}" for stamp in stamps(run, judgement) if not stamp.startswith(IMPORTED)]
    if judgement:
        lines.append(f"# {verdict_line(judgement)}")
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


def _section(row: dict[str, object]) -> str:
    params = row["params"] if isinstance(row["params"], dict) else {}
    shown = "".join(f" {name}={value}" for name, value in params.items() if name not in ("redop", "root"))
    return f"{row['pattern']}{shown}, {row['timing']}"


def _render_section(title: str, rows: pd.DataFrame) -> str:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title_justify="left")
    for name, unit in _COLUMNS:
        table.add_column(f"{name}\n{unit}" if unit else name, justify="left" if name in _LEFT else "right")
    others = [(name, head) for name, head in AS_OTHERS_COUNT if rows[name].notna().any()]
    for _, head in others:
        table.add_column(head.replace(" as ", " as\n") + "\n(GB/s)", justify="right")
    remarks = []
    for row in _rows(rows):
        if there(row["p50_us"]) or there(row["alg_gb_per_s"]):
            table.add_row(*(Text(cell) for cell in [*_cells(row), *(rate(row[name]) for name, _ in others)]))
        if row["status"] != "ok":
            remarks.append(f"! {row['case']}: {row['status']}: {row['reason']}")
        notes = row["notes"]
        remarks += [f"! {row['case']}: {note}" for note in (notes if isinstance(notes, list) else [])]
    body = as_text(table) if table.row_count else ""
    overlaps = [
        f"  size {whole(row['size_bytes'])}: {row['overlap_percent']:.1f}% hidden behind computing, as OSU defines it"
        for row in _rows(rows)
        if there(row["overlap_percent"])
    ]
    defined = [f"  {AS_DEEPEP}"] if others else []
    groups = [line for row in _rows(rows) for line in _group_lines(row)]
    return "\n".join(part for part in (title, body, *defined, *overlaps, *groups, *_folded(remarks)) if part)


def _group_lines(row: dict[str, object]) -> list[str]:
    """Groups that ran side by side, each for itself: a slow one must not hide behind the others."""
    groups = row["groups"] if isinstance(row["groups"], list) else []
    shown = sorted(groups, key=lambda group: -group["time_us"]["p50"])
    lines = [
        f"  size {whole(row['size_bytes'])}, ranks {_ranks(group['ranks'])}: "
        f"time {figure(group['time_us']['p50'])} us, busbw {rate(group['bus_gb_per_s'])} GB/s"
        for group in shown[:_MOST_GROUPS]
    ]
    if len(shown) > _MOST_GROUPS:
        lines.append(f"  and {len(shown) - _MOST_GROUPS} faster groups")
    return lines


def _ranks(ranks: list[int]) -> str:
    return ",".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]},{ranks[1]},...,{ranks[-1]}"


def _folded(remarks: list[str]) -> list[str]:
    """The same remark on every size of a sweep is said once."""
    counts: dict[str, list[str]] = {}
    for remark in remarks:
        counts.setdefault(remark.partition(": ")[2], []).append(remark)
    return [same[0] + (f" (and {len(same) - 1} more cases)" if len(same) > 1 else "") for same in counts.values()]


def _cells(row: dict[str, object]) -> list[str]:
    interval = f"{figure(row['p50_lo_us'])}..{figure(row['p50_hi_us'])}" if there(row["p50_lo_us"]) else "-"
    return [
        whole(row["size_bytes"] if there(row["size_bytes"]) else row["bytes"]),
        whole(row["count"]),
        str(row["dtype"]) if there(row["dtype"]) else "-",
        str(row["redop"]) if there(row["redop"]) else "none",
        whole(row["root"]) if there(row["root"]) else "-1",
        figure(row["p50_us"]),
        rate(row["alg_gb_per_s"]),
        rate(row["bus_gb_per_s"]),
        whole(row["wrong"]) if there(row["wrong"]) else "N/A",
        interval,
        figure(row["p99_us"]),
        figure(row["skew_p50_us"]),
        whole(row["n"]),
    ]


def there(value: object) -> bool:
    """Whether a figure is known."""
    return not pd.isna(value)  # type: ignore[call-overload]


def whole(value: object) -> str:
    """A whole number, or a dash."""
    return f"{int(value)}" if there(value) else "-"  # type: ignore[call-overload]


def figure(value: object) -> str:
    """Microseconds with four significant digits, and never an exponent."""
    if not there(value):
        return "-"
    number = float(value)  # type: ignore[arg-type]
    return f"{number:.0f}" if number >= 1000 else f"{number:.4g}"


def rate(value: object) -> str:
    """GB/s with three decimals, and more where they would all be zeros."""
    if not there(value):
        return "-"
    number = float(value)  # type: ignore[arg-type]
    return f"{number:.3f}" if number >= 0.01 or number == 0 else f"{number:.6f}"


def as_text(table: Table) -> str:
    """A table as lines, wide enough for all of its columns."""
    out = io.StringIO()
    # Wide enough for every column, also where stdout is a pipe of 80 columns: a cut figure is no figure.
    Console(file=out, width=200, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())
