"""What a run tells its caller while it goes on."""

from pathlib import Path
from typing import Protocol

from ncclbench.errors import Exit
from ncclbench.store.records import Record


class Listener(Protocol):
    """Receives the events of a run, on rank 0 and in the process that starts the ranks."""

    def noted(self, text: str) -> None:
        """Something to know about the progress of several process starts."""

    def warned(self, text: str) -> None:
        """Something is not as it should be, and the run goes on."""

    def started(self, run: Path, cases: int, finished: int, world_size: int, transport: str) -> None:
        """The run directory is open; `finished` of its `cases` need not be measured again."""

    def began(self, number: int, case: str) -> None:
        """A case begins; `number` counts from 0."""

    def finished(self, record: Record) -> None:
        """A case has ended, with any status."""

    def ended(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        """The ranks have nothing more to do; `run` is None if no run directory was opened."""

    def summed_up(self, run: Path, records: list[Record], code: Exit, error: str | None) -> None:
        """All process starts have been made, each of which has reported its own errors."""


class QuietListener:
    """Reports nothing: the caller reads the run directory."""

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
