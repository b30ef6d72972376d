"""The run directory: written so that a kill at any instant leaves every finished case readable.

RUN/manifest.json      written once, under a temporary name, then renamed
RUN/results.jsonl      one record a case, appended and fsynced
RUN/samples/*.parquet  temporary name, then renamed; in place before the record that names it
RUN/events.jsonl       appended; see `ncclbench.store.events`
"""

import fcntl
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import EnvironmentFault, UsageError
from ncclbench.store import events
from ncclbench.store.records import SCHEMA, Record
from ncclbench.store.regular_files import content_of
from ncclbench.store.stored_types import ManifestShape, RecordShape

# A case with one of these is finished: --resume does not measure it again.
FINISHED = frozenset({"ok", "wrong", "skipped"})

# Held by the one process that writes a run directory; released by the kernel when it ends, however it ends.
_LOCK = ".lock"
_WAIT = "wait for it, or name another directory"


@dataclass(frozen=True)
class Run:
    """A run directory, read.

    Attributes:
        path: where it is.
        manifest: plan, topology, provenance.
        records: the last record of each case in each process start, in the order in which they first ended.
        events: whole lines of the event log.
    """

    path: Path
    manifest: Mapping[str, Any]
    records: tuple[Record, ...]
    events: tuple[Mapping[str, Any], ...]

    @property
    def starts_of_a_case(self) -> int:
        """In how many process starts the plan wants each case to be measured."""
        return int(self.manifest.get("plan", {}).get("starts", 1))

    @property
    def mode_variables(self) -> dict[str, dict[str, str]]:
        """The plan's modes, in order, and the variables of each; every process start is of one of them."""
        plan = self.manifest.get("plan")
        listed = plan.get("modes") if isinstance(plan, dict) else None
        modes = [mode for mode in listed if isinstance(mode, dict)] if isinstance(listed, list) else []
        return {str(mode.get("name")): dict(mode.get("variables") or {}) for mode in modes}

    @property
    def declared_starts(self) -> int:
        """How many process starts the plan declares: those of a case, times its modes."""
        return self.starts_of_a_case * max(1, len(self.mode_variables))

    def missing_from(self, start: int) -> list[str]:
        """The planned cases that process start `start` has not finished."""
        plan = self.manifest.get("plan")
        listed = plan.get("cases") if isinstance(plan, dict) else None
        planned = listed if isinstance(listed, list) else []
        modes = list(self.mode_variables)
        mode = modes[start % len(modes)] if modes else None  # as `ncclbench.plan.start_modes` deals them out
        known = [case for case in planned if isinstance(case, dict) and "id" in case]
        cases = [str(case["id"]) for case in known if mode is None or case.get("mode") == mode]
        finished = {record.case for record in self.records if record.start == start and record.status in FINISHED}
        return [case for case in cases if case not in finished]

    @property
    def open_start(self) -> int | None:
        """The first process start that has not finished all its cases; None if all have."""
        return next((start for start in range(self.declared_starts) if self.missing_from(start)), None)

    @property
    def interrupted_in(self) -> str | None:
        """The case that had begun and never ended, if the run was cut off without a word."""
        begun: str | None = None
        for event in self.events:
            if event["kind"] == "case":
                begun = str(event.get("case"))
            elif event["kind"] in ("end", "lost", "result"):
                begun = None
        return begun


def read_run(path: Path) -> Run:
    """The run in `path`, whole or cut off.

    Raises:
        UsageError: if it is no run directory, is damaged (naming the line), or is of a newer schema.
        EnvironmentFault: if a file of it cannot be read.
    """
    manifest_file = path / "manifest.json"
    content = content_of(manifest_file)
    if content is None:
        raise UsageError(f"{path} is no run directory: it has no manifest.json")
    try:
        manifest = msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"{manifest_file} is damaged: {error}") from None
    _refuse_newer(manifest, manifest_file)
    try:
        shape = msgspec.convert(manifest, ManifestShape)
    except msgspec.ValidationError as error:
        raise UsageError(f"{manifest_file} is damaged: {error}") from None
    records = _read_records(path / "results.jsonl", shape)
    return Run(path, manifest, tuple(records), tuple(events.read_events(path / "events.jsonl")))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """All the runs, or one line that names each directory that cannot be read and why.

    Raises:
        UsageError: if any of `paths` is no run directory, is damaged, or is of a newer schema.
    """
    runs, problems = [], []
    for path in paths:
        try:
            runs.append(read_run(path))
        except UsageError as error:
            inside = sorted(str(found.parent) for found in path.glob("*/manifest.json")) if path.is_dir() else []
            hint = f" (it has runs in it: {', '.join(inside[:3])}{', ...' if len(inside) > 3 else ''})"
            problems.append(f"{error}{hint if inside else ''}")
    if problems:
        count = f"{len(problems)} of {len(paths)} runs cannot be read: " if len(paths) > 1 else ""
        raise UsageError(count + "; ".join(problems))
    return runs


def _refuse_newer(data: Any, where: Path | str) -> None:
    schema = data.get("schema") if isinstance(data, dict) else None
    if type(schema) is not int or schema < 1:  # a bool is an int to isinstance
        raise UsageError(f"{where} has no schema number")
    if schema > SCHEMA:
        raise UsageError(f"{where} has schema {schema}; this ncclbench reads up to {SCHEMA}: use a newer one")


def _read_records(path: Path, manifest: ManifestShape) -> list[Record]:
    latest: dict[tuple[int, str], Record] = {}
    for number, line in enumerate(events.whole_lines(path), 1):
        try:
            _refuse_newer(msgspec.json.decode(line), f"{path}, line {number}")
            shape = msgspec.json.decode(line, type=RecordShape)
            if missing := manifest.lacks(shape.imported):
                raise msgspec.ValidationError(missing)
            record = msgspec.json.decode(line, type=Record)
        except (msgspec.DecodeError, RecursionError) as error:
            raise UsageError(f"{path}, line {number} is damaged: {error}") from None
        latest[record.start, record.case] = record
    return list(latest.values())


def what_is_kept(path: Path) -> str:
    """The end of a message about a run that was cut short: what of it there is, if there is anything."""
    return "; finished cases are kept, go on with --resume" if (path / "manifest.json").exists() else ""


_HINT = "name another directory, or go on with --resume"


def check_target(path: Path, *, resume: bool, hint: str = _HINT) -> None:
    """Refuse an output directory that a run could not use, before any rank starts.

    Raises:
        UsageError: if it holds something and is not to be resumed, is no run to resume, or cannot be written.
    """
    try:
        str(path).encode()  # a name that is no text could not be written into the manifest
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
    """What a run leaves that was killed before its manifest was there: nothing that could be resumed, or lost."""
    empty_samples = entry.name == "samples" and entry.is_dir() and not any(entry.iterdir())
    return empty_samples or entry.name == _LOCK or entry.name == "manifest.json.tmp"


@contextmanager
def _storing(what: str, advice: str = "what was stored before is intact") -> Iterator[None]:
    """A full or vanished disk is the environment's fault, and says so in one line."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(f"could not store {what}: {error}; {advice}") from error


def _lock(path: Path, advice: str) -> int:
    """Take the directory for this process; the open descriptor is the lock.

    Raises:
        UsageError: if another process has it; `advice` says what to do then.
    """
    file = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise UsageError(f"another ncclbench is writing in {path}; {advice}") from None
    except OSError:
        pass  # a file system without locks: better to measure than not
    return file


class RunWriter:
    """Appends to a run directory. One process writes at a time; its threads may share a writer."""

    def __init__(self, path: Path, lock: int | None = None) -> None:
        """Go on where the directory stands, cutting off what a crash has torn; `lock` is kept until the run ends."""
        self.path = path
        self._release = weakref.finalize(self, os.close, lock) if lock is not None else None
        self._lock = threading.Lock()
        for name in ("results.jsonl", "events.jsonl"):
            _cut_torn_line(path / name)
        lines = events.whole_lines(path / "events.jsonl")
        self._previous = events.line_hash(lines[-1]) if lines else events.GENESIS
        self.events = len(lines)
        self._stored = len(events.whole_lines(path / "results.jsonl"))

    @classmethod
    def create(cls, path: Path, manifest: Mapping[str, Any]) -> "RunWriter":
        """A new run directory.

        Raises:
            UsageError: if the directory cannot be used; see `check_target`.
            EnvironmentFault: if the disk fails.
        """
        check_target(path, resume=False)
        with _storing(str(path), "nothing was stored; name another directory with -o"):
            (path / "samples").mkdir(parents=True, exist_ok=True)
            lock = _lock(path, _WAIT)
            _write_whole(path / "manifest.json", msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
            return cls(path, lock)

    @classmethod
    def resume(cls, path: Path, manifest: Mapping[str, Any]) -> "RunWriter":
        """An existing run, to go on with.

        Raises:
            UsageError: if its plan, topology or transport differs from `manifest`, naming the difference.
        """
        stored = read_run(path).manifest
        for key in ("plan", "topology", "transport", "world_size"):
            difference = first_difference(stored.get(key), manifest.get(key), key)
            if difference:
                raise UsageError(f"cannot resume {path}: {difference}")
        with _storing(str(path)):
            (path / "samples").mkdir(exist_ok=True)
            return cls(path, _lock(path, _WAIT))

    @classmethod
    def reopen(cls, path: Path) -> "RunWriter":
        """A run that has ended, to add to its event log.

        Raises:
            UsageError: if it is still being written: two writers would break the chain of its events.
        """
        return cls(path, _lock(path, "judge it when it has ended"))

    def append(
        self,
        record: Record,
        labels: list[str] | None = None,
        seconds_RNK: NDArray[np.float64] | None = None,
        ranks_R: NDArray[np.int32] | None = None,
    ) -> Record:
        """Store a record, and its samples before it; returns the record as stored, with the samples' path.

        The event log gets a `result` with the hashes of both, so that neither can be changed alone afterwards.
        """
        hashes = {}
        with self._lock, _storing(record.case):
            if seconds_RNK is not None and labels is not None:
                name = f"samples/{self._stored:05d}-{record.pattern}-{record.bytes}-{record.timing}.parquet"
                write_samples(self.path / name, labels, seconds_RNK, ranks_R)
                record = msgspec.structs.replace(record, samples=name)
                hashes["samples_sha256"] = events.file_hash(self.path / name)
            line = msgspec.json.encode(record)
            _append_line(self.path / "results.jsonl", line + b"\n")
            hashes["record_sha256"] = events.line_hash(line)
            self._stored += 1
        self.event("result", case=record.case, start=record.start, status=record.status, **hashes)
        return record

    def event(self, kind: str, **fields: Any) -> None:
        """Append to the event log; an `end` is a writer's last word, and the directory is free again."""
        with self._lock, _storing(f"event {kind}"):
            line = events.encode(kind, self._previous, fields)
            _append_line(self.path / "events.jsonl", line)
            self._previous = events.line_hash(line)
        if kind == "end" and self._release is not None:
            self._release()


def first_difference(stored: Any, now: Any, path: str) -> str | None:
    """Where two pieces of plain data first differ, in words; None if they are equal."""
    # Both through JSON: a tuple and a list, or 4 and 4.0, are the same on disk.
    stored, now = (msgspec.json.decode(msgspec.json.encode(data)) for data in (stored, now))
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in [*stored, *(key for key in now if key not in stored)]:
            if key == "timeout":  # it changes no figure, and one that was too short is a reason to resume
                continue
            difference = first_difference(stored.get(key), now.get(key), f"{path}.{key}")
            if difference:
                return difference
        return None
    if isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now):
        pairs = enumerate(zip(stored, now, strict=True))
        return next((d for k, (a, b) in pairs if (d := first_difference(a, b, f"{path}[{k}]"))), None)
    if isinstance(stored, list) and isinstance(now, list):
        return f"{path} had {len(stored)} entries, and now has {len(now)}"
    return None if stored == now else f"{path} was {stored!r}, and now is {now!r}"


def write_samples(
    path: Path, labels: list[str], seconds_RNK: NDArray[np.float64], ranks_R: NDArray[np.int32] | None = None
) -> None:
    """Raw samples as Parquet: rank int32, iteration int32, phase dictionary<string>, seconds float64.

    Args:
        path: of the file.
        labels: one a column.
        seconds_RNK: shape (R, N, columns).
        ranks_R: the rank of each row, from 0 in order if None; -1 is stored as null: a log does not say whose it is.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    ranks, samples, columns = seconds_RNK.shape
    ends = np.cumsum([0, *(len(label.encode()) for label in labels)], dtype=np.int32)
    names = pa.Array.from_buffers(
        pa.string(), len(labels), [None, pa.py_buffer(ends.data), pa.py_buffer("".join(labels).encode())]
    )
    phase = np.tile(np.arange(columns, dtype=np.int32), ranks * samples)
    known = np.arange(ranks, dtype=np.int32) if ranks_R is None else ranks_R
    rank = np.repeat(known, samples * columns)
    iteration = np.tile(np.repeat(np.arange(samples, dtype=np.int32), columns), ranks)
    seconds = np.ascontiguousarray(seconds_RNK).ravel()
    there = ~np.isnan(seconds)  # an iteration need not have every phase
    table = pa.table(
        {
            "rank": _ranks(rank[there]),
            "iteration": _column(pa.int32(), iteration[there]),
            "phase": pa.DictionaryArray.from_arrays(_column(pa.int32(), phase[there]), names),
            "seconds": _column(pa.float64(), seconds[there]),
        }
    )
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # half a file is worth nothing, and its room may do for the last word
        raise
    _sync_folder(path.parent)


def _ranks(ranks: NDArray[np.int32]) -> Any:
    """An Arrow array in which -1 is null."""
    import pyarrow as pa

    if (ranks >= 0).all():
        return _column(pa.int32(), ranks)
    there = np.packbits(ranks >= 0, bitorder="little")
    return pa.Array.from_buffers(pa.int32(), len(ranks), [pa.py_buffer(there.data), pa.py_buffer(ranks.data)])


def _column(kind: Any, values: NDArray[Any]) -> Any:
    """An Arrow array on NumPy's own memory; `pyarrow.array` would import pandas to look at its argument."""
    import pyarrow as pa

    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values.data)])


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _append_line(path: Path, line: bytes) -> None:
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        if path.exists():  # a full disk may have taken half the line: nothing of it stays
            os.truncate(path, before)
        raise


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
