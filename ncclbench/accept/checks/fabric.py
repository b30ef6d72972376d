"""Whether the profile is for this fabric: the figures of another fabric never fail a rack."""

from collections.abc import Iterator

from ncclbench.accept.check_context import CheckContext
from ncclbench.store.records import Json
from ncclbench.store.verdict import CheckResult, Verdict


def check(subject: CheckContext) -> Iterator[CheckResult]:
    """One result for the run."""
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
