"""Write a run directory so that every finished case survives a kill at any time.

RUN/manifest.json      written once, under a temporary name, then renamed
RUN/results.jsonl      one record per case, appended and fsynced
RUN/samples/*.parquet  written under a temporary name, then renamed, before the record that names it
RUN/events.jsonl       appended; see `ncclbench.store.events`
"""

import fcntl
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import EnvironmentFault, UsageError
from ncclbench.store import events
from ncclbench.store.files import append_line, cut_torn_line, file_hash, line_hash, whole_lines, write_whole
from ncclbench.store.manifest import Manifest
from ncclbench.store.records import Record
from ncclbench.store.run_directory import first_difference, read_run
from ncclbench.store.samples import write_samples

# Held by the one process that writes a run directory; the kernel releases it when the process ends.
_LOCK = ".lock"
_WAIT = "wait for it, or name another directory"


def what_is_kept(path: Path) -> str:
    """The end of a message about an interrupted run: that finished cases are kept, if the directory exists."""
    return "; finished cases are kept, go on with --resume" if (path / "manifest.json").exists() else ""


_HINT = "name another directory, or go on with --resume"


def check_target(path: Path, *, resume: bool, hint: str = _HINT) -> None:
    """Refuse an output directory that a run cannot use, before any rank starts.

    Raises:
        UsageError: if it is not empty and `resume` is false, is no run to resume, or cannot be written.
    """
    try:
        str(path).encode()  # the manifest cannot hold a name that is no valid text
        if "\0" in str(path):
            raise ValueError("it has a null byte in it")
        _check_target(path, resume, hint)
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(f"-o {str(path)!r} cannot be used: {error}") from None


def _check_target(path: Path, resume: bool, hint: str) -> None:
    if path.exists() and not path.is_dir():
        raise UsageError(f"-o {path} is a file; name a directory that is new or empty")
    if resume:
        read_run(path)
    elif path.is_dir() and any(not _is_leftover(entry) for entry in path.iterdir()):
        raise UsageError(f"-o {path} is not empty; {hint}")
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise UsageError(f"-o {path}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"-o {path}: no permission to write in {nearest}")


def _is_leftover(entry: Path) -> bool:
    """Whether a run that was killed before it wrote its manifest left the entry; it holds no data."""
    empty_samples = entry.name == "samples" and entry.is_dir() and not any(entry.iterdir())
    return empty_samples or entry.name == _LOCK or entry.name == "manifest.json.tmp"


@contextmanager
def _storing(what: str, advice: str = "what was stored before is intact") -> Iterator[None]:
    """Report a full or missing disk as a fault of the environment, in one line."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(f"could not store {what}: {error}; {advice}") from error


def _lock(path: Path, advice: str) -> int:
    """Lock the directory for this process; the open descriptor is the lock.

    Raises:
        UsageError: if another process holds the lock; the message ends with `advice`.
    """
    file = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise UsageError(f"another ncclbench is writing in {path}; {advice}") from None
    except OSError:
        pass  # the file system has no locks: measure without one
    return file


def _without_sources(manifest: Manifest) -> Manifest:
    """The manifest without the sources of the topology, whose wording depends on the version."""
    if manifest.topology is None:
        return manifest
    return msgspec.structs.replace(manifest, topology=msgspec.structs.replace(manifest.topology, sources={}))


class RunWriter:
    """Append to a run directory. One process writes at a time; its threads may share a writer."""

    def __init__(self, path: Path, lock: int | None = None) -> None:
        """Continue after the last complete line of each file; `lock` is kept until the run ends."""
        self.path = path
        self._release = weakref.finalize(self, os.close, lock) if lock is not None else None
        self._lock = threading.Lock()
        for name in ("results.jsonl", "events.jsonl"):
            cut_torn_line(path / name)
        lines = whole_lines(path / "events.jsonl")
        self._previous = line_hash(lines[-1]) if lines else events.GENESIS
        self.events = len(lines)
        self._stored = len(whole_lines(path / "results.jsonl"))

    @classmethod
    def create(cls, path: Path, manifest: Manifest) -> "RunWriter":
        """Create a new run directory.

        Raises:
            UsageError: if the directory cannot be used; see `check_target`.
            EnvironmentFault: if the disk fails.
        """
        check_target(path, resume=False)
        with _storing(str(path), "nothing was stored; name another directory with -o"):
            (path / "samples").mkdir(parents=True, exist_ok=True)
            lock = _lock(path, _WAIT)
            write_whole(path / "manifest.json", msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
            return cls(path, lock)

    @classmethod
    def resume(cls, path: Path, manifest: Manifest) -> "RunWriter":
        """Continue an existing run.

        Raises:
            UsageError: if its plan, topology or transport differs from `manifest`; the message names the difference.
        """
        stored, manifest = (_without_sources(one) for one in (read_run(path).manifest, manifest))
        for key in ("plan", "topology", "transport", "world_size"):
            difference = first_difference(getattr(stored, key), getattr(manifest, key), key)
            if difference:
                raise UsageError(f"cannot resume {path}: {difference}")
        with _storing(str(path)):
            (path / "samples").mkdir(exist_ok=True)
            return cls(path, _lock(path, _WAIT))

    @classmethod
    def reopen(cls, path: Path) -> "RunWriter":
        """Reopen a finished run to append to its event log.

        Raises:
            UsageError: if another process still writes it, since two writers would break the chain of events.
        """
        return cls(path, _lock(path, "judge it when it has ended"))

    def append(
        self,
        record: Record,
        labels: list[str] | None = None,
        seconds_RNK: NDArray[np.float64] | None = None,
        ranks_R: NDArray[np.int32] | None = None,
    ) -> Record:
        """Store a record, with its samples before it; returns the stored record, with the path of the samples.

        The event `result` holds the hashes of both, so that a later change of either is found.
        """
        hashes = {}
        with self._lock, _storing(record.case):
            if seconds_RNK is not None and labels is not None:
                name = f"samples/{self._stored:05d}-{record.pattern}-{record.bytes}-{record.timing}.parquet"
                write_samples(self.path / name, labels, seconds_RNK, ranks_R)
                record = msgspec.structs.replace(record, samples=name)
                hashes["samples_sha256"] = file_hash(self.path / name)
            line = msgspec.json.encode(record)
            append_line(self.path / "results.jsonl", line + b"\n")
            hashes["record_sha256"] = line_hash(line)
            self._stored += 1
        self.event("result", case=record.case, start=record.start, status=record.status, **hashes)
        return record

    def event(self, kind: str, **fields: object) -> None:
        """Append to the event log; after an `end` the lock is released."""
        with self._lock, _storing(f"event {kind}"):
            line = events.encode(kind, self._previous, fields)
            append_line(self.path / "events.jsonl", line)
            self._previous = line_hash(line)
        if kind == "end" and self._release is not None:
            self._release()
