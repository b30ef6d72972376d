"""GPUs and NICs that throttle or count errors: they make a good fabric look bad, and a bad one will not get better.

What a warning means is data: ``health.toml``, and the profile's own entries before it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ncclbench.accept.case_facts import matches_any, shown_ranks
from ncclbench.accept.check_context import Subject
from ncclbench.accept.profile import Health
from ncclbench.accept.verdict import Result, Verdict
from ncclbench.store.gpu_warnings import crc_warnings
from ncclbench.units import counted

_STATES = {"rank": int, "before": dict, "after": dict}
# Case, process start, the device's entry in the record, and the warning.
Row = tuple[str, int, dict[str, Any], str]


def check(subject: Subject) -> Iterator[Result]:
    """One result for each kind of device and warning, naming the ranks that have it."""
    yield from _judge(subject, "gpu", subject.run.manifest.get("device") != "cpu")
    yield from _judge(subject, "nic", expected=False)


def _judge(subject: Subject, kind: str, expected: bool) -> Iterator[Result]:
    seen, warned = _warned(subject.run.records, kind)
    for text, rows in sorted(warned.items()):
        yield _warning(kind, text, rows, subject.rules.health)
    if not warned:
        verdict = Verdict.PASS if seen else Verdict.INCONCLUSIVE if expected else Verdict.NOT_RUN
        reason = "none throttled, no error counted" if seen else f"no state of a {kind.upper()} was recorded"
        yield Result(check="health", subject=kind, verdict=verdict, reason=reason)


def _warned(records: Sequence[Any], kind: str) -> tuple[int, dict[str, list[Row]]]:
    """How many states of devices were recorded, and by kind of warning where each was."""
    seen = 0
    rows: list[Row] = []
    for record in records:
        for entry in _entries(record, kind):
            seen += 1
            told = entry.get("warnings") or []
            rows += [
                (record.case, record.start, entry, str(one)) for one in (told if isinstance(told, list) else [told])
            ]
    named = {(_kind_of(warning), start, entry.get("rank")) for _, start, entry, warning in rows}
    for row in _over_starts(records) if kind == "gpu" else ():
        if (_kind_of(row[3]), row[1], row[2]["rank"]) not in named:  # too few in any one case, and too many in all
            rows.append(row)
    warned: dict[str, list[Row]] = {}
    for row in rows:
        warned.setdefault(_kind_of(row[3]), []).append(row)
    return seen, warned


def _kind_of(warning: str) -> str:
    """A warning without its numbers."""
    return " ".join(word for word in warning.partition(" rose by ")[0].split() if not word.isdecimal())


def _over_starts(records: Iterable[Any]) -> Iterator[Row]:
    """What each rank's GPU had of checksum errors over all cases of a process start."""
    states: dict[tuple[int, int], list[tuple[Any, Any]]] = {}
    for record in records:
        for entry in _entries(record, "gpu"):
            if all(isinstance(entry.get(name), kind) for name, kind in _STATES.items()):
                key = int(record.start), int(entry["rank"])
                states.setdefault(key, []).append((entry["before"], entry["after"]))
    for (start, rank), stretches in states.items():
        for warning in crc_warnings(stretches):
            yield "all cases of a start", start, {"rank": rank}, warning


def _entries(record: Any, kind: str) -> Sequence[dict[str, Any]]:
    """The states of GPUs are a record's own; counters of NICs that moved meanwhile are in its path."""
    if kind == "gpu":
        return [entry for entry in record.gpus if isinstance(entry, dict)]
    counters = (record.path or {}).get("counters")
    if not isinstance(counters, dict):
        return []
    moved = [entry for entry in counters.get("moved") or [] if isinstance(entry, dict)]
    told = [
        {"rank": entry.get("rank"), "device": entry.get("port"), "warnings": [f"{name} rose by {entry.get('by')}"]}
        for entry in moved
        if (name := entry.get("counter"))
    ]
    return told or [{"warnings": []}]


def _warning(kind: str, text: str, rows: list[Row], rules: Sequence[Health]) -> Result:
    rule = next(rule for rule in rules if matches_any(text, [rule.match]))
    ranks = sorted({int(entry["rank"]) for _, _, entry, _ in rows if isinstance(entry.get("rank"), int)})
    where = shown_ranks(ranks) if ranks else f"{len(rows)} places"
    evidence = [
        {"case": case, "start": start, "rank": entry.get("rank"), "device": entry.get("device"), "warning": warning}
        for case, start, entry, warning in rows[:64]
    ]
    return Result(
        check="health",
        subject=f"{kind}: {text}",
        verdict=rule.verdict,
        reason=f"{text} on {where}, in {counted(len({case for case, *_ in rows}), 'case')}",
        action=rule.action,
        evidence=evidence,
    )
