"""From a run and a profile to a verdict: every check is asked, and what they say is added up. Pure but for reading."""

from collections.abc import Iterable

from ncclbench import __version__
from ncclbench.accept.check_context import Subject
from ncclbench.accept.verdict import SCHEMA, Document, ProfileName, Result, Starts, Verdict, exit_code, overall
from ncclbench.config.plugins import load, names
from ncclbench.store.stamps import ranks_per_gpu, share_a_machine


def judge(subject: Subject) -> Document:
    """The verdict on a run: what every check says of it, in the order of the checks' names."""
    results = [result for name in names("checks") for result in ask(name, subject)]
    measured = any(view.timed for view in subject.cases)
    verdict, reasons = overall(results, measured=measured)
    run, rules = subject.run, subject.rules
    present = sum(not run.missing_from(start) for start in range(run.declared_starts)) if run.records else 0
    return Document(
        schema=SCHEMA,
        verdict=verdict,
        reasons=reasons,
        profile=ProfileName(name=rules.profile.name, sha256=rules.sha256),
        stamps=stamps(subject),
        starts=Starts(declared=run.declared_starts, present=present),
        exit_code=int(exit_code(verdict, results)),
        judged_by=f"ncclbench {__version__}",
        baseline=subject.baseline.path.name if subject.baseline else None,
        checks=results,
    )


def ask(name: str, subject: Subject) -> list[Result]:
    """What one check says; one that breaks makes the verdict inconclusive and never takes the others with it."""
    try:
        found: Iterable[Result] = load("checks", name).check(subject)
        return list(found)
    except Exception as error:  # a third party's file may do anything
        reason = f"the check itself failed: {type(error).__name__}: {error}".replace("\n", " ")
        return [Result(check=name, subject="run", verdict=Verdict.INCONCLUSIVE, reason=reason)]


def stamps(subject: Subject) -> list[str]:
    """What every document about this run must carry in large letters."""
    manifest = subject.run.manifest
    found = list(subject.rules.profile.stamps)
    found += ["cpu only"] if manifest.get("device") == "cpu" else []
    found += ["shared GPUs"] if ranks_per_gpu(manifest) > 1 else []
    found += ["nodes of one machine"] if share_a_machine(manifest) else []
    found += ["NVLS switched off"] if "off" in subject.nvls else []
    found += ["simulated"] if manifest.get("transport") == "model" else []
    found += ["imported"] if manifest.get("imported") else []
    found += ["forced"] if subject.forced and subject.baseline is not None else []
    found += ["synthetic"] if manifest.get("synthetic") else []
    found += ["redacted"] if manifest.get("redacted") else []
    return list(dict.fromkeys(found))
