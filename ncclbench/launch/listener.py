"""`Listener`: the events that a run reports to its caller."""

from pathlib import Path
from typing import Protocol

from ncclbench.errors import Exit
from ncclbench.store.records import Record


class Listener(Protocol):
    """Receives the events of a run, on rank 0 and in the process that makes the process starts."""

    def noted(self, text: str) -> None:
        """A remark about the progress of several process starts."""

    def warned(self, text: str) -> None:
        """A problem that does not end the run."""

    def started(self, run: Path, cases: int, finished: int, world_size: int, transport: str) -> None:
        """The run directory is open; `finished` of its `cases` are not measured again."""

    def began(self, number: int, case: str) -> None:
        """A case begins; `number` counts from 0."""

    def finished(self, record: Record) -> None:
        """A case has ended with any status."""

    def ended(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        """This process start has ended; `run` is None if no run directory was opened."""

    def summed_up(self, run: Path, records: list[Record], code: Exit, error: str | None) -> None:
        """All process starts have ended; each has reported its own errors."""


class QuietListener:
    """A listener that does nothing; the caller reads the run directory."""

    def noted(self, text: str) -> None:
        """Do nothing."""

    def warned(self, text: str) -> None:
        """Do nothing."""

    def started(self, run: Path, cases: int, finished: int, world_size: int, transport: str) -> None:
        """Do nothing."""

    def began(self, number: int, case: str) -> None:
        """Do nothing."""

    def finished(self, record: Record) -> None:
        """Do nothing."""

    def ended(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        """Do nothing."""

    def summed_up(self, run: Path, records: list[Record], code: Exit, error: str | None) -> None:
        """Do nothing."""
