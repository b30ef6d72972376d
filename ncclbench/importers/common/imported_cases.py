"""The result of an importer: the cases of a log, and the properties of the machine that the log states."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ncclbench.analysis.summary import MICRO
from ncclbench.importers.common.log_file import DamageError
from ncclbench.store.manifest import LoggedDevice
from ncclbench.store.records import Json, Record, Summary


@dataclass(frozen=True, kw_only=True)
class Stated:
    """Properties that the user states because the log does not have them.

    Attributes:
        pattern: the pattern that the tables measure.
        world_size: the number of ranks.
        skip_damaged: omit damaged lines and report them, instead of refusing the log.
    """

    pattern: str | None = None
    world_size: int | None = None
    skip_damaged: bool = False


@dataclass(frozen=True, kw_only=True)
class ImportedSamples:
    """Durations of single iterations in a log.

    Attributes:
        seconds_RN: shape (R, N).
        ranks: the rank of each row; None where the log has only the slowest rank's.
    """

    seconds_RN: NDArray[np.float64]
    ranks: Sequence[int] | None


@dataclass(frozen=True, kw_only=True)
class ImportedCase:
    """A case in a log: its record (whose `case` is not yet unique) and its samples."""

    record: Record
    samples: ImportedSamples | None = None


@dataclass(kw_only=True)
class Reading:
    """A log, read.

    Attributes:
        tool: the program that wrote the log.
        version: of the tool; None if the log does not have it.
        cases: all cases, in the order of the log.
        tables: of each table the fields of a `LoggedTable`; a record's `imported.table` counts in it.
        ranks: host, process and GPU of each rank, if the log has them.
        versions: of libraries.
        variables: environment variables that change what is measured.
        started: the time in the log; it may be local time.
        warnings: messages for the user.
        damaged: lines that were omitted because of `Stated.skip_damaged`.
    """

    tool: str
    version: str | None = None
    cases: list[ImportedCase] = field(default_factory=list)
    tables: list[Mapping[str, Json]] = field(default_factory=list)
    ranks: list[LoggedDevice] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    started: str | None = None
    warnings: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    @contextmanager
    def leaving_out(self, stated: Stated) -> Iterator[None]:
        """Stop at a damaged line; or, with `Stated.skip_damaged`, omit the line and report it."""
        try:
            yield
        except DamageError as damage:
            if not stated.skip_damaged:
                raise
            self.damaged.append(f"line {damage.number}: {damage}")


T = TypeVar("T")


def agreed(said: T | None, stated: T | None, flag: str, line: int | None) -> T | None:
    """The value in the log, or else the value that the user states.

    Raises:
        DamageError: if they contradict each other.
    """
    if said is not None and stated is not None and said != stated:
        raise DamageError(line or 1, f"the log says {said}, not {stated}: leave {flag} out", one_line=False)
    return said if said is not None else stated


def one_sample(us: float) -> Summary:
    """The summary of a single figure: a mean over launches, stored as one sample like a block of launches."""
    return Summary(n=1, min=us, p50=us, p50_lo=None, p50_hi=None, p95=None, p99=None, max=us, mean=us, cv=None)


def gb_per_s(nbytes: int | None, us: float | None) -> float | None:
    """S / t in GB/s of 1e9 bytes; None if either is unknown or the time is zero."""
    return nbytes / us * MICRO / 1e9 if nbytes is not None and us else None


def case_id(record: Record) -> str:
    """An id as `Case.id` forms it; a dtype that the log does not have is ``unknown``."""
    stem = f"{record.pattern}/{record.dtype or 'unknown'}/{record.bytes}/{record.timing}"
    return stem + "".join(f"/{name}={value}" for name, value in sorted(record.params.items()))
