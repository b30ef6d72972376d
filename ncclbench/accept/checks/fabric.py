"""Whether the profile is for this fabric at all: a rack is never failed by another fabric's figures."""

from collections.abc import Iterator

from ncclbench.accept.check_context import Subject
from ncclbench.store.records import Json
from ncclbench.store.verdict import CheckResult, Verdict


def check(subject: Subject) -> Iterator[CheckResult]:
    """One result."""
    profile, manifest = subject.rules.profile, subject.run.manifest
    evidence: list[dict[str, Json]] = [
        {
            "profile": profile.name,
            "transport": manifest.transport,
            "device": manifest.device,
            "gpus": manifest.gpu_names,
        }
    ]
    if subject.fabric_mismatch:
        verdict, reason = Verdict.INCONCLUSIVE, "another fabric: " + "; ".join(subject.fabric_mismatch)
    elif profile.fabric.gpu and not manifest.gpu_names:
        verdict, reason = Verdict.INCONCLUSIVE, "the run does not say which GPUs it had"
    else:
        verdict, reason = Verdict.PASS, "the one that the profile is for"
    yield CheckResult(check="fabric", subject=profile.name, verdict=verdict, reason=reason, evidence=evidence)
