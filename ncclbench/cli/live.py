"""What a run shows while it goes on: a bar on a terminal, plain lines otherwise, nothing with --json.

Progress goes to stderr, results to stdout.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from ncclbench.errors import Exit
from ncclbench.store.records import Record


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
        if error:
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
        self._say(f"{cases} cases on {header['world_size']} ranks over {header['transport']} -> {run}{resumed}")

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
            from ncclbench.registry import load
            from ncclbench.store.directory import read_run

            click.echo(load("reports", "table").render([read_run(run)]))
        if run is not None and self.shows_results:
            click.echo(f"run directory: {run}")
        if error:
            click.echo(f"ncclbench: error: {error}", err=True)

    def _say(self, text: str) -> None:
        click.echo(text, err=True)


class BarListener(LineListener):
    """A bar on a terminal, with the case in progress and the last result."""

    def __init__(self) -> None:
        """The bar appears when the run starts."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        super().__init__()
        self._bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)

    def started(self, run: Path, cases: int, finished: int, header: Mapping[str, Any]) -> None:
        """Say where the results go, and start the bar."""
        super().started(run, cases, finished, header)
        self._bar.update(self._task, total=cases, completed=finished)
        # Refreshed by hand between cases: a thread that redraws would be measured too.
        self._bar.live.auto_refresh = False
        self._bar.start()

    def began(self, number: int, case: str) -> None:
        """The case in progress."""
        self._bar.update(self._task, description=case, refresh=True)

    def finished(self, record: Record) -> None:
        """One further; what is not good stays on the screen."""
        self.done += 1
        if record.status not in ("ok", "skipped"):
            self._bar.console.print(one_line(record), markup=False, highlight=False)
        self._bar.update(self._task, completed=self.done, refresh=True)

    def ended(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        """Clear the bar, then as without one."""
        self._bar.stop()
        super().ended(run, records, code, error)


def listener_for(*, as_json: bool, of_several: bool = False) -> "JsonListener | LineListener":
    """The listener that suits where stderr goes; one of several process starts leaves the results to its parent."""
    if as_json:
        return SilentListener() if of_several else JsonListener()
    listener = BarListener() if sys.stderr.isatty() else LineListener()
    listener.shows_results = not of_several
    return listener
