"""Writing of an imported run: read all logs first, write beside the target, rename when it is complete."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
from msgspec import UNSET

from ncclbench import __version__
from ncclbench.config.plugins import load, names
from ncclbench.errors import EnvironmentFault, UsageError
from ncclbench.importers.common.imported_cases import ImportedCase, Reading, Stated, agreed, case_id
from ncclbench.importers.common.log_file import DamageError, Log
from ncclbench.store.manifest import (
    ImportedSource,
    LoggedDevice,
    LoggedTable,
    Manifest,
    PlannedCaseRecord,
    PlanRecord,
    ProvenanceRecord,
    RankRecord,
)
from ncclbench.store.provenance import git_commit
from ncclbench.store.run_writer import RunWriter, check_target
from ncclbench.topology import Topology, TopologyRecord

T = TypeVar("T")


def read_log(log: Log, stated: Stated, only: str | None = None) -> list[tuple[str, Reading]]:
    """The readings of a log, each with the name of its importer; several importers may find their format in it.

    Raises:
        UsageError: if none does, or a line is damaged: it names the file, the line, and what to do.
    """
    importers = {name: load("importers", name) for name in ([only] if only else names("importers"))}
    able = {name: module for name, module in importers.items() if only or module.recognises(log)}
    if not able:
        raise UsageError(f"{log.name} has nothing of a format that can be imported; there are: {', '.join(importers)}")
    readings = []
    for name, module in able.items():
        try:
            reading = module.read(log, stated)
            for found in reading.cases:  # importers whose logs always name the pattern do not look at it
                agreed(
                    found.record.pattern,
                    stated.pattern,
                    "--pattern",
                    found.record.imported.line if found.record.imported else None,
                )
        except DamageError as damage:
            hint = (
                ""
                if stated.skip_damaged or not damage.one_line
                else "; mend it, or leave such lines out with --skip-damaged"
            )
            raise UsageError(f"{log.name}, line {damage.number}: {damage}{hint}") from None
        readings.append((name, reading))
    if not any(reading.cases for _, reading in readings):
        alike = [name for name in names("importers") if load("importers", name).recognises(log)]
        looks = f"; it looks like {', '.join(alike)}" if alike else ""
        raise UsageError(f"{log.name} has no result{f' of {only}' if only else ''} in it{looks}")
    return readings


def import_logs(logs: Sequence[Log], out: Path, stated: Stated, only: str | None, command: list[str]) -> list[str]:
    """Write the run directory `out`; returns warnings for the user.

    Raises:
        UsageError: if `out` cannot be used, or a log cannot be read.
        EnvironmentFault: if the disk fails. In either case nothing is left behind.
    """
    check_target(out, resume=False, hint="name another directory")
    sources, readings, found = _gather(logs, stated, only)
    manifest = _manifest(sources, readings, found, command)
    with _beside(out) as temporary:
        writer = RunWriter.create(temporary, manifest)
        writer.event("import", command=command, files=[{"file": log.name, "sha256": log.sha256} for log in logs])
        for one in found:
            _append(writer, one)
        writer.event("end", exit_code=0)
    return [f"{source.file}: {warning}" for source in sources for warning in source.warnings + source.damaged]


def _gather(
    logs: Sequence[Log], stated: Stated, only: str | None
) -> tuple[list[ImportedSource], list[Reading], list[ImportedCase]]:
    """Sources for the manifest, the readings, and all cases with ids of their own."""
    sources: list[ImportedSource] = []
    readings: list[Reading] = []
    found: list[ImportedCase] = []
    for log in logs:
        for name, reading in read_log(log, stated, only):
            place = len(sources)
            sources.append(_source(log, name, reading))
            readings.append(reading)
            found += [_from_source(one, place) for one in reading.cases]
    return sources, readings, _distinct(found)


def _source(log: Log, name: str, reading: Reading) -> ImportedSource:
    return ImportedSource(
        file=log.name,
        sha256=log.sha256,
        bytes=log.size,
        importer=name,
        tool=reading.tool,
        version=reading.version,
        started=reading.started,
        cases=len(reading.cases),
        tables=msgspec.convert(reading.tables, list[LoggedTable]),
        warnings=reading.warnings,
        damaged=reading.damaged,
    )


def _from_source(found: ImportedCase, place: int) -> ImportedCase:
    assert found.record.imported is not None
    origin = msgspec.structs.replace(found.record.imported, source=place)
    return ImportedCase(record=msgspec.structs.replace(found.record, imported=origin), samples=found.samples)


def _distinct(found: Sequence[ImportedCase]) -> list[ImportedCase]:
    """The cases with unique ids: sizes rounded to the same value and repeated tests get the parameter `occurrence`."""
    seen: dict[str, int] = {}
    distinct = []
    for one in found:
        record = one.record
        times = seen[record.case] = seen.get(record.case, 0) + 1
        if times > 1:
            record = msgspec.structs.replace(record, params={**record.params, "occurrence": times})
            record = msgspec.structs.replace(record, case=case_id(record))
        distinct.append(ImportedCase(record=record, samples=one.samples))
    return distinct


def _manifest(
    sources: list[ImportedSource], readings: list[Reading], found: list[ImportedCase], command: list[str]
) -> Manifest:
    ranks = readings[0].ranks if all(reading.ranks == readings[0].ranks for reading in readings) else []
    return Manifest(
        plan=PlanRecord(name="imported", cases=[PlannedCaseRecord(id=one.record.case) for one in found]),
        transport=_common([one.record.transport for one in found]),
        device="cuda" if all(reading.tool == "nccl-tests" for reading in readings) else None,
        world_size=_common([one.record.world_size for one in found]),
        topology=_topology(ranks),
        ranks=[_rank(device) for device in ranks],
        # Of the machine that was measured; the one that this runs on has nothing to do with it.
        provenance=ProvenanceRecord(
            ncclbench=__version__,
            git_commit=git_commit(),
            command=command,
            versions={name: value for reading in readings for name, value in reading.versions.items()},
            variables={name: value for reading in readings for name, value in reading.variables.items()},
        ),
        imported=sources,
    )


def _common(values: Sequence[T | None]) -> T | None:
    """The value, if all have the same; None otherwise."""
    return values[0] if values and all(value == values[0] for value in values) else None


def _rank(device: LoggedDevice) -> RankRecord:
    return RankRecord(
        rank=device.rank,
        group=device.group,
        pid=device.pid,
        host=device.host if device.host is not UNSET else None,
        device=device.device if device.device is not UNSET else None,
        gpu=device.gpu,
        name=device.name,
    )


def _topology(ranks: Sequence[LoggedDevice]) -> TopologyRecord:
    """From the host names of the log, if it has one for every rank; empty otherwise."""
    if not ranks or [rank.rank for rank in ranks] != list(range(len(ranks))):
        return TopologyRecord()
    hosts = [str(rank.host or "") for rank in ranks]
    return Topology.from_hosts(hosts).as_record() if all(hosts) else TopologyRecord()


def _append(writer: RunWriter, found: ImportedCase) -> None:
    samples = found.samples
    if samples is None:
        stored = writer.append(found.record)
    else:
        ranks = None if samples.ranks is not None else np.full(len(samples.seconds_RN), -1, np.int32)
        stored = writer.append(found.record, ["total"], samples.seconds_RN[:, :, None], ranks)
    writer.event("result", case=stored.case, status=stored.status)


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that replaces it at the end, or is removed after an error."""
    made = _missing_parents(out)
    temporary = out.absolute().with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        yield temporary
        if out.is_dir():  # `check_target` has made sure that it holds no results
            shutil.rmtree(out)
        temporary.replace(out)
    except OSError as error:
        raise EnvironmentFault(f"could not store {out}: {error}; nothing was left behind") from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
        if not out.exists():
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()


def _missing_parents(out: Path) -> list[Path]:
    """The folders above `out` that do not exist yet, the deepest first."""
    return [parent for parent in out.absolute().parents if not parent.exists()]
