"""The GPU profiles and their plans on usual fabrics, with synthetic records.

The records have the paths of NCCL's logs on such a fabric, and the cases of the shipped plans.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ncclbench.accept.check_context import CheckContext
from ncclbench.accept.example_runs import Example, ExampleCase, example_run, write_example
from ncclbench.accept.profile import load_profile
from ncclbench.cli import cli
from ncclbench.config.plugins import load
from ncclbench.errors import Exit
from ncclbench.plan.plan import read_plan
from ncclbench.store.verdict import Verdict

pytestmark = pytest.mark.usefixtures("unsynced")

G = 1 << 30


@dataclass(frozen=True)
class World:
    """A fabric: its nodes and GPUs, the nodes per NVLink domain, and the link layer of its NICs."""

    profile: str
    nodes: int
    gpus: int = 8
    domain_nodes: int = 1
    speaks: str = "IB"

    @property
    def domains(self) -> int:
        return self.nodes // self.domain_nodes


RACK: dict[str, Any] = {"gpus": 4, "domain_nodes": 18, "speaks": "RoCE"}
WORLDS = [
    World("h100-hgx-ib", 1),
    World("h100-hgx-ib", 2),
    World("h100-hgx-ib", 8),
    World("h100-hgx-ib", 16),
    World("h100-hgx-roce", 2, speaks="RoCE"),
    World("h200-hgx", 1),
    World("h200-hgx", 4),
    World("b200-hgx", 1),
    World("b200-hgx", 2),
    World("gb200-nvl72", 18, **RACK),
    World("gb200-nvl72", 36, **RACK),
    World("gb300-nvl72", 18, **RACK),
    World("gb300-nvl72", 36, **RACK),
]


def example(world: World, plan: str, **changes: float) -> Example:
    """A fast run of the plan's cases on a world; `changes` sets the rate of some: pattern.group -> GB/s."""
    cases = []
    for planned in read_plan(plan).cases:
        case, flows = planned.case, planned.case.pattern == "same_rail"
        if flows and world.domains == 1:
            continue  # skipped: no NIC is used inside a domain
        group = str(case.params.get("group", "world"))
        over_nics = flows or (group == "rail" and world.domains > 1)
        quick = min(49.0 * (2 if world.gpus == 4 else 1) if over_nics else 1000.0, case.nbytes / 10e-6 / 1e9)
        rate = changes.get(f"{case.pattern}.{group}", quick) if case.nbytes >= G else quick
        made = ExampleCase(pattern=case.pattern, nbytes=case.nbytes, bus_gb_per_s=rate, group=group, flows=flows)
        cases.append(replace(made, timing=str(case.timing), samples=7, noise=1e-3))
    within = ("P2P/CUMEM",)
    return Example(
        cases=tuple(cases),
        nodes=world.nodes,
        ranks_per_node=world.gpus,
        domain_nodes=world.domain_nodes,
        gpu=load_profile(world.profile).profile.fabric.gpu[0].rstrip("*"),
        links=within if world.nodes == 1 else ("NET/IB", *within),
        link_layer=() if world.nodes == 1 else (world.speaks,),
    )


@pytest.mark.parametrize("plan", ["accept-quick", "accept-full"])
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: f"{world.profile}-{world.nodes}")
def test_every_case_has_an_entry_and_every_entry_a_case(world: World, plan: str) -> None:
    """A case without an entry cannot pass, and an entry without a case judges no case."""
    subject = CheckContext(example_run(example(world, plan)), load_profile(world.profile))
    assert not subject.fabric_mismatch
    results = list(load("checks", "floor").check(subject))
    odd = [r for r in results if r.verdict is not Verdict.PASS and "speed not judged" not in r.reason]
    if plan == "accept-full":
        assert odd == []
    # send_recv and one more size of all_to_all are left to accept-full; `same_rail` judges the same NICs.
    assert all(r.verdict is Verdict.NOT_RUN and not r.required and "512M or more" in r.subject for r in odd)


# World, op of the plan with its group, published figure, lower figure.
PUBLISHED = [
    (World("h100-hgx-ib", 1), "all_reduce.world", 480.0, 367.0),
    (World("h100-hgx-ib", 2), "all_reduce.world", 440.6, 330.0),
    (World("h100-hgx-ib", 8), "all_reduce.world", 386.6, 200.0),
    (World("h100-hgx-ib", 2), "same_rail.world", 46.0, 25.0),
    (World("h100-hgx-roce", 2, speaks="RoCE"), "all_reduce.world", 430.0, 200.0),
    (World("h200-hgx", 1), "all_reduce.world", 475.0, 367.0),
    (World("b200-hgx", 2), "all_reduce.world", 690.0, 440.6),
    (World("gb200-nvl72", 18, **RACK), "all_reduce.world", 835.0, 600.0),
    (World("gb300-nvl72", 18, **RACK), "all_reduce.world", 895.0, 800.0),
]


def judged(path: Path, made: Example, profile: str) -> dict[str, Any]:
    """The JSON document of ``ncclbench accept``, with its exit code."""
    write_example(path, made)
    done = CliRunner().invoke(cli, ["accept", str(path), "--profile", profile, "--json"])
    document: dict[str, Any] = json.loads(done.output.splitlines()[-1])
    assert done.exit_code == document["exit_code"]
    return document


@pytest.mark.parametrize(
    ("world", "op", "good", "bad"), PUBLISHED, ids=[f"{w.profile}-{w.nodes}-{op}" for w, op, *_ in PUBLISHED]
)
def test_published_figure_passes_and_a_lower_one_fails(
    world: World, op: str, good: float, bad: float, tmp_path: Path
) -> None:
    passed = judged(tmp_path / "good", example(world, "accept-quick", **{op: good}), world.profile)
    assert (passed["verdict"], passed["exit_code"]) == ("PASS", Exit.GOOD), passed["reasons"]
    failed = judged(tmp_path / "bad", example(world, "accept-quick", **{op: bad}), world.profile)
    assert (failed["verdict"], failed["exit_code"]) == ("FAIL", Exit.FAIL)
    named = {check["subject"] for check in failed["checks"] if check["verdict"] == "FAIL"}
    assert named
    assert all(subject.startswith(op.partition(".")[0]) and "group" not in subject for subject in named)


ASSUMED = [
    (World("h100-hgx-ib", 4), "all_reduce.world", 200.0),
    (World("h100-hgx-ib", 2), "all_to_all.world", 20.0),
    (World("h100-hgx-roce", 4, speaks="RoCE"), "all_reduce.world", 100.0),
    (World("h200-hgx", 4), "all_reduce.world", 200.0),
    (World("b200-hgx", 1), "all_reduce.world", 300.0),
    (World("gb200-nvl72", 18, **RACK), "all_reduce.node", 300.0),
    (World("gb300-nvl72", 18, **RACK), "all_reduce.node", 300.0),
    (World("gb300-nvl72", 36, **RACK), "same_rail.world", 50.0),
]


@pytest.mark.parametrize(("world", "op", "bad"), ASSUMED, ids=[f"{w.profile}-{w.nodes}-{op}" for w, op, _ in ASSUMED])
def test_missed_assumed_figure_is_inconclusive(world: World, op: str, bad: float, tmp_path: Path) -> None:
    document = judged(tmp_path / "run", example(world, "accept-quick", **{op: bad}), world.profile)
    assert (document["verdict"], document["exit_code"]) == ("INCONCLUSIVE", Exit.INCONCLUSIVE)
    missed = [check for check in document["checks"] if check["verdict"] == "INCONCLUSIVE"]
    assert missed
    assert all("that figure is assumed" in check["reason"] for check in missed)


# Topology files of a GB300 NVL72 rack and of two nodes of 8 H100.
def nodes(number: int, nics: int, domain: str = "") -> str:
    nic = "".join(f"[[node.nic]]\nrail = {rail}\n" for rail in range(nics))
    return "".join(f'[[node]]\nname = "n{k}"\n{domain}{nic}' for k in range(number))


FABRICS = {
    "gb300-nvl72": (72, nodes(18, 4, 'domain = "rack"\n')),
    "h100-hgx-ib": (16, nodes(2, 8)),
}
_ORDER = ["group=node", "group=domain", "direction=apart", "group=rail"]


def _stage(case: str) -> int:
    """The index of the stage: one node, domain, pairs, rails, all."""
    return next((k for k, word in enumerate(_ORDER) if word in case), len(_ORDER))


@pytest.mark.parametrize("plan", ["accept-quick", "accept-full"])
@pytest.mark.parametrize("profile", FABRICS)
def test_dry_run_shows_stages_in_order_and_duration(profile: str, plan: str, tmp_path: Path) -> None:
    ranks, text = FABRICS[profile]
    (tmp_path / "rack.toml").write_text(text)
    line = f"accept --profile {profile} --plan {plan} --dry-run --json --nproc {ranks} --topology {tmp_path}/rack.toml"
    done = CliRunner().invoke(cli, line.split())
    assert done.exit_code == Exit.GOOD, done.output
    planned = json.loads(done.output.splitlines()[-1])
    assert (planned["plan"], planned["world_size"], planned["starts"]) == (plan, ranks, 3)
    stages = [_stage(case["case"]) for case in planned["cases"]]
    assert stages == sorted(stages)
    assert set(stages) == set(range(5))
    skipped = {_stage(case["case"]) for case in planned["cases"] if case["skipped"]}
    assert skipped == ({2} if profile == "gb300-nvl72" else set()), "inside of one rack no pair of GPUs uses its NICs"
    assert 120 <= planned["seconds"] <= (5 * 60 if plan == "accept-quick" else 20 * 60)
    assert not list(tmp_path.glob("runs*"))


@pytest.mark.parametrize("profile", ["h100-hgx-ib", "h200-hgx", "b200-hgx"])
def test_single_gpu_is_inconclusive_only_for_missing_figures(profile: str, tmp_path: Path) -> None:
    """No path and no rate are judged, so the only reason is the missing figure."""
    gpu = load_profile(profile).profile.fabric.gpu[0].rstrip("*")
    cases = tuple(ExampleCase(pattern=name, nbytes=4 * G, bus_gb_per_s=1) for name in ("all_reduce", "all_to_all"))
    alone = Example(cases=cases, nodes=1, ranks_per_node=1, gpu=gpu, links=())
    path = write_example(tmp_path / "run", alone)
    done = CliRunner().invoke(cli, ["accept", str(path), "--profile", profile, "--json"])
    document = json.loads(done.output.splitlines()[-1])
    assert (document["verdict"], done.exit_code) == ("INCONCLUSIVE", Exit.INCONCLUSIVE)
    assert document["reasons"] == ["no figure was held against a published or measured one"]
