"""Read a run directory: manifest, records and events as typed objects. An interrupted run can be read too.

RUN/manifest.json      written once
RUN/results.jsonl      one record per case
RUN/samples/*.parquet  raw durations; see `ncclbench.store.samples`
RUN/events.jsonl       see `ncclbench.store.events`
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path

import msgspec

from ncclbench.errors import UsageError
from ncclbench.store.events import Event, read_events
from ncclbench.store.files import content_of, decoded, whole_lines
from ncclbench.store.manifest import Manifest
from ncclbench.store.records import SCHEMA, Record
from ncclbench.topology import Topology

# A case with one of these statuses is finished: --resume does not measure it again.
FINISHED = frozenset({"ok", "wrong", "skipped"})


class Stamp(StrEnum):
    """The stamps that every table, page and verdict about a run shows, in the order of ``verdict.json``."""

    CPU_ONLY = "cpu only"
    SHARED_GPUS = "shared GPUs"
    ONE_MACHINE = "nodes of one machine"
    NVLS_OFF = "NVLS switched off"
    SIMULATED = "simulated"
    IMPORTED = "imported"
    FORCED = "forced"
    SYNTHETIC = "synthetic"
    REDACTED = "redacted"


@dataclass(frozen=True)
class Run:
    """The content of a run directory, without its samples.

    Attributes:
        path: path of the directory.
        manifest: plan, topology, provenance.
        records: the last record of each case in each process start, in the order in which the cases first ended.
        events: the complete lines of the event log.
    """

    path: Path
    manifest: Manifest
    records: tuple[Record, ...]
    events: tuple[Event, ...]

    @cached_property
    def topology(self) -> Topology | None:
        """The topology; None unless the manifest has a valid one for the run's number of ranks."""
        record = self.manifest.topology
        if record is None or not record.nodes or len(record.nodes) != self.manifest.world_size:
            return None
        try:
            return Topology.from_record(record)
        except ValueError:
            return None

    @cached_property
    def is_simulated(self) -> bool:
        """Whether any time comes from a model.

        The manifest states it, or the transport of the run or of a record is ``model``. A run whose imported logs
        differ has no transport of its own.
        """
        manifest = self.manifest
        named = {manifest.transport, *(record.transport for record in self.records)}
        return manifest.simulated or "model" in named

    @cached_property
    def stamps(self) -> tuple[Stamp, ...]:
        """The stamps that every table, page and verdict about this run shows."""
        manifest = self.manifest
        found = {
            Stamp.CPU_ONLY: manifest.device == "cpu" and not self.is_simulated,  # a model does not use the processor
            Stamp.SHARED_GPUS: manifest.provenance.ranks_per_gpu > 1,
            Stamp.ONE_MACHINE: manifest.shares_a_machine,
            Stamp.SIMULATED: self.is_simulated,
            Stamp.IMPORTED: bool(manifest.imported),
            Stamp.SYNTHETIC: manifest.synthetic,
            Stamp.REDACTED: manifest.redacted,
        }
        return tuple(stamp for stamp, holds in found.items() if holds)

    @property
    def starts_of_a_case(self) -> int:
        """The number of process starts in which the plan measures each case."""
        starts = self.manifest.plan.starts
        return starts if isinstance(starts, int) else 1

    @property
    def mode_variables(self) -> dict[str, dict[str, str]]:
        """The variables of each mode, in the order of the plan; every process start has one of the modes."""
        return {mode.name: mode.variables for mode in self.manifest.plan.modes}

    @property
    def declared_starts(self) -> int:
        """The number of process starts that the plan declares: starts per case times modes."""
        return self.starts_of_a_case * max(1, len(self.mode_variables))

    @property
    def present_starts(self) -> int:
        """The number of declared starts that have finished all their cases."""
        return sum(not self.missing_from(start) for start in range(self.declared_starts)) if self.records else 0

    def missing_from(self, start: int) -> list[str]:
        """The planned cases that process start `start` has not finished."""
        modes = list(self.mode_variables)
        mode = modes[start % len(modes)] if modes else None  # as `ncclbench.plan.start_modes` assigns them
        cases = [case.id for case in self.manifest.plan.cases if mode is None or case.mode == mode]
        finished = {record.case for record in self.records if record.start == start and record.status in FINISHED}
        return [case for case in cases if case is not None and case not in finished]

    @property
    def open_start(self) -> int | None:
        """The first process start that has not finished all its cases; None if all have."""
        return next((start for start in range(self.declared_starts) if self.missing_from(start)), None)

    @property
    def interrupted_in(self) -> str | None:
        """The case that began and did not end, if the run was interrupted without an event."""
        begun: str | None = None
        for event in self.events:
            if event.kind == "case":
                begun = str(event.case)
            elif event.kind in ("end", "lost", "result"):
                begun = None
        return begun


def read_run(path: Path) -> Run:
    """Read the run in `path`, complete or interrupted.

    Raises:
        UsageError: if it is no run directory, is damaged (the message names the line), or has a newer schema.
        EnvironmentFault: if a file cannot be read.
    """
    manifest_file = path / "manifest.json"
    content = content_of(manifest_file)
    if content is None:
        raise UsageError(f"{path} is no run directory: it has no manifest.json")
    manifest = decoded(content, Manifest, manifest_file, SCHEMA)
    records = _read_records(path / "results.jsonl", manifest)
    return Run(path, manifest, tuple(records), tuple(read_events(path / "events.jsonl")))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read several runs.

    Raises:
        UsageError: if any of `paths` is no run directory, is damaged, or has a newer schema; the message names each.
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


def _read_records(path: Path, manifest: Manifest) -> list[Record]:
    latest: dict[tuple[int, str], Record] = {}
    for number, line in enumerate(whole_lines(path), 1):
        record = decoded(line, Record, f"{path}, line {number}", SCHEMA)
        if missing := manifest.lacks(record.imported):
            raise UsageError(f"{path}, line {number} is damaged: {missing}")
        latest[record.start, record.case] = record
    return list(latest.values())


def first_difference(stored: object, now: object, path: str) -> str | None:
    """The first difference between two pieces of plain data, in words; None if they are equal."""
    # Through JSON, since a tuple and a list, or 4 and 4.0, are equal on disk.
    stored, now = (msgspec.json.decode(msgspec.json.encode(data)) for data in (stored, now))
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in [*stored, *(key for key in now if key not in stored)]:
            if key == "timeout":  # it changes no figure, and a timeout that was too short is a reason to resume
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
