"""The path of the data: allowed by the profile, and proven by counters where the profile requires it."""

from collections.abc import Iterator

from ncclbench.accept.case_facts import CaseView, matches_any
from ncclbench.accept.check_context import CheckContext, row
from ncclbench.accept.profile import PathRules
from ncclbench.store.records import PathRecord
from ncclbench.store.verdict import Action, CheckResult, Verdict


def check(subject: CheckContext) -> Iterator[CheckResult]:
    """One result per measured case."""
    rules = subject.rules.profile.path
    if rules is None or subject.fabric_mismatch:
        reason = subject.skipped_by_mismatch() if subject.fabric_mismatch else "the profile says nothing about paths"
        yield CheckResult(check="path", subject="run", verdict=Verdict.NOT_RUN, reason=reason)
        return
    for view in subject.cases:
        if view.timed and view.facts.ranks == 1:
            reason = "a group of one rank moves nothing"
            yield CheckResult(check="path", subject=view.id, verdict=Verdict.NOT_RUN, reason=reason)
        elif view.timed:
            yield _judge(view, rules)


def _judge(view: CaseView, rules: PathRules) -> CheckResult:
    worst: tuple[Verdict, str, Action | None] = (Verdict.PASS, "as allowed in every start", None)
    for record in view.timed:
        verdict, reason, action = _judge_record(record.path or PathRecord(), rules, view.facts.nodes)
        if verdict is Verdict.FAIL or (verdict is Verdict.INCONCLUSIVE and worst[0] is Verdict.PASS):
            worst = (verdict, f"{reason} (start {record.start})", action)
        if verdict is Verdict.FAIL:
            break
    verdict, reason, action = worst
    evidence = [row(record, path=record.path, allowed=rules.allowed) for record in view.timed]
    return CheckResult(check="path", subject=view.id, verdict=verdict, reason=reason, action=action, evidence=evidence)


def _judge_record(path: PathRecord, rules: PathRules, nodes: int | None) -> tuple[Verdict, str, Action | None]:
    links = path.links
    network = [f"NET/{path.network}"] if isinstance(path.network, str) and (nodes or 0) > 1 else []
    refused = [link for link in [*links, *network] if not matches_any(link, rules.allowed)]
    if refused:
        reason = f"went over {', '.join(sorted(set(refused)))}; allowed: {', '.join(rules.allowed)}"
        return Verdict.FAIL, reason, Action.RESEAT_OR_REBOOT
    if path.proof == "contradicted":
        return Verdict.FAIL, "counters contradict the path that was asked for", Action.CHECK_SWITCH
    if not links:
        return Verdict.INCONCLUSIVE, "path unverified: no link was recorded", Action.MONITOR
    if (nodes is None or nodes > 1) and rules.across_nodes:
        across = [link for link in links if matches_any(link, rules.across_nodes)]
        if not across:
            wanted = ", ".join(rules.across_nodes)
            return Verdict.INCONCLUSIVE, f"path unverified: none of {wanted} between nodes", Action.MONITOR
        if rules.gdr and path.gdr is False:
            return Verdict.FAIL, "NICs did not read GPU memory directly (no GDRDMA)", Action.RESEAT_OR_REBOOT
    if rules.proof and path.proof != "proven":
        return Verdict.INCONCLUSIVE, "path unverified: no counter proves it", Action.MONITOR
    return Verdict.PASS, "as allowed", None
