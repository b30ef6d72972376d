"""The bundle: everything that a verdict rests on, beside the verdict, with a sum for each file.

RUN/verdict.json           the verdict; docs/verdict.schema.json is its schema
RUN/accept/profile.toml    the profile as it was used
RUN/accept/baseline.json   the run that it was compared with, if any
RUN/accept/junit.xml, checks.csv, metrics.prom
RUN/events.jsonl           gets a line with the verdict's hash
RUN/SHA256SUMS             last; sha256sum -c reads it
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from ncclbench.accept.check_context import Subject
from ncclbench.accept.judge import judge
from ncclbench.accept.verdict_formats import checks_csv, junit, prometheus
from ncclbench.errors import EnvironmentFault, UsageError
from ncclbench.store.files import content_of, file_hash, write_whole
from ncclbench.store.manifest import Manifest
from ncclbench.store.records import Record
from ncclbench.store.run_directory import Run
from ncclbench.store.run_writer import RunWriter
from ncclbench.store.verdict import FILE as VERDICT
from ncclbench.store.verdict import RunVerdict

SUMS = "SHA256SUMS"
FOLDER = "accept"
# What belongs to no bundle: the sums themselves, the writer's lock, and what a crash has left.
_LEFT_OUT = (SUMS, ".lock")


class StoredBaseline(msgspec.Struct, frozen=True, kw_only=True):
    """A baseline as the bundle keeps it: all that comparing with it needs."""

    name: str
    manifest: Manifest
    records: list[Record]

    def as_run(self) -> Run:
        """The run again, without its events and samples."""
        return Run(Path(self.name), self.manifest, tuple(self.records), ())


def pretty(document: RunVerdict) -> bytes:
    """``verdict.json``."""
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"


def write_bundle(subject: Subject) -> RunVerdict:
    """Judge, and write all of the bundle into the run directory.

    Raises:
        UsageError: if the run is still being written.
        EnvironmentFault: if the bundle cannot be written.
    """
    path = subject.run.path
    try:
        writer = RunWriter.reopen(path)
        if writer.events != len(subject.run.events):
            raise UsageError(f"{path} was written to while it was read; judge it again")
        document = judge(subject)
        (path / FOLDER).mkdir(exist_ok=True)
        write_whole(path / FOLDER / "profile.toml", subject.rules.text.encode())
        _write_baseline(path, subject.baseline)
        write_whole(path / VERDICT, pretty(document))
        write_whole(path / FOLDER / "junit.xml", junit(document).encode())
        write_whole(path / FOLDER / "checks.csv", checks_csv(document).encode())
        write_whole(path / FOLDER / "metrics.prom", prometheus(document).encode())
        writer.event(
            "verdict",
            verdict=document.verdict,
            verdict_sha256=file_hash(path / VERDICT),
            profile_sha256=document.profile.sha256,
        )
        write_whole(path / SUMS, sums(path).encode())
    except OSError as error:
        raise EnvironmentFault(f"could not write the bundle in {path}: {error}") from None
    return document


def _write_baseline(path: Path, baseline: Run | None) -> None:
    file = path / FOLDER / "baseline.json"
    if baseline is None:
        file.unlink(missing_ok=True)  # of an earlier verdict
        return
    # States of GPUs are most of a large record, and nothing compares them.
    records = [msgspec.structs.replace(record, gpus=[]) for record in baseline.records]
    stored = StoredBaseline(name=baseline.path.name, manifest=baseline.manifest, records=records)
    write_whole(file, msgspec.json.encode(stored))


def read_baseline(path: Path) -> Run | None:
    """The baseline in a bundle; None if it has none.

    Raises:
        UsageError: if it is damaged.
    """
    file = path / FOLDER / "baseline.json"
    content = content_of(file)
    if content is None:
        return None
    try:
        return msgspec.json.decode(content, type=StoredBaseline).as_run()
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"{file} is damaged: {error}") from None


def files(path: Path) -> Iterator[str]:
    """Every file of a bundle, by its path inside it, sorted."""
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name not in _LEFT_OUT and not name.endswith(".tmp"):
            yield name


def sums(path: Path) -> str:
    """``SHA256SUMS``, as sha256sum writes it."""
    return "".join(f"{file_hash(path / name)}  {name}\n" for name in files(path))
