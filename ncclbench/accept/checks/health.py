"""GPUs and NICs that throttle or count errors: they make a good fabric look bad, and a bad one will not get better.

What a warning means is data: ``health.toml``, and the profile's own entries before it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ncclbench.accept.facts import matches_any, shown_ranks
from ncclbench.accept.outcome import Result, Verdict
from ncclbench.accept.profile import Health
from ncclbench.accept.subject import Subject
from ncclbench.units import counted


def check(subject: Subject) -> Iterator[Result]:
    """One result for each kind of device and warning, naming the ranks that have it."""
    yield from _judge(subject, "gpu", subject.run.manifest.get("device") != "cpu")
    yield from _judge(subject, "nic", expected=False)


def _judge(subject: Subject, kind: str, expected: bool) -> Iterator[Result]:
    seen = 0
    warned: dict[str, list[tuple[str, int, dict[str, Any], str]]] = {}
    for record in subject.run.records:
        for entry in _entries(record, kind):
            seen += 1
            for warning in entry.get("warnings") or []:
                text = " ".join(word for word in str(warning).split() if not word.isdecimal()).removesuffix(" rose by")
                warned.setdefault(text, []).append((record.case, record.start, entry, str(warning)))
    for text, rows in sorted(warned.items()):
        yield _warning(kind, text, rows, subject.rules.health)
    if not warned:
        verdict = Verdict.PASS if seen else Verdict.INCONCLUSIVE if expected else Verdict.NOT_RUN
        reason = "none throttled, no error counted" if seen else f"no state of a {kind.upper()} was recorded"
        yield Result(check="health", subject=kind, verdict=verdict, reason=reason)


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


def _warning(kind: str, text: str, rows: list[tuple[str, int, dict[str, Any], str]], rules: Sequence[Health]) -> Result:
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
