"""Text that nccl-tests and rccl-tests print, of any version, several runs in a log, with or without -I.

Other lines are skipped: NCCL's own lines too, even in the middle of a row, since NCCL connects while a row is half
written. If a launcher's prefix names the process that wrote a line, each process is read by itself.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from ncclbench.importers.common.imported_cases import Reading, Stated, agreed
from ncclbench.importers.common.log_file import DamageError, Line, Log, begins_another, is_cell, number, whole
from ncclbench.importers.common.nccl_lines import nccl_path, without_nccl
from ncclbench.importers.common.nccl_tests_tables import (
    PLACEMENTS,
    Half,
    NcclTestsTable,
    Row,
    cases_of_table,
    pattern_of,
)
from ncclbench.store.manifest import LoggedDevice
from ncclbench.store.records import OriginRecord, Placement

_TOOL = "nccl-tests"
_VERSION = re.compile(r"# (?:nccl|rccl)-tests version (\S{1,40})(.*)")
_LIBRARY = re.compile(r"(nccl|rccl)-(headers|library)=(\d{1,9})")
_PROGRAM = re.compile(r"# Collective test (starting|concluded): (?:\S*/)?(\w{1,60})")
_CONFIG = re.compile(
    r"# nThread (\d{1,9}) nGpus (\d{1,9}) minBytes (\d{1,18}) maxBytes (\d{1,18}) "
    r"step: (\d{1,18})\((\w{1,10})\) warmup iters: (\d{1,9}) iters: (\d{1,9})(.{0,200})"
)
_MORE_CONFIG = re.compile(r" ([a-z]\w{0,20}(?: \w{1,20})?): (\d{1,9})")
_BLOCKING = re.compile(r"# Blocking Enabled: (.{0,60})")
_DEVICE = re.compile(
    r"# +Rank +(\d{1,7})(?: +Group +(\d{1,7}))? +Pid +(\d{1,9}) on +(\S{1,300}) device +(\d{1,5}) "
    r"\[((?:0x)?[0-9a-fA-F:.]{1,20})\] ?(.{0,100})"
)
_OUT_OF_BOUNDS = re.compile(r"# Out of bounds values *: (\d{1,9})")
_AVERAGE = re.compile(r"# Avg bus bandwidth *: (\S{1,30})")
# A command line in the log names the test; older versions do not print its name.
_COMMAND = re.compile(r"\b([a-z][a-z_]{1,30}_perf)\b")
_TIMES = ("time", "cputime")
_PER_ITERATION = {"i_min": "min_us", "i_max": "max_us", "i_p99": "p99_us", "i_cv%": "cv_pct"}


def recognises(log: Log) -> bool:
    """Whether a line is the header of a table of nccl-tests."""
    return any(_header(line) is not None for line in log.lines if "algbw" in line.text)


def read(log: Log, stated: Stated) -> Reading:
    """All tables of the log.

    Raises:
        DamageError: naming the line, unless damaged lines are omitted.
        UsageError: if neither the log nor the user states the pattern.
    """
    reading = Reading(tool=_TOOL)
    streams: dict[str, _Stream] = {}
    hosts = {match[4] for line in log.lines if (match := _DEVICE.match(line.text))}
    for line in log.lines:
        if line.stream not in streams:
            streams[line.stream] = _Stream(hosts, line.stream)
        with reading.leaving_out(stated):
            streams[line.stream].take(line)
    for stream in streams.values():
        with reading.leaving_out(stated):
            stream.end()
    tables = [table for stream in streams.values() for table in stream.tables if table.rows]
    _fill(reading, sorted(tables, key=lambda table: table.line or 0), log, stated)
    return reading


def _fill(reading: Reading, tables: list[NcclTestsTable], log: Log, stated: Stated) -> None:
    path = nccl_path(log)
    for place, table in enumerate(tables):
        table.number = place
        said = pattern_of(table.program) if table.program else None
        pattern = agreed(said, stated.pattern, "--pattern", table.line)
        if pattern is None:
            why = "nothing says what the table measures; say it with --pattern all_reduce"
            raise DamageError(table.line or 1, why, one_line=False)
        version = table.versions.get("nccl-tests") or table.versions.get("rccl-tests")
        reading.version = reading.version or version
        origin = OriginRecord(source=0, tool=_TOOL, version=version, file=log.name)
        world_size = agreed(len(table.devices) or None, stated.world_size, "--world-size", table.line)
        reading.cases += cases_of_table(table, pattern, world_size, origin, path)
        reading.tables.append(table.facts())
        reading.versions |= {name: value for name, value in table.versions.items() if name != "nccl-tests"}
        reading.ranks = reading.ranks or table.devices
        if not table.concluded:
            where = f"the table at line {table.line} has no end"
            reading.warnings.append(f"{where}: the test was cut off, and what is whole of it was taken")
    streams = {table.stream for table in tables}
    if len(streams) > 1:
        reading.warnings.append(
            f"{len(streams)} processes each printed a table: a build without MPI runs as many separate jobs"
        )


def _header(line: Line) -> list[str] | None:
    """The columns, if the line is a header."""
    if not line.text.lstrip().startswith("#"):
        return None
    columns = line.text.lstrip().removeprefix("#").split()
    if columns[:2] == ["size", "count"] and "algbw" in columns and any(name in columns for name in _TIMES):
        return columns
    return None


class _Columns:
    """The meaning of each cell of a row, from the header."""

    def __init__(self, names: Sequence[str]) -> None:
        starts = [place for place, name in enumerate(names) if name in _TIMES]
        self.timestamp = names[-1] == "timestamp"
        end = len(names) - self.timestamp
        self.lead = list(names[: starts[0]])
        ends = [*starts[1:], end]
        self.halves = [list(names[start:stop]) for start, stop in zip(starts, ends, strict=True)]
        self.cells = end + 2 * self.timestamp
        self.cpu_time = names[starts[0]] == "cputime"

    def row(self, line: int, cells: Sequence[str]) -> Row:
        """The cells as a row.

        Raises:
            ValueError: naming the cell that is none.
        """
        lead = dict(zip(self.lead, cells, strict=False))
        root = lead.get("root")
        if root is not None and root != "-1":
            whole(root, "root")
        return Row(
            line=line,
            size=whole(lead["size"], "size"),
            count=whole(lead["count"], "count"),
            dtype=_word(lead.get("type", ""), "type"),
            redop=_word(lead["redop"], "redop") if lead.get("redop", "none") != "none" else None,
            root=int(root) if root is not None else None,
            halves=self._halves(list(cells[len(self.lead) :])),
            timestamp=" ".join(cells[-2:]) if self.timestamp else None,
        )

    def _halves(self, cells: list[str]) -> Mapping[Placement, Half]:
        if self.timestamp:
            cells = cells[:-2]
        names, placements = self.halves, list(PLACEMENTS[: len(self.halves)])
        if len(cells) < sum(map(len, names)):  # a trace replay is only in place; the other half is blank
            names, placements = names[1:], placements[1:]
        halves: dict[Placement, Half] = {}
        for placement, columns in zip(placements, names, strict=True):
            mine, cells = cells[: len(columns)], cells[len(columns) :]
            halves[placement] = _half(dict(zip(columns, mine, strict=True)), placement)
        return halves

    def only_in_place(self, cells: Sequence[str], text: str) -> bool:
        """Whether the row has a second half only: nccl-tests leaves 32 blanks for the first."""
        missing = self.cells - len(cells)
        return len(self.halves) == 2 and missing == len(self.halves[0]) and " " * 32 in text.strip()


def _word(text: str, what: str) -> str:
    if not re.fullmatch(r"[A-Za-z]\w{0,19}", text):
        raise ValueError(f"{what} is {text[:40]!r}, which is no name")
    return text


def _half(cells: Mapping[str, str], placement: str) -> Half:
    def value(name: str) -> float | None:
        return number(cells[name], f"{placement} {name}") if name in cells else None

    wrong = value("#wrong")
    time_us = value(next(name for name in _TIMES if name in cells))
    return Half(
        time_us=time_us,
        alg_gb_per_s=value("algbw"),
        bus_gb_per_s=value("busbw"),
        wrong=int(wrong) if wrong is not None else None,
        per_iteration={ours: value(name) for name, ours in _PER_ITERATION.items() if name in cells},
        extra={"error": value("error")} if "error" in cells else {},
    )


class _Stream:
    """Reads the output of one process, line by line."""

    def __init__(self, hosts: set[str], name: str) -> None:
        self.hosts, self.name = hosts, name
        self.tables: list[NcclTestsTable] = []
        self.columns: _Columns | None = None  # of the current table
        self.pending: list[str] = []  # the cells of a row that NCCL has interrupted
        self.pending_line = 0
        self.table = self._fresh()

    def _fresh(self) -> NcclTestsTable:
        return NcclTestsTable(number=0, line=None, stream=self.name)

    def take(self, line: Line) -> None:
        """Read one more line."""
        text = line.text
        if " NCCL " in text:
            text = without_nccl(text, self.hosts, line.number if self.columns else None)
            if not text.strip():
                return
            if self.columns and not text.lstrip().startswith("#"):
                self._cells(line.number, text, interrupted=True)
                return
        stripped = text.lstrip()
        if stripped.startswith("#"):
            self._comment(Line(line.number, stripped, line.stream))
        elif self.columns:
            self._cells(line.number, text, interrupted=False)
        elif match := _COMMAND.search(text[:4096]):
            self.table.program = match[1]

    def end(self) -> None:
        """End the reading."""
        self._nothing_pending()

    def _nothing_pending(self) -> None:
        if self.pending:
            cells, self.pending = len(self.pending), []
            raise DamageError(self.pending_line, f"a row breaks off after {cells} cells")

    def _cells(self, line: int, text: str, *, interrupted: bool) -> None:
        """Read a line inside a table: a row, the rest of a row, or a line of another program."""
        assert self.columns is not None
        cells = text.split()
        if self.pending and cells and all(map(is_cell, cells)):
            cells = [*self.pending, *cells]
            line, self.pending = self.pending_line, []
        elif not self._like_a_row(cells):
            return
        else:
            self._nothing_pending()
        if interrupted and len(cells) < self.columns.cells:
            self.pending, self.pending_line = cells, line
            return
        if len(cells) != self.columns.cells and not self.columns.only_in_place(cells, text):
            raise DamageError(line, f"a row of {self.columns.cells} cells has {len(cells)}")
        try:
            self.table.rows.append(self.columns.row(line, cells))
        except ValueError as error:
            raise DamageError(line, str(error)) from None

    def _like_a_row(self, cells: list[str]) -> bool:
        """Whether the cells are a row: it begins with a number, or has as many cells, most of them numbers."""
        assert self.columns is not None
        if not cells:
            return False
        numbers = sum(map(is_cell, cells))
        return cells[0].isdecimal() or (len(cells) == self.columns.cells and 2 * numbers >= len(cells))

    def _comment(self, line: Line) -> None:
        columns = _header(line)
        if columns is not None:
            self._begin(line, columns)
            return
        if begins_another(line.text):
            self._nothing_pending()
            self.columns = None
        for pattern, act in _COMMENTS:
            if match := pattern.match(line.text):
                self._nothing_pending()
                try:
                    act(self, match)
                except ValueError as error:
                    raise DamageError(line.number, str(error)) from None
                return

    def _begin(self, line: Line, columns: list[str]) -> None:
        self._nothing_pending()
        self._close()
        self.columns = _Columns(columns)
        self.table.line, self.table.cpu_time = line.number, self.columns.cpu_time
        self.tables.append(self.table)

    def _close(self) -> None:
        """End the table; later lines belong to another run, which may have no title of its own."""
        if self.table.line is not None:
            program = self.table.program
            self.table, self.columns = self._fresh(), None
            self.table.program = program

    # Comment lines.

    def _version(self, match: re.Match[str]) -> None:
        self._close()
        self.table.versions["nccl-tests"] = match[1]
        for library, kind, code in _LIBRARY.findall(match[2]):
            self.table.versions[f"{library}-{kind}"] = code

    def _program(self, match: re.Match[str]) -> None:
        if match[1] == "concluded":
            self.table.concluded = True
        else:
            self._close()
            self.table.program = match[2]

    def _settings(self, match: re.Match[str]) -> None:
        self._close()
        names = ("nThread", "nGpus", "minBytes", "maxBytes", "step", "step is a", "warmup iters", "iters")
        values = match.groups()[: len(names)]
        config: dict[str, int | str] = {
            name: int(value) if value.isdecimal() else value for name, value in zip(names, values, strict=True)
        }
        config |= {name.strip(): int(value) for name, value in _MORE_CONFIG.findall(match[9])}
        self.table.config |= config

    def _blocking(self, match: re.Match[str]) -> None:
        self.table.config["blocking"] = match[1].strip()

    def _device(self, match: re.Match[str]) -> None:
        self._close()
        rank, group, pid, host, device, address, name = match.groups()
        self.table.devices.append(
            LoggedDevice(
                rank=int(rank),
                group=int(group) if group else None,
                pid=int(pid),
                host=host,
                device=int(device),
                gpu=address,
                name=name.strip() or None,
            )
        )

    def _out_of_bounds(self, match: re.Match[str]) -> None:
        self.table.out_of_bounds = int(match[1])

    def _average(self, match: re.Match[str]) -> None:
        self.table.avg_bus_gb_per_s = number(match[1], "the average") if is_cell(match[1]) else None
        self.table.concluded = True
        self.columns = None


_COMMENTS: tuple[tuple[re.Pattern[str], Callable[[_Stream, re.Match[str]], None]], ...] = (
    (_VERSION, _Stream._version),
    (_PROGRAM, _Stream._program),
    (_CONFIG, _Stream._settings),
    (_BLOCKING, _Stream._blocking),
    (_DEVICE, _Stream._device),
    (_OUT_OF_BOUNDS, _Stream._out_of_bounds),
    (_AVERAGE, _Stream._average),
)
