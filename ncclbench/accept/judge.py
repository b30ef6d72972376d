"""Judge a run by a profile: run every check and combine the results into a verdict. It only reads files."""

from collections.abc import Iterable, Sequence

from ncclbench import __version__
from ncclbench.accept.check_context import CheckContext
from ncclbench.config.plugins import load, names
from ncclbench.errors import Exit, worst
from ncclbench.store.run_directory import Stamp
from ncclbench.store.verdict import SCHEMA, CheckResult, ProfileReference, RunVerdict, StartCounts, Verdict
from ncclbench.units import counted


def judge(subject: CheckContext) -> RunVerdict:
    """The verdict on a run, with the results of all checks in the order of the checks' names."""
    results = [result for name in names("checks") for result in run_check(name, subject)]
    measured = any(view.timed for view in subject.cases)
    verdict, reasons = overall(results, measured=measured)
    run, rules = subject.run, subject.rules
    return RunVerdict(
        schema=SCHEMA,
        verdict=verdict,
        reasons=reasons,
        profile=ProfileReference(name=rules.profile.name, sha256=rules.sha256),
        stamps=stamps(subject),
        starts=StartCounts(declared=run.declared_starts, present=run.present_starts),
        exit_code=int(exit_code(verdict, results)),
        judged_by=f"ncclbench {__version__}",
        baseline=subject.baseline.path.name if subject.baseline else None,
        checks=results,
    )


def run_check(name: str, subject: CheckContext) -> list[CheckResult]:
    """The results of one check. A check that raises an exception is INCONCLUSIVE; the other checks still run."""
    try:
        found: Iterable[CheckResult] = load("checks", name).check(subject)
        return list(found)
    except Exception as error:  # a third-party check may raise anything
        reason = f"the check itself failed: {type(error).__name__}: {error}".replace("\n", " ")
        return [CheckResult(check=name, subject="run", verdict=Verdict.INCONCLUSIVE, reason=reason)]


def stamps(subject: CheckContext) -> list[str]:
    """The stamps that every document about this run must show; those of the profile come first."""
    found = {
        *subject.run.stamps,
        *([Stamp.NVLS_OFF] if "off" in subject.nvls else []),
        *([Stamp.FORCED] if subject.forced and subject.baseline is not None else []),
    }
    ours = [stamp.value for stamp in Stamp if stamp in found]
    return list(dict.fromkeys([*subject.rules.profile.stamps, *ours]))


def overall(results: Sequence[CheckResult], *, measured: bool) -> tuple[Verdict, list[str]]:
    """The verdict on the whole run, and why.

    FAIL if any check fails. INCONCLUSIVE if any check is, if a required entry was not measured, or if every figure was
    compared with assumed figures only: a run that measured nothing cannot pass.

    Args:
        results: the results of all checks.
        measured: whether any case was timed at all.
    """
    failed = _counted(results, Verdict.FAIL)
    inconclusive = _counted(results, Verdict.INCONCLUSIVE)
    missing = [r for r in results if r.verdict is Verdict.NOT_RUN and r.required]
    reasons = [f"{name}: {many} failed" for name, many in failed.items()]
    reasons += [f"{name}: {many} inconclusive" for name, many in inconclusive.items()]
    if missing:
        reasons.append(f"{counted(len(missing), 'required entry')} of the profile not measured")
    if not measured:
        reasons.append("no case was measured")
    elif not any(r.conclusive for r in results):
        reasons.append("no figure was held against a published or measured one")
    if failed:
        return Verdict.FAIL, reasons
    if not measured:
        return Verdict.NOT_RUN, reasons
    if reasons:
        return Verdict.INCONCLUSIVE, reasons
    passed = sum(r.verdict is Verdict.PASS for r in results)
    return Verdict.PASS, [f"{passed} checks passed, none failed"]


def _counted(results: Iterable[CheckResult], verdict: Verdict) -> dict[str, int]:
    counts: dict[str, int] = {}
    for result in results:
        if result.verdict is verdict:
            counts[result.check] = counts.get(result.check, 0) + 1
    return counts


_EXIT_OF_VERDICT = {Verdict.PASS: Exit.GOOD, Verdict.FAIL: Exit.FAIL}
_EXIT_OF_CAUSE = {"wrong_data": Exit.WRONG_DATA, "environment": Exit.ENVIRONMENT}


def exit_code(verdict: Verdict, results: Iterable[CheckResult]) -> Exit:
    """The exit code of the verdict, or of a more severe cause that a check names."""
    causes = [_EXIT_OF_CAUSE[r.cause] for r in results if r.cause and r.verdict is not Verdict.PASS]
    return worst([_EXIT_OF_VERDICT.get(verdict, Exit.INCONCLUSIVE), *causes])
