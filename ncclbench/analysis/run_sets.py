"""One side of a comparison: a run, or a directory of runs; every process start in it counts once."""

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
        name: as it was named on the command line.
        runs: at least one.
    """

    name: str
    runs: tuple[Run, ...]

    def records(self) -> Iterator[tuple[Run, Record]]:
        """Every record, with its run."""
        return ((run, record) for run in self.runs for record in run.records)


def read_side(path: Path) -> Side:
    """The run in `path`, or all runs in the directories in `path`.

    Raises:
        UsageError: if there is no run there, or one that cannot be read.
    """
    if (path / "manifest.json").exists() or not path.is_dir():
        return Side(str(path), tuple(read_runs([path])))
    inside = sorted(found.parent for found in path.glob("*/manifest.json"))
    if not inside:
        raise UsageError(f"{path} is no run directory, and has none in it")
    return Side(str(path), tuple(read_runs(inside)))
