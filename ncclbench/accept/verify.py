"""Verify a bundle: its sums, the chain of its events, its records, schema and starts, and the verdict itself.

This finds a change after signing, unless the whole bundle was written again. It cannot show that the bundle was true
when it was written.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ncclbench.accept.bundle import FOLDER, SUMS, files, read_baseline
from ncclbench.accept.check_context import CheckContext
from ncclbench.accept.judge import judge
from ncclbench.accept.profile import parse_profile
from ncclbench.errors import UsageError
from ncclbench.store.events import Event, broken_link, read_events
from ncclbench.store.files import content_of, file_hash, line_hash, unreadable, whole_lines
from ncclbench.store.manifest import PlanRecord
from ncclbench.store.records import Record
from ncclbench.store.run_directory import Run, read_run
from ncclbench.store.verdict import FILE as VERDICT
from ncclbench.store.verdict import CheckResult, RunVerdict, read_verdict


@dataclass(frozen=True)
class VerifiedPart:
    """The result of one part of the verification; `wrong` lists the errors."""

    part: str
    wrong: tuple[str, ...]
    note: str = ""


def verify(path: Path) -> list[VerifiedPart]:
    """Verify the bundle in `path`; it is sound if no part has an error.

    Raises:
        UsageError: if `path` is no run directory.
        EnvironmentFault: if a file cannot be read, since then a change can be neither shown nor excluded.
    """
    if content_of(path / "manifest.json") is None:
        raise UsageError(f"{path} is no run directory: it has no manifest.json")
    parts: dict[str, Callable[[Path], Iterator[str]]] = {
        "sums": _sums,
        "chain": _chain,
        "records": _records,
        "schema": _schema,
        "starts": _starts,
        "verdict": _verdict,
    }
    found = []
    for part, look in parts.items():
        try:
            wrong = tuple(look(path))
        except OSError as error:
            raise unreadable(error, path) from None
        except UsageError as error:
            wrong = (str(error),)
        found.append(VerifiedPart(part, wrong, _note(path) if part == "sums" else ""))
    return found


def _stated_sums(path: Path) -> dict[str, str]:
    content = content_of(path / SUMS)
    if content is None:
        raise UsageError(f"there is no {SUMS}: the run was never judged, or the file was removed")
    lines = content.decode(errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _note(path: Path) -> str:
    """Name the files that were added later: they are no error, but no sum covers them."""
    try:
        extra = [name for name in files(path) if name not in _stated_sums(path)]
    except UsageError:
        return ""
    more = f" and {len(extra) - 5} more" if len(extra) > 5 else ""
    return f"not covered: {', '.join(extra[:5])}{more}" if extra else ""


def _sums(path: Path) -> Iterator[str]:
    stated = _stated_sums(path)
    for name, digest in stated.items():
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()):
            yield f"{name} lies outside of the run"
        elif not file.is_file():
            yield f"{name} is gone"
        elif file_hash(file) != digest:
            yield f"{name} was changed"
    for needed in ("manifest.json", "results.jsonl", "events.jsonl", VERDICT, f"{FOLDER}/profile.toml"):
        if needed not in stated:
            yield f"{needed} is not covered by {SUMS}"


def _chain(path: Path) -> Iterator[str]:
    log = path / "events.jsonl"
    lines = whole_lines(log)
    if not lines:
        yield "events.jsonl is empty"
        return
    broken = broken_link(log)
    if broken is not None:
        yield f"events.jsonl, line {broken} does not follow from the line before: one was changed, added or removed"
    last = read_events(log)[-1]
    if last.kind != "verdict":
        yield f"events.jsonl ends with {last.kind!r} and not with the verdict: lines were added or removed"
    elif (path / VERDICT).is_file() and last.verdict_sha256 != file_hash(path / VERDICT):
        yield f"{VERDICT} is not the one that the event log names"


def _records(path: Path) -> Iterator[str]:
    """The event log has the hash of each record and samples file, and each hash has its record or file."""
    read_run(path)  # raises if a line is no record
    log = read_events(path / "events.jsonl")
    logged = {event.record_sha256: event for event in log if event.kind == "result" and event.record_sha256}
    lines = [(line_hash(line), msgspec.json.decode(line, type=Record)) for line in whole_lines(path / "results.jsonl")]
    for number, (digest, record) in enumerate(lines, 1):
        if digest not in logged and not _cut_off_before_its_event(log, record):
            yield f"results.jsonl, line {number} is not what the event log has the hash of"
    stored = dict(lines)
    for digest, event in logged.items():
        if digest not in stored:
            yield f"the record of {event.case} in start {event.start} is gone or was changed"
    yield from _sample_files(path, logged, stored)


def _cut_off_before_its_event(log: list[Event], record: Record) -> bool:
    """Whether a kill came between a record and its event: the case has more starts than results in the log."""
    mine = [event.kind for event in log if (event.case, event.start) == (record.case, record.start)]
    return mine.count("case") > mine.count("result") and "case" in mine


def _sample_files(path: Path, logged: dict[str, Event], stored: dict[str, Record]) -> Iterator[str]:
    for digest, event in logged.items():
        record = stored.get(digest)
        if record is None or record.samples is None or event.samples_sha256 is None:
            continue
        if not (path / record.samples).is_file():
            yield f"{record.samples} is gone"
        elif file_hash(path / record.samples) != event.samples_sha256:
            yield f"{record.samples} is not the file that was measured"


def read_document(path: Path) -> RunVerdict:
    """Read ``verdict.json`` of a run.

    Raises:
        UsageError: if the file is missing, damaged or of a newer schema.
    """
    document = read_verdict(path)
    if document is None:
        raise UsageError(f"there is no {VERDICT}: judge the run with `ncclbench accept {path} --profile NAME`")
    return document


def _schema(path: Path) -> Iterator[str]:
    read_document(path)
    stated = msgspec.json.decode(content_of(path / VERDICT) or b"{}", type=dict[str, msgspec.Raw])
    for name in RunVerdict.__struct_fields__:
        if name not in stated:
            yield f"{VERDICT} does not follow its schema: it has no {name}"
    if read_run(path).manifest.plan == PlanRecord():
        yield "manifest.json has no plan"


def _starts(path: Path) -> Iterator[str]:
    document, run = read_document(path), read_run(path)
    if document.starts.declared != run.declared_starts:
        yield f"the verdict says {document.starts.declared} declared starts, the manifest {run.declared_starts}"
    if document.starts.present != run.present_starts:
        yield f"the verdict says that {document.starts.present} starts are there; there are {run.present_starts}"
    logged = {event.start for event in run.events if event.kind in ("start", "import")}
    for start in sorted({record.start for record in run.records} - logged):
        yield f"start {start} has records, but the event log does not know it"


def _verdict(path: Path) -> Iterator[str]:
    """Judge again, only from the content of the bundle, and compare."""
    stated = read_document(path)
    again = judge(_subject(path, read_run(path), forced="forced" in stated.stamps))
    yield from _different_checks(stated.checks, again.checks)
    for name in again.__struct_fields__:
        one, other = (msgspec.to_builtins(getattr(document, name)) for document in (stated, again))
        if name not in ("judged_by", "checks") and one != other:
            yield f"{name} is {one!r}, but follows as {other!r}"


def _subject(path: Path, run: Run, *, forced: bool) -> CheckContext:
    content = content_of(path / FOLDER / "profile.toml")
    if content is None:
        raise UsageError("the profile is not in the bundle: it cannot be judged again")
    rules = parse_profile(content.decode(errors="replace"), "profile.toml")
    return CheckContext(run, rules, read_baseline(path), forced)


def _different_checks(stated: list[CheckResult], again: list[CheckResult]) -> Iterator[str]:
    if len(stated) != len(again):
        yield f"{len(stated)} results are stated, {len(again)} follow from the records"
    for one, other in zip(stated, again, strict=False):
        for name in other.__struct_fields__:
            said, follows = (msgspec.to_builtins(getattr(result, name)) for result in (one, other))
            if said != follows:
                shown = [str(value)[:80] for value in (said, follows)]
                yield f"{one.check} of {one.subject}: {name} is {shown[0]!r}, but follows as {shown[1]!r}"
                return
