"""Redact a run: copy it with stable hashes instead of host names, addresses and serials.

The same name has the same hash in every bundle, so that a node can still be followed. A name that can be guessed can
be found by hashing guesses, unless ``NCCLBENCH_REDACT_KEY`` sets a key for the hashes. Changed lines get new hashes
and the event log a new chain. So the copy passes ``verify``, and its manifest says that it is redacted.
"""

import hashlib
import hmac
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from ncclbench.config import plugins
from ncclbench.errors import UsageError
from ncclbench.store.events import GENESIS
from ncclbench.store.files import line_hash, whole_lines
from ncclbench.store.records import Json
from ncclbench.store.run_directory import read_run

KEY = "NCCLBENCH_REDACT_KEY"
# Words of ncclbench, which are kept even if a host has such a name; the names of transports are added.
_NOT_HOSTS = frozenset({"local", "localhost", "cpu", "cuda", "lo", ""})
_IDENTITY_KEYS = re.compile(r"(serial|uuid|guid|boot|host|hostname|mac|address)s?", re.IGNORECASE)
# Fields that other programs use as keys; they name no machine.
_KEPT = frozenset(
    {"case", "pattern", "dtype", "timing", "transport", "kind", "status", "samples", "previous", "label", "id"}
    | {"record_sha256", "samples_sha256", "verdict_sha256", "profile_sha256", "time", "started"}
)
_ADDRESSES = (
    ("ip", re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.])")),
    ("ip", re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{1,4}:){2,7}(?::|[0-9a-fA-F]{1,4})(?::?[0-9a-fA-F]{1,4})*(?![\w:])")),
    ("ip", re.compile(r"(?<![\w:])[0-9a-fA-F]{0,4}::(?:[0-9a-fA-F]{1,4}:?)+(?![\w:])")),
    ("mac", re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{2}[:-]){5}[0-9a-fA-F]{2}(?![\w:])")),
    ("uuid", re.compile(r"\b(?:GPU-|MIG-)?[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b")),
    ("guid", re.compile(r"\b(?:0x[0-9a-fA-F]{16}|[0-9a-fA-F]{4}(?::[0-9a-fA-F]{4}){3})\b")),
)
# A PCI address looks like a short IPv6 address; it names a slot, not a machine.
_PCI = re.compile(r"[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-9a-fA-F]")
# Lines of a profile that select and judge. They have words of ncclbench only, which must stay as they are.
_RULE = re.compile(
    r"\s*(?:\[|(?:where|metric|phase|gpu|transports|link_layer|allowed|across_nodes|device|basis|action|verdict|match)\b)"
)
_TIME = re.compile(r"\d{1,2}:\d{2}:\d{2}(?:\.\d+)?")


class Redactor:
    """Replaces names in plain data."""

    def __init__(self, hosts: Iterable[str], identities: Iterable[str], key: bytes) -> None:
        """`hosts`, their short forms and `identities` (other identifying texts) are replaced everywhere."""
        self._key = key
        names = {name.lower(): "host" for host in hosts for name in (host, host.partition(".")[0])}
        names |= {text.lower(): "id" for text in identities}
        kept = _NOT_HOSTS | set(plugins.names("transports"))
        self._names = {name: kind for name, kind in names.items() if name not in kept}
        # The longest first, so that n1.cluster is replaced as a whole.
        ordered = sorted(self._names, key=len, reverse=True)
        known = "|".join(map(re.escape, ordered))
        self._known = re.compile(rf"(?<![\w-])(?:{known})(?![\w-])", re.IGNORECASE) if ordered else None

    def hash(self, kind: str, text: str) -> str:
        """The replacement of `text`."""
        digest = hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()
        return f"{kind}-{digest[:12]}"

    def text(self, text: str) -> str:
        """`text` without names."""
        if self._known is not None:
            text = self._known.sub(lambda match: self.hash(self._names[match[0].lower()], match[0].lower()), text)
        for kind, pattern in _ADDRESSES:
            text = pattern.sub(lambda match, kind=kind: self._address(kind, match), text)  # type: ignore[misc]
        return text

    def _address(self, kind: str, match: re.Match[str]) -> str:
        around = match.string[max(0, match.start() - 1) : match.end() + 2]
        if _PCI.search(around) or _TIME.fullmatch(match[0]):
            return match[0]
        return self.hash(kind, match[0])

    def data(self, data: Json, key: str = "") -> Json:
        """Plain data without names; fields that other programs use as keys stay as they are."""
        if isinstance(data, dict):
            return {self.text(str(name)): self.data(value, str(name)) for name, value in data.items()}
        if isinstance(data, list):
            return [self.data(item, key) for item in data]
        return self.text(data) if isinstance(data, str) and key not in _KEPT else data

    def fields(self, line: bytes) -> dict[str, Json]:
        """A JSON object without names, with all its fields, including unknown ones."""
        found = msgspec.json.decode(line, type=dict[str, object])
        return {self.text(name): self.data(value, name) for name, value in found.items()}


def redact_profile(text: str, redactor: Redactor) -> str:
    """The text of a profile without names in its sources, titles, comments and wanted settings."""
    lines = []
    for line in text.splitlines(keepends=True):
        rule, sign, comment = line.partition(" #") if _RULE.match(line) else ("", "", line)
        lines.append(rule + sign + redactor.text(comment))
    return "".join(lines)


def redactor_for(runs: Iterable[Path], key: str) -> Redactor:
    """A redactor for all hosts and serials in the manifests of `runs`, including those in unknown fields."""
    hosts: set[str] = set()
    identities: set[str] = set()
    for path in runs:
        topology = read_run(path).manifest.topology
        hosts |= set(topology.node_names) if topology else set()
        for name, value in _strings(msgspec.json.decode((path / "manifest.json").read_bytes())):
            if _IDENTITY_KEYS.fullmatch(name):
                (hosts if name.lower().startswith("host") else identities).add(value)
    return Redactor(hosts, identities, key.encode())


def _strings(data: Json, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(data, dict):
        for name, value in data.items():
            yield from _strings(value, str(name))
    elif isinstance(data, list):
        for item in data:
            yield from _strings(item, key)
    elif isinstance(data, str):
        yield key, data


def redact(source: Path, target: Path, redactor: Redactor) -> None:
    """Copy the run in `source` to `target`, redacted and without its verdict; `target` must be judged again.

    Raises:
        UsageError: if `target` exists and is no redacted run, or `source` is no run.
    """
    read_run(source)
    if target.exists():
        if not (target / "manifest.json").exists() or not read_run(target).manifest.redacted:
            raise UsageError(f"{target} is there already and is no redacted run; move it away")
        shutil.rmtree(target)  # from an earlier verdict on the same run
    (target / "samples").mkdir(parents=True)
    manifest = redactor.fields((source / "manifest.json").read_bytes())
    manifest["redacted"] = True
    (target / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
    for file in sorted((source / "samples").glob("*.parquet")):
        shutil.copyfile(file, target / "samples" / file.name)
    hashes = _copy_records(source, target, redactor)
    _copy_events(source, target, redactor, hashes)


def _copy_records(source: Path, target: Path, redactor: Redactor) -> dict[str, str]:
    """Copy the records; returns the new hash of each line by its old hash."""
    hashes = {}
    with (target / "results.jsonl").open("wb") as file:
        for line in whole_lines(source / "results.jsonl"):
            new = msgspec.json.encode(redactor.fields(line))
            hashes[line_hash(line)] = line_hash(new)
            file.write(new + b"\n")
    return hashes


def _copy_events(source: Path, target: Path, redactor: Redactor, hashes: dict[str, str]) -> None:
    """Copy the event log with a new chain; earlier verdicts are left out, since they are about the original lines."""
    previous = GENESIS
    with (target / "events.jsonl").open("wb") as file:
        for line in whole_lines(source / "events.jsonl"):
            event = redactor.fields(line)
            if event.get("kind") == "verdict":
                continue
            event["previous"] = previous
            if "record_sha256" in event:
                stated = str(event["record_sha256"])
                event["record_sha256"] = hashes.get(stated, stated)
            new = msgspec.json.encode(event)
            previous = line_hash(new)
            file.write(new + b"\n")
