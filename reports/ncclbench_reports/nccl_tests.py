"""The text of nccl-tests, for parsers of it: one table per test, with its header and footer.

Tables that were imported from nccl-tests are written unchanged. For ncclbench's own runs, `time` is the median over
iterations of the slowest rank; the half of a row that was not measured is N/A.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from msgspec import UNSET, UnsetType

from ncclbench import __version__
from ncclbench.schedule.builders import IN_PLACE
from ncclbench.store.manifest import LoggedDevice, LoggedTable
from ncclbench.store.records import Record
from ncclbench.store.run_directory import Run
from ncclbench_reports.common.run_summary import losses_of

_PROGRAMS = {"all_to_all": "alltoall", "all_to_all_v": "alltoallv", "send_recv": "sendrecv"}
_TYPES = {
    **{"float16": "half", "float32": "float", "float64": "double"},
    **{"float8_e4m3fn": "f8e4m3", "float8_e5m2": "f8e5m2"},
}
_PLACEMENTS = ("out_of_place", "in_place")
_PER_ITERATION = ("min_us", "max_us", "p99_us", "cv_pct")
# Parameters of a row, which therefore do not name a table.
_OF_A_ROW = ("placement", "redop", "root", "occurrence")

T = TypeVar("T")
Halves = dict[str, Record]


def render(runs: Sequence[Run]) -> str:
    """All tables of the runs, one after the other."""
    return "\n".join(table for run in runs for table in _tables(run))


def _tables(run: Run) -> list[str]:
    theirs: dict[tuple[int, int], list[Record]] = {}
    ours: dict[tuple[object, ...], list[Record]] = {}
    for record in run.records:
        origin = record.imported
        if origin is None or origin.tool != "nccl-tests":
            params = [(name, str(value)) for name, value in sorted(record.params.items()) if name not in _OF_A_ROW]
            ours.setdefault((record.pattern, record.timing, *params), []).append(record)
        elif origin.is_nccl_tests_row and origin.table is not None:
            theirs.setdefault((origin.source, origin.table), []).append(record)
    return [
        *(_imported(run, source, table, records) for (source, table), records in theirs.items()),
        *(_measured(run, records) for records in ours.values()),
    ]


def _imported(run: Run, source: int, table: int, records: Sequence[Record]) -> str:
    """A table that nccl-tests wrote."""
    facts = run.manifest.imported[source].tables[table]
    rows: dict[int, Halves] = {}
    for record in records:
        origin = record.imported
        assert origin is not None
        assert origin.row is not None  # the store refuses records without them
        assert origin.placement is not None
        rows.setdefault(origin.row, {})[origin.placement] = record
    program = facts.program or _program(records[0].pattern)
    head = [
        *_version_line(facts.versions or {}),
        f"# Collective test starting: {program}",
        *_config_lines(facts, records),
    ]
    return "\n".join(
        [
            *head,
            "#",
            *_device_lines(facts.devices or []),
            *_body(rows.values(), blank=True, cpu_time=records[0].timing == "cpu_time"),
            *_footer(_stated(facts.out_of_bounds), _stated(facts.avg_bus_gb_per_s)),
            *([f"# Collective test concluded: {program}", "#", ""] if facts.concluded else []),
        ]
    )


def _stated(value: T | UnsetType | None) -> T | None:
    return None if value is UNSET else value


def _measured(run: Run, records: Sequence[Record]) -> str:
    """A table of cases that ncclbench or another tool has timed."""
    first = records[0]
    rows: dict[tuple[object, ...], Halves] = {}
    for record in records:
        if record.time_us is None and record.alg_gb_per_s is None:
            continue
        default = "in_place" if record.pattern in IN_PLACE else "out_of_place"
        placement = str(record.params.get("placement", default))
        key = (record.dtype, record.redop, record.root, record.bytes, record.params.get("occurrence"))
        rows.setdefault(key, {})[placement] = record
    params = "".join(f" {name}={value}" for name, value in first.params.items() if name not in _OF_A_ROW)
    checked = [record.wrong for record in records if record.wrong is not None]
    rates = [record.bus_gb_per_s for record in records if record.bus_gb_per_s is not None]
    return "\n".join(
        [
            f"# written by ncclbench {__version__} in nccl-tests' format: {_line(str(run.path))}",
            f"# Collective test starting: {_program(first.pattern)}",
            f"# {first.world_size or '?'} ranks over {first.transport}, timing {first.timing}{params}",
            "# time is " + ("the log's" if first.imported else "the median over iterations of the slowest rank"),
            *(
                f"# {_line(record.case)}: {record.status}: {_line(record.reason)}"
                for record in records
                if record.status != "ok"
            ),
            *(f"# {_line(loss)}" for loss in losses_of(run)),
            "#",
            *_body(rows.values(), blank=False, cpu_time=False),
            *_footer(sum(checked) if checked else None, sum(rates) / len(rates) if rates else None),
            f"# Collective test concluded: {_program(first.pattern)}",
            "#",
            "",
        ]
    )


def _program(pattern: str) -> str:
    return f"{_PROGRAMS.get(pattern, pattern)}_perf"


def _line(text: str | None) -> str:
    """`text` in one line, as a comment needs it."""
    return " ".join((text or "").split())


def _version_line(versions: Mapping[str, str]) -> list[str]:
    if not versions:
        return []
    tool = f"nccl-tests version {versions['nccl-tests']}" if "nccl-tests" in versions else ""
    libraries = [f"{name}={value}" for name, value in versions.items() if name != "nccl-tests"]
    return [" ".join(["#", *([tool] if tool else []), *libraries])]


def _config_lines(facts: LoggedTable, records: Sequence[Record]) -> list[str]:
    config = facts.config or {}
    lines = []
    if "nThread" in config:
        lines.append(
            f"# nThread {config['nThread']} nGpus {config.get('nGpus')} minBytes {config.get('minBytes')} "
            f"maxBytes {config.get('maxBytes')} step: {config.get('step')}({config.get('step is a')}) "
            f"warmup iters: {config.get('warmup iters')} iters: {config.get('iters')}"
            + "".join(f" {name}: {config[name]}" for name in config if name in _LATER)
        )
    if "blocking" in config:
        lines.append(f"# Blocking Enabled: {config['blocking']}")
    if any(record.imported and record.imported.per_iteration for record in records):
        lines.append("# Per-Iteration Report: CUDA event timing; i_* uses max over process rows ")
    return lines


_LATER = ("agg iters", "validation", "graph", "unalign")


def _device_lines(devices: Sequence[LoggedDevice]) -> list[str]:
    if not devices:
        return []
    lines = ["# Using devices"]
    for device in devices:
        group = f" Group {device.group:2d}" if isinstance(device.group, int) else ""
        lines.append(
            f"#  Rank {device.rank:2d}{group} Pid {device.pid or 0:6d} on {_line(device.host or None):>10} "
            f"device {device.device or 0:2d} [{_line(device.gpu or None)}] {_line(device.name or None)}"
        )
    return [*lines, "#"]


def _body(rows: Iterable[Halves], *, blank: bool, cpu_time: bool) -> list[str]:
    """The three lines of the header, and one line per row.

    Args:
        rows: the halves of each.
        blank: leave a missing first half blank, as nccl-tests does; N/A otherwise.
        cpu_time: whether times are of the CPU, as with -C.
    """
    rows = list(rows)
    records = [record for halves in rows for record in halves.values()]
    origins = [record.imported for record in records if record.imported]
    iterations = any(origin.per_iteration for origin in origins)
    stamped = any(origin.timestamp for origin in origins)
    return [*_header(iterations, stamped, cpu_time), *(_row(halves, iterations, blank) for halves in rows)]


def _header(iterations: bool, stamped: bool, cpu_time: bool) -> list[str]:
    halves = ["cputime" if cpu_time else "time", "algbw", "busbw", "#wrong"]
    units, widths = ["(us)", "(GB/s)", "(GB/s)", ""], [7, 6, 6, 6]
    titles = "           out-of-place                       in-place          "
    if iterations:
        halves += ["i_min", "i_max", "i_p99", "i_cv%"]
        units, widths = [*units, "(us)", "(us)", "(us)", "(%)"], [*widths, 7, 7, 7, 7]
        titles = (
            "              out-of-place (+ per-iteration)                                in-place (+ per-iteration)"
        )

    def line(lead: Sequence[str], cells: Sequence[str], last: str) -> str:
        both = [f"{cell:>{width}}" for cell, width in zip([*cells, *cells], [*widths, *widths], strict=True)]
        return f"# {_lead(lead)}  {'  '.join(both)} {last:>{19 if stamped else 0}}"

    return [
        f"# {_lead(['', '', '', '', ''])}{titles}",
        line(["size", "count", "type", "redop", "root"], halves, "timestamp" if stamped else ""),
        line(["(B)", "(elements)", "", "", ""], units, "%Y-%m-%d %H:%M:%S" if stamped else ""),
    ]


def _lead(cells: Sequence[str]) -> str:
    return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, (10, 12, 8, 6, 6), strict=True))


def _row(halves: Halves, iterations: bool, blank: bool) -> str:
    one = next(iter(halves.values()))
    origin = one.imported
    count = one.count if one.count is not None else "N/A"
    dtype = (origin and origin.type) or _TYPES.get(one.dtype or "", one.dtype or "N/A")
    root = one.root if one.root is not None else -1
    size = one.size_bytes if one.size_bytes is not None else one.bytes
    text = f"{size:>12}  {count:>12}  {dtype:>8}  {one.redop or 'none':>6}  {root:>6}"
    for placement in _PLACEMENTS:
        if placement in halves:
            text += _half(halves[placement], iterations)
        elif blank:
            text += " " * 32 if placement == "out_of_place" else ""
        else:
            text += _cells([None] * (3 + 4 * iterations), None)
    return text + (f"{origin.timestamp:>21}" if origin and origin.timestamp else "")


def _half(record: Record, iterations: bool) -> str:
    time_us = record.time_us.p50 if record.time_us else None
    figures = [time_us, record.alg_gb_per_s, record.bus_gb_per_s]
    if iterations:
        statistics = record.imported.per_iteration if record.imported else {}
        figures += [statistics.get(name) for name in _PER_ITERATION]
    return _cells(figures, record.wrong)


def _cells(figures: Sequence[float | None], wrong: int | None) -> str:
    """Time, rates, #wrong, and the statistics of single launches if there are any."""
    widths = [7, 6, 6, *([7] * (len(figures) - 3))]
    cells = [f"  {figure_text(value, width):>{width}}" for value, width in zip(figures, widths, strict=True)]
    # nccl-tests writes N/A narrower than the figure.
    return "".join([*cells[:3], f"  {wrong:6g}" if wrong is not None else "    N/A", *cells[3:]])


def figure_text(value: float | None, width: int) -> str:
    """As many decimals as fit into `width`, two at most, like getFloatStr of nccl-tests."""
    if value is None:
        return "N/A"
    power = 0
    while value >= 10**power:
        power += 1
    choices: tuple[tuple[int, Callable[[float], str]], ...] = (
        (width - 2, lambda figure: f"{figure:.2f}"),
        (width - 1, lambda figure: f"{figure:.1f}"),
        (width + 1, lambda figure: f"{figure:.0f}"),
    )
    wide = next((show for below, show in choices if power < below), None)
    return wide(value) if wide else f"{value:.1e}" if width >= 7 else f"{value:.0e}"


def _footer(out_of_bounds: int | None, average: float | None) -> list[str]:
    lines = []
    if out_of_bounds is not None:
        lines.append(f"# {'Out of bounds values':<20} : {out_of_bounds} {'FAILED' if out_of_bounds else 'OK'}")
    if average is not None:
        lines.append(f"# {'Avg bus bandwidth':<20} : {average:g} ")
    return [*lines, "#"]
