"""A side of a comparison: one run or a directory of runs. Every process start counts once."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ncclbench.errors import UsageError
from ncclbench.store.records import Record
from ncclbench.store.run_directory import Run, read_runs


@dataclass(frozen=True)
class Side:
    """BASE or NEW.

    Attributes:
        name: the path from the command line.
        runs: the runs, at least one.
    """

    name: str
    runs: tuple[Run, ...]

    def records(self) -> Iterator[tuple[Run, Record]]:
        """All records, each with its run."""
        return ((run, record) for run in self.runs for record in run.records)


def read_side(path: Path) -> Side:
    """Read the run in `path`, or all runs in the subdirectories of `path`.

    Raises:
        UsageError: if there is no run, or a run cannot be read.
    """
    if (path / "manifest.json").exists() or not path.is_dir():
        return Side(str(path), tuple(read_runs([path])))
    inside = sorted(found.parent for found in path.glob("*/manifest.json"))
    if not inside:
        raise UsageError(f"{path} is no run directory, and has none in it")
    return Side(str(path), tuple(read_runs(inside)))
