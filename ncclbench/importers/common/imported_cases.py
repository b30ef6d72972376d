"""What an importer makes of a log: cases, and what the log says of the machine that they were measured on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ncclbench.analysis.summary import MICRO
from ncclbench.importers.common.log_file import DamageError
from ncclbench.store.records import Record, Summary


@dataclass(frozen=True, kw_only=True)
class Stated:
    """What the user says of a log that does not say it itself.

    Attributes:
        pattern: what the tables measure.
        world_size: how many ranks there were.
        skip_damaged: leave damaged lines out, and say so, instead of refusing the log.
    """

    pattern: str | None = None
    world_size: int | None = None
    skip_damaged: bool = False


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Durations that a log has one by one.

    Attributes:
        seconds_RN: shape (R, N).
        ranks: the rank of each row; None where the log has only the slowest rank's.
    """

    seconds_RN: NDArray[np.float64]
    ranks: Sequence[int] | None


@dataclass(frozen=True, kw_only=True)
class Found:
    """A case in a log: its record (whose `case` is not yet unique) and its samples."""

    record: Record
    samples: Samples | None = None


@dataclass(kw_only=True)
class Reading:
    """A log, read.

    Attributes:
        tool: who wrote it.
        version: of the tool; None where the log does not say.
        found: the cases, in the order of the log.
        tables: facts of each table, plain data for the manifest; a record's `imported["table"]` counts in it.
        ranks: host, process and GPU of each rank, where the log says so.
        versions: of libraries.
        variables: environment variables that change what is measured.
        started: as the log has it; it may be local time.
        warnings: what a user must know.
        damaged: lines that were left out, as `Stated.skip_damaged` allows.
    """

    tool: str
    version: str | None = None
    found: list[Found] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    started: str | None = None
    warnings: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    @contextmanager
    def leaving_out(self, stated: Stated) -> Iterator[None]:
        """A damaged line ends the reading; or, if the user wants it so, is left out and named."""
        try:
            yield
        except DamageError as damage:
            if not stated.skip_damaged:
                raise
            self.damaged.append(f"line {damage.number}: {damage}")


T = TypeVar("T")


def agreed(said: T | None, stated: T | None, flag: str, line: int | None) -> T | None:
    """What the log says, or else what the user states of it.

    Raises:
        DamageError: if they contradict each other.
    """
    if said is not None and stated is not None and said != stated:
        raise DamageError(line or 1, f"the log says {said}, not {stated}: leave {flag} out", one_line=False)
    return said if said is not None else stated


def one_sample(us: float) -> Summary:
    """The summary of a log's one figure: a mean over launches, but one sample of ours, as a block of launches is."""
    return Summary(n=1, min=us, p50=us, p50_lo=None, p50_hi=None, p95=None, p99=None, max=us, mean=us, cv=None)


def gb_per_s(nbytes: int | None, us: float | None) -> float | None:
    """S / t in GB/s of 1e9 bytes; None where either is not known, or no time has passed."""
    return nbytes / us * MICRO / 1e9 if nbytes is not None and us else None


def case_id(record: Record) -> str:
    """As `Case.id` has it; a dtype that the log does not say is ``unknown``."""
    stem = f"{record.pattern}/{record.dtype or 'unknown'}/{record.bytes}/{record.timing}"
    return stem + "".join(f"/{name}={value}" for name, value in sorted(record.params.items()))
