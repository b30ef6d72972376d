"""Whether the profile is for this fabric at all: a rack is never failed by another fabric's figures."""

from collections.abc import Iterator

from ncclbench.accept.case_facts import gpu_names
from ncclbench.accept.check_context import Subject
from ncclbench.accept.verdict import Result, Verdict


def check(subject: Subject) -> Iterator[Result]:
    """One result."""
    profile, manifest = subject.rules.profile, subject.run.manifest
    evidence = [
        {
            "profile": profile.name,
            "transport": manifest.get("transport"),
            "device": manifest.get("device"),
            "gpus": gpu_names(manifest),
        }
    ]
    if subject.fabric_mismatch:
        verdict, reason = Verdict.INCONCLUSIVE, "another fabric: " + "; ".join(subject.fabric_mismatch)
    elif profile.fabric.gpu and not gpu_names(manifest):
        verdict, reason = Verdict.INCONCLUSIVE, "the run does not say which GPUs it had"
    else:
        verdict, reason = Verdict.PASS, "the one that the profile is for"
    yield Result(check="fabric", subject=profile.name, verdict=verdict, reason=reason, evidence=evidence)
