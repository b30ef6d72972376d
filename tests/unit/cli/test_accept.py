"""``ncclbench accept`` and ``verify``: output, exit codes and invalid input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from ncclbench.accept.example_runs import Example, ExampleCase, write_example
from ncclbench.accept.profile import load_profile, parse_profile
from ncclbench.api import FinishedRun
from ncclbench.cli import cli
from ncclbench.errors import Exit, NcclbenchError
from ncclbench.launch.next_start_command import next_command

pytestmark = pytest.mark.usefixtures("unsynced")

G = 1 << 30
GOOD = Example(cases=(ExampleCase(pattern="all_reduce", nbytes=8 * G, bus_gb_per_s=440.6, samples=12),), nodes=2)
NODE = ExampleCase(pattern="all_reduce", nbytes=8 * G, bus_gb_per_s=478, group="node", samples=12)
GOOD = replace(GOOD, cases=(*GOOD.cases, NODE))


@dataclass(frozen=True)
class Said:
    """Exit code and output of a command."""

    code: int
    out: str


def call(*arguments: object) -> Said:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if isinstance(done.exception, NcclbenchError):
        return Said(int(done.exception.exit_code), str(done.exception))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return Said(done.exit_code, done.output)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example(tmp_path_factory.mktemp("runs") / "good", GOOD)


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run"


def slower(*factors: float) -> Example:
    return replace(
        GOOD, cases=tuple(replace(c, bus_gb_per_s=c.bus_gb_per_s * f) for c, f in zip(GOOD.cases, factors, strict=True))
    )


def test_verdict_is_first_and_details_are_last(run: Path) -> None:
    said = call("accept", run, "--profile", "h100-hgx-ib")
    assert said.code == Exit.GOOD, said.out
    lines = said.out.splitlines()
    assert lines[0] == "PASS  profile h100-hgx-ib, 3 of 3 process starts  [synthetic]"
    assert lines[-1].startswith(f"details: {run}/verdict.json")
    assert len(lines) == 3


def test_failed_checks_have_a_line_each_fail_first(tmp_path: Path) -> None:
    noisy = replace(slower(0.5, 1.0), made=2)
    path = write_example(tmp_path / "run", noisy)
    said = call("accept", path, "--profile", "h100-hgx-ib", "--json")
    assert said.code == Exit.INCONCLUSIVE, "two starts of three judge no speed"
    document = json.loads(said.out.splitlines()[-1])
    assert document["verdict"] == "INCONCLUSIVE"
    told = [line for line in said.out.splitlines() if line.startswith(("FAIL  ", "INCONCLUSIVE  "))][1:]
    open_ = [check for check in document["checks"] if check["verdict"] in ("FAIL", "INCONCLUSIVE")]
    assert len(told) == len(open_)
    failing = call("accept", write_example(tmp_path / "slow", slower(0.5, 1.0)), "--profile", "h100-hgx-ib")
    assert failing.code == Exit.FAIL
    assert failing.out.splitlines()[2].startswith("FAIL          floor")
    assert failing.out.splitlines()[2].endswith("-> CHECK_SWITCH")


def test_long_output_is_cut_and_names_the_file(tmp_path: Path) -> None:
    cases = tuple(ExampleCase(pattern="gather", nbytes=G + 1024 * k, bus_gb_per_s=1, samples=8) for k in range(60))
    path = write_example(tmp_path / "run", replace(GOOD, cases=cases, ranks_per_node=2, starts=1))
    said = call("accept", path, "--profile", "h100-hgx-ib")
    assert len(said.out.splitlines()) < 60
    assert "more, all in" in said.out


def test_verify_ends_in_0_or_1(run: Path) -> None:
    assert call("verify", run).code == Exit.FAIL, "it was never judged"
    call("accept", run, "--profile", "h100-hgx-ib")
    sound = call("verify", run)
    assert (sound.code, sound.out.splitlines()[0]) == (Exit.GOOD, f"SOUND  {run}")
    (run / "results.jsonl").write_bytes(b"")
    bad = call("verify", run)
    assert bad.code == Exit.FAIL
    assert "results.jsonl was changed" in bad.out


def test_redact_names_the_redacted_copy(run: Path) -> None:
    said = call("accept", run, "--profile", "h100-hgx-ib", "--redact")
    assert said.out.splitlines()[-1] == f"redacted copy: {run}-redacted"
    assert call("verify", f"{run}-redacted").code == Exit.GOOD
    assert "n0000" not in Path(f"{run}-redacted/verdict.json").read_text()


def test_redacted_baseline_verifies(run: Path, tmp_path: Path) -> None:
    base = write_example(tmp_path / "base", replace(GOOD, seed=1))
    said = call("accept", run, "--profile", "h100-hgx-ib", "--redact", "--baseline", base)
    assert said.code == Exit.GOOD, said.out
    assert call("verify", f"{run}-redacted").code == Exit.GOOD
    assert "n0000" not in Path(f"{run}-redacted/accept/baseline.json").read_text()


def test_redacted_profile_hides_hosts_and_judges_alike(run: Path, tmp_path: Path) -> None:
    text = load_profile("h100-hgx-ib").text
    text += """
[[floor]]
where = { pattern = "all_reduce", bytes = { min = "8G" }, group = "node", nodes = 1 }  # as on n0001
at_least = 470.0
tolerance = 0.0
basis = "measured"
source = "n0000, serial 1320023000000, on 10.0.0.7"
date = "2026-01-01"
"""
    (tmp_path / "ours.toml").write_text(text)
    said = call("accept", run, "--profile", tmp_path / "ours.toml", "--redact")
    assert said.code == Exit.GOOD, said.out
    copy = Path(f"{run}-redacted")
    handed_on = (copy / "accept/profile.toml").read_text() + (copy / "verdict.json").read_text()
    assert not [secret for secret in ("n0000", "n0001", "1320023000000", "10.0.0.7") if secret in handed_on]
    assert call("verify", copy).code == Exit.GOOD
    before, after = (json.loads((path / "verdict.json").read_text()) for path in (run, copy))
    assert [(c["check"], c["verdict"]) for c in before["checks"]] == [
        (c["check"], c["verdict"]) for c in after["checks"]
    ]


def test_unlike_baseline_is_refused_unless_forced(run: Path, tmp_path: Path) -> None:
    base = write_example(tmp_path / "base", replace(GOOD, software={0: {"versions": {"nccl": "2.27.3"}}}, seed=1))
    refused = call("accept", run, "--profile", "h100-hgx-ib", "--baseline", base)
    assert refused.code == Exit.INCONCLUSIVE
    assert "not compared with base: nccl" in refused.out
    forced = call("accept", run, "--profile", "h100-hgx-ib", "--baseline", base, "--force")
    assert forced.code == Exit.GOOD, forced.out
    assert forced.out.splitlines()[0].endswith("[forced, synthetic]")
    assert "forced although unlike" in (run / "accept/checks.csv").read_text()
    assert call("verify", run).code == Exit.GOOD, "verify forces it as well"


def newer(run: Path) -> None:
    text = (run / "manifest.json").read_text()
    (run / "manifest.json").write_text(text.replace('"schema": 1', '"schema": 7', 1))


def newer_record(run: Path) -> None:
    text = (run / "results.jsonl").read_text()
    (run / "results.jsonl").write_text(text.replace('"schema":1', '"schema":7', 1))


def garbled(run: Path) -> None:
    (run / "manifest.json").write_text("{")


def nan_in_a_record(run: Path) -> None:
    text = (run / "results.jsonl").read_text()
    (run / "results.jsonl").write_text(text.replace('"p50":', '"p50":NaN,"was":', 1))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (newer, "has schema 7; this ncclbench reads up to 1"),
        (newer_record, "line 1 has schema 7"),
        (garbled, "manifest.json is damaged"),
        (nan_in_a_record, "line 1 is damaged"),
        (lambda run: (run / "manifest.json").unlink(), "is no run directory"),
        (lambda run: (run / "manifest.json").write_text('{"results": []}'), "has no schema number"),
    ],
)
def test_damaged_or_newer_run_is_refused_in_one_line(damage: Callable[[Path], object], words: str, run: Path) -> None:
    damage(run)
    said = call("accept", run, "--profile", "h100-hgx-ib")
    assert said.code == Exit.USAGE
    assert words in said.out
    assert not (run / "verdict.json").exists()


@pytest.mark.parametrize(
    "manifest",
    [
        '{"schema": 1}',
        '{"schema": 1, "plan": {"cases": [1, {"x": 2}], "starts": "many"}, "world_size": "two"}',
        '{"schema": 1, "plan": [], "topology": [], "ranks": 3, "software": 4, "provenance": 5}',
        '{"schema": 1, "topology": {"nodes": [0, "a"], "node_names": null}, "world_size": 2, "device": "cpu"}',
    ],
)
def test_foreign_manifest_never_passes(manifest: str, run: Path) -> None:
    (run / "manifest.json").write_text(manifest)
    said = call("accept", run, "--profile", "h100-hgx-ib")
    assert said.code != Exit.GOOD
    judged = said.out.startswith(("INCONCLUSIVE", "NOT_RUN", "FAIL"))
    assert judged or (said.code == Exit.USAGE and "manifest.json is damaged" in said.out)


def test_baseline_that_is_the_run_itself_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    shutil.copytree(run, tmp_path / "copy")
    for other in (run, tmp_path / "link", tmp_path / "copy"):
        said = call("accept", run, "--profile", "h100-hgx-ib", "--baseline", other)
        assert said.code == Exit.USAGE
        assert "is the run itself" in said.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs --profile"),
        (["--profile", "h100-hgx-bi"], "did you mean 'h100-hgx-ib'"),
        (["--profile", "cpu-gloo", "--force"], "--force goes with --baseline"),
        (["RUN", "--profile", "cpu-gloo", "--plan", "quick"], "--plan is for a new run"),
        (["RUN", "--profile", "cpu-gloo", "-o", "x"], "--out is for a new run"),
        (["RUN", "--profile", "cpu-gloo", "--baseline", "/nowhere"], "is no run directory"),
        (["--profile", "cpu-gloo", "--baseline", "/nowhere"], "is no run directory"),
        (["--make-profile", "RUN", "--profile", "cpu-gloo"], "does not go with --profile"),
        (["--make-profile", "RUN", "-o", "x.json"], "a profile is a .toml file"),
        (["--make-profile", "/nowhere"], "is no run directory"),
        (["--profile", "cpu-gloo", "--plan", "qiuck"], "did you mean 'quick'"),
    ],
)
def test_invalid_options_are_refused_before_start(arguments: list[str], words: str, run: Path) -> None:
    said = call("accept", *[run if argument == "RUN" else argument for argument in arguments])
    assert said.code == Exit.USAGE
    assert words in said.out
    assert "\n" not in said.out.strip()


def test_accept_refuses_a_partial_allocation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}.items():
        monkeypatch.setenv(name, value)
    said = call("accept", "--profile", "cpu-gloo", "-o", tmp_path / "rack")
    assert said.code == Exit.USAGE
    assert "--launcher 'srun" in said.out
    assert not (tmp_path / "rack").exists()


def test_profile_is_made_from_a_golden_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "ours.toml"
    assert call("accept", "--make-profile", run, "-o", out).code == Exit.GOOD
    assert parse_profile(out.read_text(), "ours").profile.name == "ours"
    assert call("accept", run, "--profile", out).code == Exit.GOOD
    assert call("accept", "--make-profile", run).out.startswith("# Made from run")


def test_profiles_and_checks_are_listed() -> None:
    assert "h100-hgx-ib    8-GPU H100" in call("list", "profiles").out
    assert "fleet       Compare equal units" in call("list", "checks").out


def test_next_command_adds_resume_and_run_directory() -> None:
    environ = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2"}
    command = next_command("slurm", ["accept", "--profile", "p"], Path("runs/a b"), environ)
    assert command == "srun --nodes=2 --ntasks=16 ncclbench accept --profile p -o 'runs/a b' --resume"
    again = next_command("slurm", ["accept", "-o", "x", "--resume"], Path("x"), environ)
    assert again == "srun --nodes=2 --ntasks=16 ncclbench accept -o x --resume"


@pytest.mark.parametrize("code", [Exit.USAGE, Exit.ENVIRONMENT])
def test_failed_measurement_is_reported_as_json(code: Exit, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a usage error the run in -o may be another plan's, so it is not judged."""
    out = run if code is Exit.USAGE else run / "nowhere"
    monkeypatch.setattr("ncclbench.api.run", lambda *_: FinishedRun(code, out))
    said = call("accept", "--profile", "h100-hgx-ib", "-o", out, "--json")
    assert said.code == code
    summary = json.loads(said.out.splitlines()[-1])
    assert (summary["verdict"], summary["exit_code"], summary["run"]) == ("NOT_RUN", code, None)
    assert "nothing was measured" in summary["error"]
