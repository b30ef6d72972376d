"""The card of a run: its verdict, what decided it, what to do, and the provenance of the run."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import msgspec

from ncclbench.store.manifest import ProvenanceRecord
from ncclbench.store.records import PathRecord
from ncclbench.store.run_directory import Run
from ncclbench.store.verdict import CheckResult, RunVerdict
from ncclbench.topology import TopologyRecord
from ncclbench_reports.common.run_summary import NO_VERDICT, and_more, warnings_of
from ncclbench_reports.common.text_format import visible
from ncclbench_reports.html_page.page_model import RunCard

_MOST_REASONS = 6
_MOST_NODES = 8
# The order of checks in a report: what failed comes first.
VERDICT_WORDS = {"FAIL": "failed", "INCONCLUSIVE": "inconclusive", "NOT_RUN": "not run", "PASS": "passed"}
_PATH_FACTS = ("version", "network", "links", "proof", "gdr", "nvls")


def card_of(run: Run, verdict: RunVerdict | None, name: str, problems: Sequence[str]) -> RunCard:
    """The card of a run; `problems` are those of its samples."""
    profile = verdict.profile if verdict else None
    starts = verdict.starts if verdict else None
    checks = verdict.checks if verdict else []
    failed = [check for check in checks if check.verdict == "FAIL" and check.action]
    return RunCard(
        name=visible(name),
        path=visible(run.path),
        verdict=verdict.verdict if verdict else "",
        headline=verdict.verdict if verdict else NO_VERDICT,
        reasons=_reasons(verdict) if verdict else [],
        profile=visible(f"{profile.name} (sha256 {profile.sha256[:16]})") if profile else "",
        starts=". ".join(
            ([f"{starts.present} of {starts.declared} process starts"] if starts else []) + _counts(checks)
        ),
        actions=_actions(failed),
        facts=facts_of(run),
        warnings=[*warnings_of(run), *(visible(problem) for problem in problems)]
        + ([] if run.records else ["no case has finished"]),
    )


def _reasons(verdict: RunVerdict) -> list[str]:
    """The reasons of the verdict, then those of the checks that decided it: one line per part at fault."""
    decisive = [check for check in verdict.checks if check.verdict == verdict.verdict and check.verdict != "PASS"]
    lines = []
    for (name, part), found in _by_part(decisive, lambda check: check.check).items():
        first = found[0]
        reason = first.reason or ""
        case = first.subject.removesuffix(f": {part}") if reason.startswith(part) else first.subject
        lines.append(f"{name}, {case}: {reason}{_in_more_cases(found)}")
    more = [f"and {len(lines) - _MOST_REASONS} more; see the checks"] if len(lines) > _MOST_REASONS else []
    return [visible(reason, 400) for reason in (*verdict.reasons, *lines[:_MOST_REASONS], *more)]


def _actions(failed: Sequence[CheckResult]) -> list[str]:
    """What to do with which part: one line each, whatever the number of cases."""
    return [
        visible(f"{action}: {part}{_in_more_cases(found)}")
        for (action, part), found in _by_part(failed, lambda check: check.action or "").items()
    ]


def _by_part(
    checks: Sequence[CheckResult], kind: Callable[[CheckResult], str]
) -> dict[tuple[str, str], list[CheckResult]]:
    """Checks by kind and by the part at fault: what follows the case in a subject, or all of the subject."""
    found: dict[tuple[str, str], list[CheckResult]] = {}
    for check in checks:
        found.setdefault((kind(check), check.subject.rpartition(": ")[2]), []).append(check)
    return found


def _in_more_cases(found: Sequence[CheckResult]) -> str:
    return and_more(len(found) - 1).replace("(and ", "(and in ")


def _counts(checks: Sequence[CheckResult]) -> list[str]:
    """How many checks have each verdict: those that did not run have not passed."""
    counts = {word: sum(check.verdict == word for check in checks) for word in VERDICT_WORDS}
    shown = ", ".join(f"{count} {VERDICT_WORDS[word]}" for word, count in counts.items() if count)
    return [f"Checks: {shown}"] if shown else []


def facts_of(run: Run) -> list[tuple[str, str]]:
    """Provenance in names and values: what was measured on what."""
    manifest = run.manifest
    topology = manifest.topology or TopologyRecord()
    nodes = topology.node_names
    more = f" and {len(nodes) - _MOST_NODES} more" if len(nodes) > _MOST_NODES else ""
    shown = ", ".join(visible(name, 80) for name in nodes[:_MOST_NODES]) + more
    facts: list[tuple[str, object]] = [
        ("run directory", run.path),
        ("started", manifest.started),
        ("plan", manifest.plan.name),
        ("transport", manifest.transport),
        ("device", manifest.device),
        ("ranks", manifest.world_size),
        ("nodes", f"{len(nodes)}: {shown}" if nodes else None),
    ]
    facts += [(f"{name} known from", value) for name, value in topology.sources.items()]
    facts += _provenance(manifest.provenance)
    facts += _paths(run)
    states = [gpu.before for record in run.records for gpu in record.gpus if gpu.before]
    gpus = sorted({*manifest.gpu_names, *(state.name for state in states if state.name)})
    facts += [("GPUs", ", ".join(gpus))] if gpus else []
    return [(visible(name), visible(value)) for name, value in facts if value not in (None, "", {}, [])]


def _provenance(known: ProvenanceRecord) -> list[tuple[str, object]]:
    """All fields, in the order of the record; a nested one has a fact per entry."""
    found: list[tuple[str, object]] = []
    nested = {"versions": known.versions, "variables": known.variables, "transport": known.transport}
    for name, value in msgspec.to_builtins(known).items():
        if name in nested:
            entries = (nested[name] or {}).items()
            # The head of the page names the transport.
            found += [(f"{name}: {key}", _joined(one)) for key, one in entries if (name, key) != ("transport",) * 2]
        else:
            found.append((name.replace("_", " "), _joined(value)))
    return found


def _paths(run: Run) -> list[tuple[str, str]]:
    """The path according to the log of the library, over all records."""
    found: dict[str, Counter[str]] = {}
    for record in run.records:
        path: Mapping[str, object] = msgspec.to_builtins(record.path or PathRecord())
        for name, value in path.items():
            if name in _PATH_FACTS:
                found.setdefault(f"path {name}", Counter())[str(_joined(value))] += 1
    return [
        (name, "; ".join(f"{value} ({count} cases)" if len(values) > 1 else value for value, count in values.items()))
        for name, values in sorted(found.items())
    ]


def _joined(value: object) -> object:
    return " ".join(map(str, value)) if isinstance(value, list) else value
