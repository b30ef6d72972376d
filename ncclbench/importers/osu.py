"""Text that the OSU micro-benchmarks print: latency, bandwidth and collectives, blocking or not, with -f and -c.

OSU times a collective call by call between barriers and prints the mean. The regime is ``averaged``, since a mean is
no median. With -f the slowest rank's mean is the headline and the spread over the ranks is the skew; without it
only the mean over ranks is known.

A non-blocking collective has a time without computing (``Pure Comm.``), which is the headline, and the share hidden
behind computing: ``overlap``, as in ncclbench's own cases with ``overlap=true``.

The columns are those of ``osu_util_mpi.c`` of 7.4 (``print_only_header``, ``print_only_header_nbc``,
``print_header_one_sided``).
"""

import re
from collections.abc import Mapping

from ncclbench.importers.common.imported_cases import Reading, Stated
from ncclbench.importers.common.log_file import DamageError, Line, Log, begins_another, is_cell, number, whole
from ncclbench.importers.common.mpi_suites import PAIRS, MpiRow, case_of_row, dtype_of
from ncclbench.store.records import OriginRecord, Overlap

_TOOL = "osu-micro-benchmarks"
_TITLE = re.compile(
    r"(?:# )?OSU (MPI|NCCL|MPI4Py|OpenSHMEM|UPC)(-\w{1,20}(?: MANAGED)?)? (.{1,100}?) Test"
    r"(?: v([\w.]{1,20}))?\s*(?:,|$)"
)
_DATATYPE = re.compile(r"# Datatype: (\w{1,40})")
_COLUMN = re.compile(
    r"^Size|Avg Latency ?\(us\)|Min Latency ?\(us\)|Max Latency ?\(us\)|Latency ?\(us\)|Bandwidth ?\(MB/s\)|MB/s|"
    r"Messages/s|Iterations|P\d{1,2} Tail (?:Lat\(us\)|BW\(MB/s\))|Validation|Overall ?\(us\)|Compute ?\(us\)|"
    r"Coll\. Init ?\(us\)|MPI_Test ?\(us\)|MPI_Wait ?\(us\)|(?:Pure|Min|Max) Comm\. ?\(us\)|Overlap ?\(%\)"
)
# The prefix of a non-blocking or persistent collective; ialltoall of 7.5 lacks a blank.
_SPLIT_CALL = re.compile(r"(Non-blocking|Persistent) (.{1,80}?) ?(Latency)")
_PATTERNS = {
    "Allreduce Latency": "all_reduce",
    "Allgather Latency": "all_gather",
    "All-to-All Personalized Exchange Latency": "all_to_all",
    "All-to-All Latency": "all_to_all",
    "Alltoall Latency": "all_to_all",
    "Broadcast Latency": "broadcast",
    "Reduce Latency": "reduce",
    "Reduce_scatter Latency": "reduce_scatter",
    "Reduce Scatter Latency": "reduce_scatter",
    "Gather Latency": "gather",
    "Scatter Latency": "scatter",
    "Barrier Latency": "barrier",
    "Latency": "ping_pong",
    "Bandwidth": "bandwidth",
    "Bi-Directional Bandwidth": "bidirectional_bandwidth",
    "Multiple Bandwidth / Message Rate": "multiple_bandwidth",
}


def recognises(log: Log) -> bool:
    """Whether a line is the title of an OSU benchmark."""
    return any(_TITLE.match(line.text.strip()) for line in log.lines if "OSU " in line.text[:200])


def read(log: Log, stated: Stated) -> Reading:
    """All benchmarks of the log whose columns are known; the others are named in a warning."""
    reading = Reading(tool=_TOOL)
    table: _OsuTable | None = None
    for line in log.lines:
        text = line.text.strip()
        if match := _TITLE.match(text):
            table = _OsuTable(match, line.number, len(reading.tables))
            reading.version = reading.version or match[4]
            reading.tables.append(table.facts)
            continue
        if begins_another(text):
            table = None
        if table is None or not text:
            if table is not None and table.rows:
                table.over = True
            continue
        with reading.leaving_out(stated):
            row = table.take(line, text, stated)
            if row is not None:
                origin = OriginRecord(source=0, tool=_TOOL, version=table.version, file=log.name)
                reading.cases.append(case_of_row(row, table.number, table.rows, table.transport, origin))
                table.rows += 1
        if table.left_out:
            reading.warnings.append(f"line {line.number}: {table.left_out}")
            table = None
    return reading


class _OsuTable:
    """The output of one benchmark."""

    def __init__(self, title: re.Match[str], line: int, number: int) -> None:
        self.transport = "nccl" if title[1] == "NCCL" else "mpi"
        self.version = title[4]
        self.name = title[3]
        self.pattern, self.split_call = _named(title[3])
        self.number = number
        self.datatype: str | None = None
        self.columns: list[str] = []
        self.left_out: str | None = None
        self.rows = 0
        self.over = False  # a blank line has followed the rows: later lines may be a shell's
        self.facts = {"line": line, "program": title[0].lstrip("# ").strip(), "library": title[1] + (title[2] or "")}

    def take(self, line: Line, text: str, stated: Stated) -> MpiRow | None:
        """Read one more line; the row if it is one."""
        if match := _DATATYPE.match(text):
            self.datatype = match[1]
            return None
        # The header of a barrier has no size; some logs have lost the `#`.
        heading = text.removeprefix("#").strip()
        if (heading.startswith(("Size ", "Avg Latency", "Overall")) and "(" in heading) or heading.startswith("Size  "):
            self._header(heading)
            return None
        if not self.columns or text.startswith("#"):
            return None
        return self._row(line.number, text.split(), stated)

    def _header(self, heading: str) -> None:
        self.columns = [column.group() for column in _COLUMN.finditer(heading)]
        rest = _COLUMN.sub("", heading).strip()
        if rest or not self.columns:
            self.left_out = f"OSU's {self.name} has columns that are not imported: {(rest or heading)[:60]}"

    def _row(self, line: int, cells: list[str], stated: Stated) -> MpiRow | None:
        if not self._like_a_row(cells):
            return None
        if len(cells) != len(self.columns):
            raise DamageError(line, f"a row of {len(self.columns)} cells has {len(cells)}")
        try:
            return self._figures(line, dict(zip(map(_key, self.columns), cells, strict=True)), stated)
        except ValueError as error:
            raise DamageError(line, str(error)) from None

    def _like_a_row(self, cells: list[str]) -> bool:
        """Whether the cells are a row, and no output of a shell or of MPI; a barrier's row has no size."""
        if cells[0].isdecimal() or (self.columns[0] != "Size" and is_cell(cells[0])):
            return True
        damaged = len(cells) == len(self.columns) and 2 * sum(map(is_cell, cells)) >= len(cells)
        return damaged and not self.over

    def _figures(self, line: int, cells: dict[str, str], stated: Stated) -> MpiRow:
        values = {name: number(cells[name], name) for name in cells if name not in ("Size", "Validation", "Iterations")}
        mean = values.get("Avg Latency", values.get("Latency", values.get("Pure Comm.")))
        slowest, fastest = (values.get(f"{end} Latency", values.get(f"{end} Comm.")) for end in ("Max", "Min"))
        if slowest is not None and fastest is not None and slowest < fastest:
            raise ValueError(f"the slowest rank's {slowest} us is less than the fastest's {fastest} us")
        rate = values.get("Bandwidth", values.get("MB/s"))
        validation = cells.get("Validation", "Pass")
        return MpiRow(
            line=line,
            pattern=self.pattern,
            timing="averaged",
            message=whole(cells["Size"], "Size") if "Size" in cells else 0,
            dtype=dtype_of(self.datatype),
            members=2 if self.pattern in PAIRS else stated.world_size,
            time_us=mean if slowest is None else slowest,
            over_ranks=None if mean is None or self.pattern in PAIRS else "mean" if slowest is None else "max",
            spread_us=slowest - fastest if slowest is not None and fastest is not None else None,
            launches=whole(cells["Iterations"], "Iterations") if "Iterations" in cells else None,
            # MB are 1e6 bytes here: osu_bw divides by 1e6.
            rate_gb_per_s=rate / 1e3 if rate is not None else None,
            failed=None if validation.lower() == "pass" else f"OSU's validation says {validation[:20]}",
            params={"call": self.split_call} if self.split_call else {},
            overlap=_overlap(values),
            cells={**values, **({"Validation": validation[:20]} if "Validation" in cells else {})},
        )


def _named(title: str) -> tuple[str, str | None]:
    """The pattern of a title, and the kind of call if it is not one blocking call."""
    match = _SPLIT_CALL.fullmatch(title)
    plain = f"{match[2]} {match[3]}" if match else title
    pattern = _PATTERNS.get(plain) or re.sub(r"\W+", "_", plain, flags=re.ASCII).strip("_").lower()
    return pattern, match[1].lower() if match else None


def _overlap(values: Mapping[str, float | None]) -> Overlap | None:
    """The share of overlap as OSU defines it, with the means from which it follows."""
    share, pure, both, compute = (values.get(name) for name in ("Overlap", "Pure Comm.", "Overall", "Compute"))
    if share is None or pure is None or both is None or compute is None:
        return None
    return Overlap(share_percent=share, pure_us=pure, overlapped_us=both, compute_us=compute)


def _key(column: str) -> str:
    """The column's name without its unit."""
    return column.partition("(")[0].strip()
