"""Versions and settings that differ between ranks or process starts, or from those that the profile wants."""

from collections.abc import Iterator

import msgspec

from ncclbench.accept.case_facts import matches_any, shown_ranks
from ncclbench.accept.check_context import CheckContext
from ncclbench.store.manifest import SoftwareRecord
from ncclbench.store.records import Json
from ncclbench.store.run_directory import Run
from ncclbench.store.verdict import Action, CheckResult, Verdict

_KINDS = {"versions": "version", "variables": "setting"}


def check(subject: CheckContext) -> Iterator[CheckResult]:
    """One result per name that differs or is not as the profile wants; one for all if there is none."""
    views = subject.run.manifest.software_views
    may_differ = subject.rules.profile.limits.may_differ
    found = [result for kind in _KINDS for result in _between_ranks(views, kind, may_differ)]
    found += [result for kind in _KINDS for result in _wanted(subject, views, kind)]
    found += between_starts(subject, may_differ)
    yield from found
    if not found:
        known = subject.run.manifest.software is not None
        verdict = Verdict.PASS if known else Verdict.INCONCLUSIVE
        reason = "the same on all ranks and in all starts" if known else "only rank 0's versions were recorded"
        yield CheckResult(check="drift", subject="versions and settings", verdict=verdict, reason=reason)


def _between_ranks(views: list[SoftwareRecord], kind: str, may_differ: list[str]) -> Iterator[CheckResult]:
    names = sorted({name for view in views for name in _settings(view, kind)})
    for name in names:
        if kind == "variables" and matches_any(name, may_differ):
            continue
        ranks: dict[str, list[int]] = {}
        for view in views:
            ranks.setdefault(str(_settings(view, kind).get(name, "not set")), []).extend(view.ranks)
        if len(ranks) > 1:
            usual = max(ranks, key=lambda value: len(ranks[value]))
            others = "; ".join(f"{value} on {shown_ranks(sorted(r))}" for value, r in ranks.items() if value != usual)
            yield CheckResult(
                check="drift",
                subject=f"{_KINDS[kind]} {name}",
                verdict=Verdict.FAIL,
                reason=f"{others}; {usual} on the other {len(ranks[usual])}",
                action=Action.ISOLATE,
                evidence=[{"name": name, "value": value, "ranks": sorted(r)} for value, r in ranks.items()],
            )


def _wanted(subject: CheckContext, views: list[SoftwareRecord], kind: str) -> Iterator[CheckResult]:
    if subject.fabric_mismatch:
        return
    for name, test in subject.rules.wanted[kind].items():
        for view in views:
            value = _settings(view, kind).get(name)
            if not test.holds(value):
                unknown = value is None and kind == "versions"
                yield CheckResult(
                    check="drift",
                    subject=f"{_KINDS[kind]} {name}",
                    verdict=Verdict.INCONCLUSIVE if unknown else Verdict.FAIL,
                    reason=f"is {value if value is not None else 'not set'} on {shown_ranks(view.ranks)}; "
                    f"the profile wants {test.text}",
                    action=Action.MONITOR,
                    evidence=[{"name": name, "value": value, "wanted": test.text, "ranks": view.ranks}],
                )


def between_starts(subject: CheckContext, may_differ: list[str]) -> list[CheckResult]:
    """Compare each process start with the first of its mode: the first difference fails."""
    first: dict[str, str] | None = None
    for event in subject.run.events:
        if event.kind not in ("start", "resume") or event.software is None:
            continue
        values = software_of_start(_without_modes(subject.run, event.mode, event.software), may_differ)
        if first is None:
            first = values
        elif values != first:
            names = sorted(name for name in first.keys() | values.keys() if first.get(name) != values.get(name))
            first_seen, then = ({name: view.get(name, "not set") for name in names} for view in (first, values))
            return [
                CheckResult(
                    check="drift",
                    subject="process starts",
                    verdict=Verdict.FAIL,
                    reason=f"start {event.start} ran with other versions or settings than the first: "
                    + "; ".join(f"{name} {then[name]} instead of {first_seen[name]}" for name in names[:4])
                    + (f" and {len(names) - 4} more" if len(names) > 4 else ""),
                    action=Action.MONITOR,
                    evidence=[{"first": first_seen, "then": then}],
                )
            ]
    return []


def software_of_start(views: list[SoftwareRecord], may_differ: list[str]) -> dict[str, str]:
    """The versions and settings of one start by name; where ranks differ, each value with its ranks."""
    seen: dict[str, dict[str, list[int]]] = {}
    for view in views:
        for kind in _KINDS:
            for name, value in _settings(view, kind).items():
                if kind == "versions" or not matches_any(name, may_differ):
                    seen.setdefault(name, {}).setdefault(str(value), []).extend(view.ranks)
    return {
        name: next(iter(values))
        if len(values) == 1
        else ", ".join(f"{value} on {shown_ranks(sorted(ranks))}" for value, ranks in sorted(values.items()))
        for name, values in seen.items()
    }


def _without_modes(run: Run, mode: str | None, views: list[SoftwareRecord]) -> list[SoftwareRecord]:
    """The software of a start without the variables in which the plan's modes differ on purpose.

    A variable stays if its value is not the one that the mode of the start sets.
    """
    modes = run.mode_variables
    own = modes.get(str(mode), {})
    differing = {name for variables in modes.values() for name in variables}

    def intended(name: str, value: Json) -> bool:
        return name in differing and own.get(name, value) == value

    return [
        msgspec.structs.replace(
            view,
            variables={name: value for name, value in (view.variables or {}).items() if not intended(name, value)},
        )
        for view in views
    ]


def _settings(view: SoftwareRecord, kind: str) -> dict[str, Json]:
    return (view.versions if kind == "versions" else view.variables) or {}
