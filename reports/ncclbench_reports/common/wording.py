"""What several formats say in the same words: stamps, verdicts, and text from outside made visible."""

import re
from collections.abc import Sequence

from ncclbench.store.run_directory import Run, Stamp
from ncclbench.store.verdict import RunVerdict, read_verdict

NO_VERDICT = "no verdict: this run was measured, not judged"
CPU_ONLY = "CPU only: proves logic, not a fabric"
SHARED = "ranks share GPUs: proves logic, not a fabric"
ONE_MACHINE = "nodes of one machine: proves logic, not a fabric"
IMPORTED = "imported from"

# Figures as another program defines them: columns of the frame, under heads that nobody can take for our own.
AS_OTHERS_COUNT = (
    ("deepep_dispatch_gb_per_s", "dispatch as DeepEP counts"),
    ("deepep_combine_gb_per_s", "combine as DeepEP counts"),
)
AS_DEEPEP = (
    '"as DeepEP counts": all rows that the busiest rank receives, or sends back, its own included: R/(R-1) too '
    "high; beside DeepEP's own figures only, no bus bandwidth"
)

# What stamps are called in a report. Those that are left out say it in other words, or in their own.
_STAMPS = {
    Stamp.SIMULATED: "simulated",
    Stamp.CPU_ONLY: CPU_ONLY,
    Stamp.SHARED_GPUS: SHARED,
    Stamp.ONE_MACHINE: ONE_MACHINE,
    Stamp.REDACTED: "redacted",
}
_JUDGED = {**_STAMPS, Stamp.FORCED: "forced: compared although fabric, versions or settings differ"}
# Controls, and the marks that turn the direction of text or take no room: a name could hide behind them.
_INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u115f\u1160\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
)


def visible(text: object, limit: int = 0) -> str:
    """`text` with controls and marks of direction written out as ``\\u202e``; cut to `limit` characters if given."""
    shown = _INVISIBLE.sub(lambda found: f"\\u{ord(found.group()):04x}", str(text))
    shown = shown.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is no text
    return shown if not limit or len(shown) <= limit else f"{shown[: limit - 1]}…"


def stamps(run: Run, judgement: RunVerdict | None) -> list[str]:
    """What every page of a report on `run` must carry."""
    said = {stamp: words for stamp, words in _STAMPS.items() if stamp in run.stamps}
    redacted = said.pop(Stamp.REDACTED, None)
    found = [*said.values()]
    found += [f"{IMPORTED} {visible(one.tool)} {visible(one.version or '')}".rstrip() for one in run.manifest.imported]
    found += [redacted] if redacted else []
    words = {stamp.value: text for stamp, text in _JUDGED.items()}
    judged = [words.get(stamp, visible(stamp)) for stamp in (judgement.stamps if judgement else [])]
    # A profile's own words may be the end of what is said already.
    found += [stamp for stamp in judged if not any(said.endswith(f": {stamp}") for said in (*found, *judged))]
    return list(dict.fromkeys(found))


def times_are(run: Run) -> str:
    """What the headline times of a run are."""
    kinds = {record.time_is for record in run.records}
    if "mean" not in kinds:
        return "time is the median over iterations of the slowest rank"
    if "median" not in kinds:
        return "time is a mean over launches, as the log has it"
    return "time is a mean over launches, as the log has it, where n is 1, and the median over iterations elsewhere"


def judgements(runs: Sequence[Run]) -> list[RunVerdict | None]:
    """The verdict of each run that has one."""
    return [read_verdict(run.path) for run in runs]


def verdict_line(judgement: RunVerdict | None) -> str:
    """The verdict and its reasons in a line."""
    if judgement is None:
        return NO_VERDICT
    reasons = "; ".join(visible(reason) for reason in judgement.reasons)
    return f"{judgement.verdict}: {reasons}" if reasons else judgement.verdict


def unmeasured(run: Run) -> list[tuple[int, str]]:
    """The process start and the name of each planned case that there is no record of, good or bad."""
    there = {(record.start, record.case) for record in run.records}
    wanted = [(start, case) for start in range(run.declared_starts) for case in run.missing_from(start)]
    return [case for case in wanted if case not in there]


def losses_of(run: Run) -> list[str]:
    """What a run lost as a whole: warnings, ranks that died, a cut, and how much of the plan is missing for it."""
    found = [f"{event.kind}: {visible(event.says)}" for event in run.events if event.kind in ("warning", "lost")]
    if run.interrupted_in:
        found.append(f"cut off in {visible(run.interrupted_in)}; go on with --resume")
    if missing := len(unmeasured(run)):
        found.append(f"{missing} of the plan's cases {'was' if missing == 1 else 'were'} not measured")
    return found


def warnings_of(run: Run) -> list[str]:
    """What of a run a reader must know before trusting it, each once, with the number of cases it is about."""
    remarks: dict[str, list[str]] = {}
    for record in run.records:
        if record.status != "ok":
            remarks.setdefault(f"{record.status}: {record.reason}", []).append(record.case)
        for note in record.notes:
            remarks.setdefault(note, []).append(record.case)
    found = [
        f"{visible(cases[0])}: {visible(what)}" + (f" (and {len(cases) - 1} more cases)" if len(cases) > 1 else "")
        for what, cases in remarks.items()
    ]
    return found + losses_of(run)
