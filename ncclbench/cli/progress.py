"""What a run shows while it goes on: a bar on a terminal, plain lines otherwise, nothing with --json.

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
    """A finished case in a line."""
    if record.time_us is None:
        return f"{record.case}: {record.status}: {record.reason}"
    rate = f", busbw {record.bus_gb_per_s:.3g} GB/s" if record.bus_gb_per_s is not None else ""
    if record.overlap is not None:
        rate += f", {record.overlap.share_percent:.0f}% hidden behind computing"
    wrong = f", WRONG: {record.reason}" if record.wrong else ""
    return f"{record.case}: p50 {record.time_us.p50:.4g} us{rate}, n {record.time_us.n}{wrong}"


def _complain(error: str) -> None:
    click.echo(f"ncclbench: error: {error}", err=True)


def _warn(text: str) -> None:
    click.echo(f"ncclbench: warning: {text}", err=True)


class JsonListener:
    """Nothing until the end; then one compact JSON object as the last line of stdout."""

    def noted(self, text: str) -> None:
        """A line on stderr."""
        click.echo(text, err=True)

    def warned(self, text: str) -> None:
        """A line on stderr, as errors."""
        _warn(text)

    def started(self, run: Path, cases: int, finished: int, world_size: int, transport: str) -> None:
        """Say nothing."""

    def began(self, number: int, case: str) -> None:
        """Say nothing."""

    def finished(self, record: Record) -> None:
        """Say nothing."""

    def ended(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        """The error, and the summary."""
        if error:
            _complain(error)
        self.summed_up(run, records, code, error)

    def summed_up(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        """The summary."""
        summary = {
            "run": str(run) if run else None,
            "exit_code": int(code),
            "error": error,
            "records": [msgspec.to_builtins(record) for record in records],
        }
        click.echo(msgspec.json.encode(summary).decode())


class SilentListener(JsonListener):
    """Nothing but errors and warnings: the process that made this start reports the results of all of them."""

    def ended(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        """What went wrong."""
        if error:
            _complain(error)

    def summed_up(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        """Say nothing."""


class LineListener:
    """One line per case on stderr, and the table on stdout at the end.

    Args:
        shows_results: whether it prints the table; the process that makes several starts prints that of all.
    """

    def __init__(self, *, shows_results: bool = True) -> None:
        """Nothing has been shown yet."""
        self.shows_results = shows_results
        self.total = 0
        self.done = 0

    def noted(self, text: str) -> None:
        """A line on stderr."""
        self._say(text)

    def started(self, run: Path, cases: int, finished: int, world_size: int, transport: str) -> None:
        """Say where the results go."""
        self.total, self.done = cases, finished
        resumed = f", {finished} finished before" if finished else ""
        what = f"{counted(cases, 'case')} on {counted(world_size, 'rank')}"
        self._say(f"{what} over {transport} -> {run}{resumed}")

    def warned(self, text: str) -> None:
        """A line on stderr."""
        _warn(text)

    def began(self, number: int, case: str) -> None:
        """Say nothing: the line comes with the result."""

    def finished(self, record: Record) -> None:
        """A line."""
        self.done += 1
        self._say(f"[{self.done}/{self.total}] {one_line(record)}")

    def ended(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        """The table of all records, where they are, and what went wrong."""
        if run is not None and self.shows_results:
            self.summed_up(run, records, code, None)
        if error:
            _complain(error)

    def summed_up(self, run: Path, records: list[Record], code: Exit, error: str | None) -> None:
        """The table of all records, and where they are."""
        if records:
            from ncclbench.config.plugins import load
            from ncclbench.store.run_directory import read_run

            click.echo(load("reports", "table").render([read_run(run)]))
        click.echo(f"run directory: {run}")

    def _say(self, text: str) -> None:
        click.echo(text, err=True)


class BarListener(LineListener):
    """On a terminal, in place: a bar, the case in progress, the last results, and what to know about them.

    Nothing is redrawn while a case is measured: a thread that does so would be measured too. Colours are rich's, which
    leaves them out with NO_COLOR; no text from outside is taken for markup.
    """

    def __init__(self, console: "Console | None" = None, *, shows_results: bool = True) -> None:
        """The view appears when the run starts."""
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
        """Say where the results go, and begin."""
        super().started(run, cases, finished, world_size, transport)
        self._bar.update(self._task, total=cases, completed=finished)
        self._live.start()
        self._show()

    def began(self, number: int, case: str) -> None:
        """The case in progress."""
        self._bar.update(self._task, description=case)
        self._show()

    def finished(self, record: Record) -> None:
        """One further; what is not good stays on the screen when the view is gone."""
        self.done += 1
        self._last.append(record)
        for note in record.notes:
            self._warnings[note] = self._warnings.get(note, 0) + 1
        if record.status not in ("ok", "skipped"):
            self._live.console.print(one_line(record), markup=False, highlight=False)
        self._bar.update(self._task, completed=self.done)
        self._show()

    def ended(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        """Clear the view, then as without one."""
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
    """The last results, as the table will have them."""
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
    """The listener that suits the request, and where stderr goes."""
    shows_results = request.results == "table" and not request.one_of_several
    if request.results == "json" and not request.one_of_several:
        return JsonListener()
    return progress_listener(shows_results=shows_results) if request.progress else SilentListener()


def progress_listener(*, shows_results: bool) -> LineListener:
    """A bar where stderr is a terminal, and plain lines otherwise."""
    in_place = sys.stderr.isatty() and os.environ.get("TERM", "dumb").lower() not in ("dumb", "unknown")
    return BarListener(shows_results=shows_results) if in_place else LineListener(shows_results=shows_results)
