"""The bundle: the verdict, all that it is based on, and a SHA-256 sum for each file.

RUN/verdict.json           the verdict; docs/verdict.schema.json is its schema
RUN/accept/profile.toml    the profile that was used
RUN/accept/baseline.json   the run that this one was compared with, if any
RUN/accept/junit.xml, checks.csv, metrics.prom
RUN/events.jsonl           gets a line with the verdict's hash
RUN/SHA256SUMS             written last; sha256sum -c reads it
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from ncclbench.accept.check_context import CheckContext
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
# Not in the bundle: the sums themselves and the lock of the writer.
_LEFT_OUT = (SUMS, ".lock")


class StoredBaseline(msgspec.Struct, frozen=True, kw_only=True):
    """A baseline in the bundle: the parts that a comparison needs."""

    name: str
    manifest: Manifest
    records: list[Record]

    def as_run(self) -> Run:
        """The baseline as a run without events and samples."""
        return Run(Path(self.name), self.manifest, tuple(self.records), ())


def pretty(document: RunVerdict) -> bytes:
    """The content of ``verdict.json``: indented JSON."""
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"


def write_bundle(subject: CheckContext) -> RunVerdict:
    """Judge a run, and write the bundle into its directory.

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
        file.unlink(missing_ok=True)  # an earlier verdict may have left one
        return
    # GPU states are most of a large record, and no check compares them.
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
    """The paths of all files of a bundle, relative to it and sorted; leftovers of a crash are skipped."""
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name not in _LEFT_OUT and not name.endswith(".tmp"):
            yield name


def sums(path: Path) -> str:
    """The content of ``SHA256SUMS``, in the format of sha256sum."""
    return "".join(f"{file_hash(path / name)}  {name}\n" for name in files(path))
