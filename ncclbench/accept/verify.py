"""Whether a bundle is what was signed: sums, the chain of events, records, schema, starts, and the verdict itself.

This shows that nothing was changed afterwards by anybody who did not write all of it anew; it cannot show that what
was written was true.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ncclbench.accept.bundle import FOLDER, SUMS, VERDICT, files, read_baseline
from ncclbench.accept.check_context import Subject
from ncclbench.accept.judge import judge
from ncclbench.accept.profile import parse_profile
from ncclbench.accept.verdict import SCHEMA, Document
from ncclbench.config.refusals import refuse_newer
from ncclbench.errors import UsageError
from ncclbench.store import events
from ncclbench.store.regular_files import content_of, unreadable
from ncclbench.store.run_directory import Run, read_run


@dataclass(frozen=True)
class Finding:
    """What one part of the verification found; `wrong` names everything that is not right."""

    part: str
    wrong: tuple[str, ...]
    note: str = ""


def verify(path: Path) -> list[Finding]:
    """All findings about the bundle in `path`; it is sound if none has anything wrong.

    Raises:
        UsageError: if `path` is no run directory at all.
        EnvironmentFault: if a file of it cannot be read: that says nothing of whether it was changed.
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
        found.append(Finding(part, wrong, _note(path) if part == "sums" else ""))
    return found


def _stated_sums(path: Path) -> dict[str, str]:
    content = content_of(path / SUMS)
    if content is None:
        raise UsageError(f"there is no {SUMS}: the run was never judged, or it was taken away")
    lines = content.decode(errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _note(path: Path) -> str:
    """Files that came later are no fault, but nobody has signed them."""
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
        elif events.file_hash(file) != digest:
            yield f"{name} was changed"
    for needed in ("manifest.json", "results.jsonl", "events.jsonl", VERDICT, f"{FOLDER}/profile.toml"):
        if needed not in stated:
            yield f"{needed} is not covered by {SUMS}"


def _chain(path: Path) -> Iterator[str]:
    log = path / "events.jsonl"
    lines = events.whole_lines(log)
    if not lines:
        yield "events.jsonl is empty"
        return
    broken = events.broken_link(log)
    if broken is not None:
        yield f"events.jsonl, line {broken} does not follow from the line before: one was changed, added or removed"
    last = events.read_events(log)[-1]
    if last["kind"] != "verdict":
        yield f"events.jsonl ends with {last['kind']!r} and not with the verdict: lines were added or removed"
    elif (path / VERDICT).is_file() and last.get("verdict_sha256") != events.file_hash(path / VERDICT):
        yield f"{VERDICT} is not the one that the event log names"


def _records(path: Path) -> Iterator[str]:
    """Every record and sample file has its hash in the event log, and the other way round."""
    read_run(path)  # a line that is no record has no name to be called by
    log = events.read_events(path / "events.jsonl")
    logged = {str(e["record_sha256"]): e for e in log if e["kind"] == "result" and "record_sha256" in e}
    lines = {events.line_hash(line): k for k, line in enumerate(events.whole_lines(path / "results.jsonl"), 1)}
    for digest, number in lines.items():
        if digest not in logged and not _cut_off_before_its_event(log, path, number):
            yield f"results.jsonl, line {number} is not what the event log has the hash of"
    for digest, event in logged.items():
        if digest not in lines:
            yield f"the record of {event.get('case')} in start {event.get('start', 0)} is gone or was changed"
    yield from _sample_files(path, logged)


def _cut_off_before_its_event(log: list[dict[str, Any]], path: Path, number: int) -> bool:
    """A kill between a record and its event leaves the record alone: then its case began and never ended."""
    record = msgspec.json.decode(events.whole_lines(path / "results.jsonl")[number - 1])
    mine = [
        e["kind"] for e in log if (e.get("case"), e.get("start", 0)) == (record.get("case"), record.get("start", 0))
    ]
    return mine.count("case") > mine.count("result") and "case" in mine


def _sample_files(path: Path, logged: dict[str, dict[str, Any]]) -> Iterator[str]:
    of_record = {
        events.line_hash(line): msgspec.json.decode(line).get("samples")
        for line in events.whole_lines(path / "results.jsonl")
    }
    for digest, event in logged.items():
        name = of_record.get(digest)
        if name is None or "samples_sha256" not in event:
            continue
        if not (path / name).is_file():
            yield f"{name} is gone"
        elif events.file_hash(path / name) != event["samples_sha256"]:
            yield f"{name} is not the file that was measured"


def read_document(path: Path) -> Document:
    """``verdict.json`` of a run.

    Raises:
        UsageError: if there is none, or it is not one, or of a newer schema.
    """
    raw = content_of(path / VERDICT)
    if raw is None:
        raise UsageError(f"there is no {VERDICT}: judge the run with `ncclbench accept {path} --profile NAME`")
    try:
        refuse_newer(msgspec.json.decode(raw, type=dict[str, Any]).get("schema"), SCHEMA, VERDICT)
        return msgspec.json.decode(raw, type=Document)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"{VERDICT} does not follow its schema: {error}") from None


def _schema(path: Path) -> Iterator[str]:
    document = read_document(path)
    run = read_run(path)
    if document.schema < 1:
        yield f"{VERDICT} has schema {document.schema}"
    if not run.manifest.get("plan"):
        yield "manifest.json has no plan"


def _starts(path: Path) -> Iterator[str]:
    document, run = read_document(path), read_run(path)
    present = sum(not run.missing_from(start) for start in range(run.declared_starts)) if run.records else 0
    if document.starts.declared != run.declared_starts:
        yield f"the verdict says {document.starts.declared} declared starts, the manifest {run.declared_starts}"
    if document.starts.present != present:
        yield f"the verdict says that {document.starts.present} starts are there; there are {present}"
    logged = {int(e.get("start", 0)) for e in run.events if e["kind"] in ("start", "import")}
    for start in sorted({record.start for record in run.records} - logged):
        yield f"start {start} has records, but the event log does not know it"


def _verdict(path: Path) -> Iterator[str]:
    """Judge again, from what is in the bundle alone, and compare."""
    stated = read_document(path)
    again = judge(_subject(path, read_run(path), forced="forced" in stated.stamps))
    one, other = (msgspec.to_builtins(document) for document in (stated, again))
    yield from _different_checks(one.pop("checks"), other.pop("checks"))
    for name in other:
        if name != "judged_by" and one[name] != other[name]:
            yield f"{name} is {one[name]!r}, but follows as {other[name]!r}"


def _subject(path: Path, run: Run, *, forced: bool) -> Subject:
    content = content_of(path / FOLDER / "profile.toml")
    if content is None:
        raise UsageError("the profile is not in the bundle: it cannot be judged again")
    rules = parse_profile(content.decode(errors="replace"), "profile.toml")
    return Subject(run, rules, read_baseline(path), forced)


def _different_checks(stated: list[dict[str, Any]], again: list[dict[str, Any]]) -> Iterator[str]:
    if len(stated) != len(again):
        yield f"{len(stated)} results are stated, {len(again)} follow from the records"
    for one, other in zip(stated, again, strict=False):
        if one != other:
            key = next(key for key in other if one.get(key) != other.get(key))
            said, follows = (str(result.get(key))[:80] for result in (one, other))
            yield f"{one['check']} of {one['subject']}: {key} is {said!r}, but follows as {follows!r}"
            return
