"""What a run shows while it goes on: a bar on a terminal, plain lines otherwise, nothing with --json.

Progress goes to stderr, results to stdout.
"""

import os
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from ncclbench.errors import Exit
from ncclbench.store.records import Record
from ncclbench.units import counted

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


def _warn(text: str) -> None:
    click.echo(f"ncclbench: warning: {text}", err=True)


class JsonListener:
    """Nothing until the end; then one compact JSON object as the last line of stdout."""

    says_errors = True  # on stderr as well

    def warned(self, text: str) -> None:
        """A line on stderr, as errors."""
        _warn(text)

    def started(self, run: Path, cases: int, finished: int, header: Mapping[str, Any]) -> None:
        """Say nothing."""

    def began(self, number: int, case: str) -> None:
        """Say nothing."""

    def finished(self, record: Record) -> None:
        """Say nothing."""

    def ended(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        """The summary."""
        summary = {
            "run": str(run) if run else None,
            "exit_code": int(code),
            "error": error,
            "records": [msgspec.to_builtins(record) for record in records],
        }
        if error and self.says_errors:
            click.echo(f"ncclbench: error: {error}", err=True)
        click.echo(msgspec.json.encode(summary).decode())


class SilentListener(JsonListener):
    """Nothing but an error: whoever made this process start shows the results of all of them."""

    def ended(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        """What went wrong."""
        if error:
            click.echo(f"ncclbench: error: {error}", err=True)


class LineListener:
    """A line a case on stderr, the table on stdout at the end."""

    shows_results = True

    def __init__(self) -> None:
        """Nothing has been shown yet."""
        self.total = 0
        self.done = 0

    def started(self, run: Path, cases: int, finished: int, header: Mapping[str, Any]) -> None:
        """Say where the results go."""
        self.total, self.done = cases, finished
        resumed = f", {finished} finished before" if finished else ""
        what = f"{counted(cases, 'case')} on {counted(header['world_size'], 'rank')}"
        self._say(f"{what} over {header['transport']} -> {run}{resumed}")

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
        if run is not None and records and self.shows_results:
            from ncclbench.config.plugins import load
            from ncclbench.store.run_directory import read_run

            click.echo(load("reports", "table").render([read_run(run)]))
        if run is not None and self.shows_results:
            click.echo(f"run directory: {run}")
        if error:
            click.echo(f"ncclbench: error: {error}", err=True)

    def _say(self, text: str) -> None:
        click.echo(text, err=True)


class BarListener(LineListener):
    """On a terminal, in place: a bar, the case in progress, the last results, and what to know about them.

    Nothing is redrawn while a case is measured: a thread that does so would be measured too. Colours are rich's, which
    leaves them out with NO_COLOR; no text from outside is taken for markup.
    """

    def __init__(self, console: Any = None) -> None:
        """The view appears when the run starts."""
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        super().__init__()
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

    def started(self, run: Path, cases: int, finished: int, header: Mapping[str, Any]) -> None:
        """Say where the results go, and begin."""
        super().started(run, cases, finished, header)
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


def _results(records: Iterable[Record]) -> Any:
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


def listener_for(*, as_json: bool, of_several: bool = False) -> "JsonListener | LineListener":
    """The listener that suits where stderr goes; one of several process starts leaves the results to its parent."""
    if as_json:
        return SilentListener() if of_several else JsonListener()
    in_place = sys.stderr.isatty() and os.environ.get("TERM", "dumb").lower() not in ("dumb", "unknown")
    listener = BarListener() if in_place else LineListener()
    listener.shows_results = not of_several
    return listener
