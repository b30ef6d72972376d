"""Progress of a run: a bar on a terminal, plain lines elsewhere, nothing with --json.

Progress goes to stderr, results to stdout.
"""

import os
import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from ncclbench.errors import Exit
from ncclbench.store.records import Record
from ncclbench.units import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ncclbench.launch.request import RunRequest

_LAST_RESULTS = 8
_LAST_WARNINGS = 4
_STYLES = {"ok": "green", "skipped": "yellow"}


def one_line(record: Record) -> str:
    """One line for a finished case."""
    if record.time_us is None:
        return f"{record.case}: {record.status}: {record.reason}"
    rate = f", busbw {record.bus_gb_per_s:.3g} GB/s" if record.bus_gb_per_s is not None else ""
    if record.overlap is not None:
        rate += f", {record.overlap.share_percent:.0f}% hidden behind computing"
    wrong = f", WRONG: {record.reason}" if record.wrong else ""
    return f"{record.case}: p50 {record.time_us.p50:.4g} us{rate}, n {record.time_us.n}{wrong}"


def _print_error(error: str) -> None:
    click.echo(f"ncclbench: error: {error}", err=True)


def _print_warning(text: str) -> None:
    click.echo(f"ncclbench: warning: {text}", err=True)


class JsonListener:
    """Prints one compact JSON object at the end, as the last line of stdout."""

    def noted(self, text: str) -> None:
        """Print a line on stderr."""
        click.echo(text, err=True)

    def warned(self, text: str) -> None:
        """Print a warning on stderr."""
        _print_warning(text)

    def started(self, run: Path, cases: int, finished: int, world_size: int, transport: str) -> None:
        """Print nothing."""

    def began(self, number: int, case: str) -> None:
        """Print nothing."""

    def finished(self, record: Record) -> None:
        """Print nothing."""

    def ended(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        """Print the error and the summary."""
        if error:
            _print_error(error)
        self.summed_up(run, records, code, error)

    def summed_up(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        """Print the summary."""
        summary = {
            "run": str(run) if run else None,
            "exit_code": int(code),
            "error": error,
            "records": [msgspec.to_builtins(record) for record in records],
        }
        click.echo(msgspec.json.encode(summary).decode())


class SilentListener(JsonListener):
    """Prints only errors and warnings; the process that makes all process starts prints their results."""

    def ended(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        """Print the error."""
        if error:
            _print_error(error)

    def summed_up(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        """Print nothing."""


class LineListener:
    """Prints one line per case on stderr, and the table on stdout at the end.

    Args:
        shows_results: print the table; False if another process prints the table of all process starts.
    """

    def __init__(self, *, shows_results: bool = True) -> None:
        """Make a listener for one run."""
        self.shows_results = shows_results
        self.total = 0
        self.done = 0

    def noted(self, text: str) -> None:
        """Print a line on stderr."""
        self._print(text)

    def started(self, run: Path, cases: int, finished: int, world_size: int, transport: str) -> None:
        """Print the number of cases and ranks, and the run directory."""
        self.total, self.done = cases, finished
        resumed = f", {finished} finished before" if finished else ""
        what = f"{counted(cases, 'case')} on {counted(world_size, 'rank')}"
        self._print(f"{what} over {transport} -> {run}{resumed}")

    def warned(self, text: str) -> None:
        """Print a line on stderr."""
        _print_warning(text)

    def began(self, number: int, case: str) -> None:
        """Print nothing; the line is printed with the result."""

    def finished(self, record: Record) -> None:
        """Print the line of a finished case."""
        self.done += 1
        self._print(f"[{self.done}/{self.total}] {one_line(record)}")

    def ended(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        """Print the table of all records, the run directory, and the error."""
        if run is not None and self.shows_results:
            self.summed_up(run, records, code, None)
        if error:
            _print_error(error)

    def summed_up(self, run: Path, records: list[Record], code: Exit, error: str | None) -> None:
        """Print the table of all records, and the run directory."""
        if records:
            from ncclbench.config.plugins import load
            from ncclbench.store.run_directory import read_run

            click.echo(load("reports", "table").render([read_run(run)]))
        click.echo(f"run directory: {run}")

    def _print(self, text: str) -> None:
        click.echo(text, err=True)


class BarListener(LineListener):
    """Draws a view on a terminal: a bar, the case in progress, the last results, and their warnings.

    Nothing is drawn while a case is measured, because a drawing thread would disturb the measurement. rich omits colors
    with NO_COLOR. Text from outside is never interpreted as markup.
    """

    def __init__(self, console: "Console | None" = None, *, shows_results: bool = True) -> None:
        """Make the view; it appears when the run starts."""
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        super().__init__(shows_results=shows_results)
        console = console or Console(stderr=True)
        self._bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
        )
        self._task = self._bar.add_task("", total=None)
        self._last: deque[Record] = deque(maxlen=_LAST_RESULTS)
        self._warnings: dict[str, int] = {}
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def started(self, run: Path, cases: int, finished: int, world_size: int, transport: str) -> None:
        """Print the run directory, and show the view."""
        super().started(run, cases, finished, world_size, transport)
        self._bar.update(self._task, total=cases, completed=finished)
        self._live.start()
        self._show()

    def began(self, number: int, case: str) -> None:
        """Show the case in progress."""
        self._bar.update(self._task, description=case)
        self._show()

    def finished(self, record: Record) -> None:
        """Update the view; a result that is not ok is printed, so that it stays when the view is removed."""
        self.done += 1
        self._last.append(record)
        for note in record.notes:
            self._warnings[note] = self._warnings.get(note, 0) + 1
        if record.status not in ("ok", "skipped"):
            self._live.console.print(one_line(record), markup=False, highlight=False)
        self._bar.update(self._task, completed=self.done)
        self._show()

    def ended(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        """Remove the view, then print the results."""
        self._live.stop()
        super().ended(run, records, code, error)

    def _show(self) -> None:
        from rich.console import Group
        from rich.text import Text

        warnings = [
            Text(
                f"! {note}" + (f" ({count} cases)" if count > 1 else ""),
                style="yellow",
                no_wrap=True,
                overflow="ellipsis",
            )
            for note, count in list(self._warnings.items())[-_LAST_WARNINGS:]
        ]
        self._live.update(Group(_results(self._last), *warnings, self._bar), refresh=True)


def _results(records: Iterable[Record]) -> "Table":
    """A table of the last results."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1), show_header=True, header_style="dim")
    for name in ("case", "p50 (us)", "95% (us)", "busbw (GB/s)", "n", "status"):
        table.add_column(
            name, justify="left" if name in ("case", "status") else "right", no_wrap=True, overflow="ellipsis"
        )
    for record in records:
        time_us, rate = record.time_us, record.bus_gb_per_s
        interval = (
            f"{time_us.p50_lo:.4g}..{time_us.p50_hi:.4g}" if time_us and time_us.p50_lo and time_us.p50_hi else "-"
        )
        table.add_row(
            Text(record.case),
            f"{time_us.p50:.4g}" if time_us else "-",
            interval,
            "-" if rate is None else f"{rate:.3g}",
            f"{time_us.n}" if time_us else "-",
            Text(record.status, style=_STYLES.get(record.status, "bold red")),
        )
    return table


def listener_for(request: "RunRequest") -> "JsonListener | LineListener":
    """The listener for the output that the request names."""
    shows_results = request.results == "table" and not request.one_of_several
    if request.results == "json" and not request.one_of_several:
        return JsonListener()
    return progress_listener(shows_results=shows_results) if request.progress else SilentListener()


def progress_listener(*, shows_results: bool) -> LineListener:
    """A bar if stderr is a terminal, else plain lines."""
    in_place = sys.stderr.isatty() and os.environ.get("TERM", "dumb").lower() not in ("dumb", "unknown")
    return BarListener(shows_results=shows_results) if in_place else LineListener(shows_results=shows_results)
