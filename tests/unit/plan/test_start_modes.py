"""Modes of a plan: the cases and variables of each process start, and the refusal of invalid modes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from click.testing import CliRunner

from ncclbench.accept.checks import drift
from ncclbench.cli.run import command as run_command
from ncclbench.config.plugins import load
from ncclbench.errors import UsageError
from ncclbench.launch.next_start_command import next_command
from ncclbench.launch.process_starts import start_of_rank
from ncclbench.launch.recorder import RunRecorder
from ncclbench.launch.request import RunRequest, rank_arguments
from ncclbench.launch.watchdog.attribution import Fault
from ncclbench.plan.plan import parse_plan, read_plan
from ncclbench.plan.start_modes import mode_environment
from ncclbench.store.events import Event
from ncclbench.store.run_directory import Run, read_run
from tests.helpers.recorders import RememberingListener, prepared_run
from tests.helpers.stored import known, manifest

if TYPE_CHECKING:
    from pathlib import Path

MODES = """
name = "modes"
starts = 2
[[mode]]
name = "pxn"
variables = { NCCL_PXN_DISABLE = 0, NCCL_P2P_PXN_LEVEL = "2" }
[[mode]]
name = "spine"
variables = { NCCL_PXN_DISABLE = 1, NCCL_CROSS_NIC = 1 }
[[case]]
pattern = "cross_rail"
bytes = 4096
iterations = 4
params = { mode = ["pxn", "spine"] }
[[case]]
pattern = "same_rail"
bytes = 4096
iterations = 4
"""
FABRIC = "".join(f'[[node]]\nname = "n{d}"\n' for d in range(2)) + "".join(
    f'[[rank]]\nrank = {r}\nnode = "n{r // 2}"\nrail = {r % 2}\n' for r in range(4)
)
PXN, SPINE, SAME = (
    "cross_rail/float32/4096/isolated/mode=pxn",
    "cross_rail/float32/4096/isolated",
    "same_rail/float32/4096/isolated",
)


def test_case_has_its_needed_named_or_first_mode() -> None:
    plan = parse_plan(MODES, "p")
    assert {p.case.id: p.mode for p in plan.cases} == {PXN: "pxn", SPINE: "spine", SAME: "pxn"}
    named = parse_plan(MODES.replace('"same_rail"', '"same_rail"\nmode = "spine"'), "p")
    assert {p.case.id: p.mode for p in named.cases}[SAME] == "spine"


def test_modes_alternate_and_have_their_own_cases() -> None:
    plan = parse_plan(MODES, "p")
    assert plan.process_starts == 4
    assert [mode.name for k in range(4) if (mode := plan.mode_of(k))] == ["pxn", "spine", "pxn", "spine"]
    assert [plan.elsewhere(k) for k in range(2)] == [{SPINE}, {PXN, SAME}]
    assert parse_plan(MODES[: MODES.index("[[mode]]")] + MODES[MODES.index("[[case]]") :], "p").process_starts == 2


def test_selection_drops_modes_without_a_case(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(MODES)
    plan = read_plan(str(tmp_path / "p.toml"), only=["same_rail"])
    assert [mode.name for mode in plan.modes] == ["pxn"]


@pytest.mark.parametrize("name", ["cross-rail", "rails-quick"])
def test_shipped_plans_meet_the_needs_of_each_case(name: str) -> None:
    plan = read_plan(name)
    needs = load("patterns", "cross_rail").needs
    variables = {mode.name: mode.variables for mode in plan.modes}
    crossing = [p for p in plan.cases if p.case.pattern == "cross_rail"]
    assert {p.mode for p in crossing} == ({"pxn", "spine", "crossnic0"} if name == "cross-rail" else {"spine"})
    for planned in crossing:
        assert planned.mode is not None
        assert variables[planned.mode] == needs(planned.case).variables


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "spine"', 'name = "pxn"', "mode[1]: 'pxn' is given twice"),
        ('name = "spine"', 'name = "Spine!"', "mode[1]: name must be"),
        ("NCCL_CROSS_NIC = 1", "LD_PRELOAD = 1", "mode[1]: a mode sets only variables of NCCL_, UCX_"),
        ("NCCL_CROSS_NIC = 1", "'NCCL_A=B' = 1", "not 'NCCL_A=B'"),
        ("NCCL_CROSS_NIC = 1", "NCCL_CROSS_NIC = 0", 'needs a process started with NCCL_PXN_DISABLE = "1", NCCL_CROSS'),
        ("NCCL_CROSS_NIC = 1", "NCCL_CROSS_NIC = 1.5", "Expected `int | str`"),
        ("variables = { NCCL_PXN_DISABLE = 1", "variable = { NCCL_PXN_DISABLE = 1", "did you mean 'variables'"),
        ("[[mode]]", "[mode]", "write [[mode]], not [mode]"),
        ('"same_rail"', '"same_rail"\nmode = "spin"', "case[1]: no mode 'spin'; the plan has pxn, spine"),
        ('"cross_rail"', '"cross_rail"\nmode = "spine"', "which mode 'spine' does not set"),
        (', "spine"]', "]", "mode 'spine' has no case"),
    ],
)
def test_invalid_modes_are_refused(old: str, new: str, words: str) -> None:
    assert old in MODES
    text = MODES.replace(old, new, 1)
    if old == "[[mode]]":
        text = text.replace('[[mode]]\nname = "spine"\nvariables = { NCCL_PXN_DISABLE = 1, NCCL_CROSS_NIC = 1 }', "")
    with pytest.raises(UsageError) as refused:
        parse_plan(text, "p")
    assert words in str(refused.value)


def test_mode_in_a_plan_without_modes_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no mode 'x'; the plan has no \[\[mode\]\]"):
        parse_plan('name = "p"\n[[case]]\npattern = "all_reduce"\nbytes = 8\nmode = "x"\n', "p")


def test_mode_environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_PXN_DISABLE", "user")
    monkeypatch.delenv("NCCL_CROSS_NIC", raising=False)
    with mode_environment(parse_plan(MODES, "p").mode_of(1)):
        assert (os.environ["NCCL_PXN_DISABLE"], os.environ["NCCL_CROSS_NIC"]) == ("1", "1")
    assert os.environ["NCCL_PXN_DISABLE"] == "user"
    assert "NCCL_CROSS_NIC" not in os.environ


def ncclbench(folder: Path, *more: object) -> Any:
    (folder / "modes.toml").write_text(MODES)
    (folder / "fabric.toml").write_text(FABRIC)
    line = ["--plan", folder / "modes.toml", "--transport", "threads", "--nproc", 4]
    line += ["--topology", folder / "fabric.toml", "-o", folder / "run", *more]
    return CliRunner().invoke(run_command, [str(word) for word in line])


def one_of_several(folder: Path, number: int) -> Any:
    """Make one process start by a request, as a parent process does."""
    (folder / "modes.toml").write_text(MODES)
    (folder / "fabric.toml").write_text(FABRIC)
    request = RunRequest(
        plan=str(folder / "modes.toml"),
        transport="threads",
        nproc=4,
        topology=folder / "fabric.toml",
        out=folder / "run",
        one_of_several=True,
        process_start=number,
    )
    return CliRunner().invoke(run_command, rank_arguments(request)[1:])


def test_dry_run_shows_the_mode_of_each_start(tmp_path: Path) -> None:
    said = ncclbench(tmp_path, "--dry-run").output
    assert "process start 1, 3: mode pxn: NCCL_PXN_DISABLE=0 NCCL_P2P_PXN_LEVEL=2" in said
    assert "process start 2, 4: mode spine: NCCL_PXN_DISABLE=1 NCCL_CROSS_NIC=1" in said
    assert f"spine      {SPINE}\n" in said
    summary = json.loads(ncclbench(tmp_path, "--dry-run", "--json").output)
    assert (summary["starts"], summary["modes"]) == (4, ["pxn", "spine"])


def measured(folder: Path) -> list[tuple[int, str | None, str]]:
    return [(record.start, record.mode, record.case) for record in read_run(folder / "run").records]


def test_starts_of_modes_are_recorded_and_missing_ones_known(tmp_path: Path) -> None:
    """Make two of four process starts; the other two are known to be missing."""
    for number in (1, 2):
        assert one_of_several(tmp_path, number).exit_code == 0
    assert measured(tmp_path) == [(0, "pxn", PXN), (0, "pxn", SAME), (1, "spine", SPINE)]
    run = read_run(tmp_path / "run")
    assert (run.declared_starts, run.starts_of_a_case, run.open_start) == (4, 2, 2)
    assert [run.missing_from(k) for k in range(4)] == [[], [], [PXN, SAME], [SPINE]]
    told = [
        (e.start, e.mode, known(known(e.software)[0].variables).get("NCCL_CROSS_NIC"))
        for e in run.events
        if e.kind == "start"
    ]
    assert told == [(0, "pxn", None), (1, "spine", "1")]
    refused = ncclbench(tmp_path, "--resume", "--process-start", "5")
    assert str(refused.exception) == "--process-start must be 1 to 4, the number in the plan; got 5"
    plan = parse_plan(MODES, "p")
    assert start_of_rank(plan, tmp_path / "run", resume=True, asked=None) == 2
    assert start_of_rank(plan, tmp_path / "run", resume=True, asked=4) == 3
    with pytest.raises(UsageError, match="name the process start with --process-start N"):
        start_of_rank(plan, tmp_path / "elsewhere", resume=True, asked=None)
    assert start_of_rank(replace(plan, modes=()), tmp_path / "elsewhere", resume=True, asked=None) is None


def test_interrupted_start_records_its_mode_and_is_resumed(tmp_path: Path) -> None:
    plan = parse_plan(MODES, "p")
    for start in range(4):
        recorder = RunRecorder(prepared_run(tmp_path / "r", RememberingListener(), plan=plan, start=start))
        elsewhere = recorder.open(manifest(plan=plan.as_record()))
        assert elsewhere == plan.elsewhere(start)
        mine = [planned for planned in plan.cases if planned.case.id not in elsewhere]
        recorder.begin(0, mine[0])
        recorder.fault(Fault("failed", (1,), "rank 1 died", 0))
    run = read_run(tmp_path / "r")
    assert [(r.start, r.mode, r.status) for r in run.records] == [
        (k, ("pxn", "spine")[k % 2], "failed") for k in range(4)
    ]
    assert run.open_start == 0


def test_next_command_names_the_process_start(tmp_path: Path) -> None:
    line = ["run", "--plan", "p", "-o", "r", "--process-start", "1", "--resume"]
    assert next_command("slurm", line, tmp_path, {}, 1).endswith(
        "ncclbench run --plan p -o r --resume --process-start 2"
    )
    assert "--process-start" not in next_command("slurm", line, tmp_path, {})


@pytest.mark.parametrize(
    ("mode", "variables", "drifts"),
    [
        ("spine", {"NCCL_PXN_DISABLE": "1", "NCCL_CROSS_NIC": "1", "NCCL_DEBUG": "INFO"}, False),
        ("spine", {"NCCL_PXN_DISABLE": "1", "NCCL_CROSS_NIC": "0", "NCCL_DEBUG": "INFO"}, True),
        ("spine", {"NCCL_PXN_DISABLE": "1", "NCCL_CROSS_NIC": "1"}, True),
        ("pxn", {"NCCL_PXN_DISABLE": "1", "NCCL_DEBUG": "INFO"}, True),
    ],
)
def test_drift_check_ignores_only_the_modes_variables(
    mode: str, variables: dict[str, str], drifts: bool, tmp_path: Path
) -> None:
    first = {"NCCL_PXN_DISABLE": "0", "NCCL_P2P_PXN_LEVEL": "2", "NCCL_DEBUG": "INFO"}
    events = [
        {"kind": "start", "start": k, "mode": name, "software": [{"ranks": [0], "versions": {}, "variables": values}]}
        for k, (name, values) in enumerate([("pxn", first), (mode, variables)])
    ]
    run = Run(
        tmp_path,
        manifest(plan=parse_plan(MODES, "p").as_record()),
        (),
        tuple(msgspec.convert(events, list[Event])),
    )

    class Subject:
        """The attributes of a subject that the check reads."""

    subject: Any = Subject()
    subject.run = run
    assert bool(drift.between_starts(subject, [])) == drifts
