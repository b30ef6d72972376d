"""Text that the Intel MPI Benchmarks print: IMB-MPI1's tables of times, for every number of processes in them.

Repetitions run back to back and are divided by their number, for each rank: one block of the ``pipelined`` regime. The
slowest rank's is the headline and the spread over the ranks is the skew.

The columns are those of ``IMB_print_header`` in ``IMB_output.c`` of 2017 and later. With ``-multi 1`` each group has a
row of its own; a size that did not fit into memory or time is a skipped case. Tables of overlap (IMB-NBC) are not
imported: IMB divides by the longer of communication and computing, which is another definition of the share.
"""

import re

from ncclbench.importers.common.imported_cases import Reading, Stated
from ncclbench.importers.common.log_file import DamageError, Line, Log, is_cell, number, whole
from ncclbench.importers.common.mpi_suites import PAIRS, MpiRow, case_of_row, dtype_of
from ncclbench.store.records import Json, OriginRecord

_TOOL = "imb"
_TITLE = re.compile(r"# +Intel ?\(R\) MPI Benchmarks? (?:Suite )?V?([\w.]{1,20})(?: Update (\d{1,3}))?, (.{1,40})")
_BENCHMARK = re.compile(r"# Benchmarking ((?:Multi-)?\w{1,60})")
_PROCESSES = re.compile(r"# #processes = (\d{1,9})")
_GROUPS = re.compile(r"# ?\( ?(\d{1,9}) groups of (\d{1,9}) processes each running simultaneous")
_TYPE = re.compile(r"# MPI_Datatype +: +(\w{1,40})")
_REDUCED = re.compile(r"# MPI_Datatype for reductions +: +(\w{1,40})")
_OP = re.compile(r"# MPI_Op +: +MPI_(\w{1,20})")
_DATE = re.compile(r"# Date +: +(.{1,40})")
_MPI = re.compile(r"# MPI Version +: +([\w.]{1,20})")
_COLUMNS = frozenset(
    {"Group", "#bytes", "#repetitions", "t[usec]", "t_min[usec]", "t_max[usec]", "t_avg[usec]", "Mbytes/sec", "Msg/sec"}
)
_PATTERNS = {
    "Allreduce": "all_reduce",
    "Reduce": "reduce",
    "Reduce_scatter": "reduce_scatter",
    "Reduce_scatter_block": "reduce_scatter",
    "Allgather": "all_gather",
    "Alltoall": "all_to_all",
    "Bcast": "broadcast",
    "Gather": "gather",
    "Scatter": "scatter",
    "Barrier": "barrier",
    "Sendrecv": "send_recv",
    "PingPong": "ping_pong",
    "PingPing": "ping_ping",
}
# A row that ends before its figures, and the reason: sample_failure in IMB_display_times.
_UNABLE = re.compile(
    r"(?:(?P<group>[0-9]{1,7}) +)?(?P<bytes>[0-9]{1,18}) +(?P<why>(?:out-of-mem|int-overflow|time-out)\..{0,160})"
)
_REDUCING = ("all_reduce", "reduce", "reduce_scatter")


def recognises(log: Log) -> bool:
    """Whether a line says which of Intel's benchmarks runs."""
    return any(_BENCHMARK.match(line.text.lstrip()) for line in log.lines if "# Benchmarking " in line.text[:200])


def read(log: Log, stated: Stated) -> Reading:
    """All tables of the log whose columns are known; the others are named in a warning."""
    reading = Reading(tool=_TOOL)
    reader = _Reader(reading)
    for line in log.lines:
        text = line.text.strip()
        if not text:
            continue
        if text.startswith("#") and not _is_header(text):
            reader.comment(line.number, text)
            continue
        with reading.leaving_out(stated):
            row = reader.row(line, text)
            if row is not None:
                origin = OriginRecord(source=0, tool=_TOOL, version=reading.version, file=log.name)
                reading.cases.append(case_of_row(row, len(reading.tables) - 1, reader.rows, "mpi", origin))
                reader.rows += 1
    return reading


def _is_header(text: str) -> bool:
    return text.startswith(("#bytes", "#repetitions")) or text.split()[:2] == ["Group", "#bytes"]


class _Reader:
    """The state of reading: the current benchmark, its columns and its rows."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.facts: dict[str, Json] = {}
        self.benchmark: str | None = None
        self.columns: list[str] = []
        self.processes: int | None = None
        self.groups: int | None = None
        self.types: dict[str, str] = {}
        self.rows = 0

    def comment(self, line: int, text: str) -> None:
        """Read a line that begins with ``#`` and is no header."""
        self.columns = []
        if match := _TITLE.match(text):
            self.reading.version = self.reading.version or (match[1] + (f".{match[2]}" if match[2] else ""))
        elif match := _BENCHMARK.match(text):
            self.benchmark, self.processes, self.groups, self.rows = match[1], None, None, 0
            self.facts = {"line": line, "program": match[1]}
            self.reading.tables.append(self.facts)
        elif match := _PROCESSES.match(text):
            self.processes = int(match[1])
            self.facts["processes"] = self.processes
        elif match := _GROUPS.match(text):
            self.groups, self.processes = int(match[1]), int(match[2])
            self.facts |= {"groups": self.groups, "processes": self.processes}
        elif match := _DATE.match(text):
            self.reading.started = self.reading.started or match[1].strip()
        else:
            self._settings(text)

    def _settings(self, text: str) -> None:
        for name, pattern in (("moved", _TYPE), ("reduced", _REDUCED), ("op", _OP)):
            if match := pattern.match(text):
                self.types[name] = match[1]
        if match := _MPI.match(text):
            self.reading.versions["mpi-standard"] = match[1]

    def row(self, line: Line, text: str) -> MpiRow | None:
        """Read a line that is no comment: a header, a row, or a line of another program."""
        cells = text.split()
        if _is_header(text):
            self._header(line.number, cells)
            return None
        if not self.columns or not self._like_a_row(cells):
            return None
        if match := _UNABLE.match(text):
            return self._without_figures(line.number, match)
        if len(cells) != len(self.columns):
            raise DamageError(line.number, f"a row of {len(self.columns)} cells has {len(cells)}")
        try:
            return self._figures(line.number, dict(zip(self.columns, cells, strict=True)))
        except ValueError as error:
            raise DamageError(line.number, str(error)) from None

    def _like_a_row(self, cells: list[str]) -> bool:
        numbers = sum(map(is_cell, cells))
        return cells[0].isdecimal() or (len(cells) == len(self.columns) and 2 * numbers >= len(cells))

    def _header(self, line: int, cells: list[str]) -> None:
        unknown = [name for name in cells if name not in _COLUMNS]
        self.columns = [] if unknown or self.benchmark is None else cells
        if unknown:
            columns = " ".join(unknown)[:60]
            self.reading.warnings.append(f"line {line}: {self.benchmark} has columns that are not imported: {columns}")

    def _figures(self, line: int, cells: dict[str, str]) -> MpiRow:
        assert self.benchmark is not None
        values = {name: number(cells[name], name) for name in cells if not name.startswith("#") and name != "Group"}
        message = whole(cells["#bytes"], "#bytes") if "#bytes" in cells else 0
        slowest, fastest = values.get("t_max[usec]"), values.get("t_min[usec]")
        if slowest is not None and fastest is not None and slowest < fastest:
            raise ValueError(f"t_max is {slowest}, less than t_min, {fastest}")
        messages = values.get("Msg/sec")
        name = self.benchmark.removeprefix("Multi-")
        pattern = _PATTERNS.get(name, name.lower())
        time_us = values.get("t[usec]") if slowest is None else slowest
        return MpiRow(
            line=line,
            pattern=pattern,
            timing="pipelined",
            message=message,
            dtype=self._dtype(pattern),
            members=self._members(),
            groups=self.groups or 1,
            redop=self._redop(pattern),
            time_us=time_us,
            over_ranks="max" if slowest is not None else None,
            spread_us=slowest - fastest if slowest is not None and fastest is not None else None,
            launches=whole(cells["#repetitions"], "#repetitions") if "#repetitions" in cells else None,
            # Mbytes/sec was 2**20 bytes until version 4, and is 1e6 since; messages leave no doubt.
            rate_gb_per_s=message * messages / 1e9 if time_us is None and messages is not None else None,
            params=self._params(cells.get("Group")),
            cells=values,
        )

    def _without_figures(self, line: int, match: re.Match[str]) -> MpiRow:
        """A size that IMB could not run: a skipped case, not a failed one."""
        pattern = _PATTERNS.get((self.benchmark or "").removeprefix("Multi-"), (self.benchmark or "").lower())
        return MpiRow(
            line=line,
            pattern=pattern,
            timing="pipelined",
            message=int(match["bytes"]),
            dtype=self._dtype(pattern),
            members=self._members(),
            groups=self.groups or 1,
            redop=self._redop(pattern),
            time_us=None,
            over_ranks=None,
            unable=f"IMB: {match['why'].strip()}",
            params=self._params(match["group"]),
        )

    def _redop(self, pattern: str) -> str | None:
        return self.types.get("op", "").lower() or None if pattern in _REDUCING else None

    def _dtype(self, pattern: str) -> str | None:
        """The type of the elements that are moved; None for a barrier."""
        if pattern == "barrier":
            return None
        return dtype_of(self.types.get("reduced" if pattern in _REDUCING else "moved"))

    def _members(self) -> int | None:
        if self.processes is None:
            return 2 if _PATTERNS.get(self.benchmark or "") in PAIRS else None
        return self.processes

    def _params(self, group: str | None) -> dict[str, Json]:
        """The parameters that tell cases apart: the number of processes, and the group of a row."""
        params: dict[str, Json] = {"processes": self.processes} if self.processes is not None else {}
        if self.groups is not None:
            params["group"] = str(self.processes)  # blocks of as many ranks, as a pattern's parameter has it
        if group is not None:
            params["place"] = whole(group, "Group")
        return params
