"""Cases that need a process started in a certain way, and what is said to one that was not."""

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from ncclbench.cli.run import command as run_command
from ncclbench.errors import Unable
from ncclbench.measure.required_variables import check_needs, why_not
from ncclbench.schedule import Case, Needs
from ncclbench.schedule.pattern import load_pattern
from ncclbench.store.run_directory import read_run
from ncclbench.transports.capabilities import capabilities_of
from ncclbench.transports.threads import ThreadTransport, play

CASE = Case(pattern="cross_rail", nbytes=64)
NCCL = capabilities_of("nccl")
RIGHT = {
    "spine": {"NCCL_PXN_DISABLE": "1", "NCCL_CROSS_NIC": "1"},
    "pxn": {},
    "crossnic0": {"NCCL_PXN_DISABLE": "1", "NCCL_CROSS_NIC": "0"},
}


def needs(mode: str) -> Needs:
    found = load_pattern("cross_rail").needs(Case(pattern="cross_rail", nbytes=64, params={"mode": mode}))
    assert found is not None
    return found


@pytest.mark.parametrize("mode", RIGHT)
def test_each_cross_rail_mode_needs_its_own_start(mode: str) -> None:
    able = [other for other, environ in RIGHT.items() if not why_not(CASE, needs(mode), NCCL, environ, [])]
    assert able == [mode]


@pytest.mark.parametrize("transport", ["nccl", "cupy_nccl"])
def test_reason_names_wrong_variables_and_the_right_command(transport: str) -> None:
    arguments = ["run", "cross_rail", "-b", "1M", "-o", "runs/a", "--resume"]
    why = why_not(CASE, needs("spine"), capabilities_of(transport), {"NCCL_CROSS_NIC": "0"}, arguments)
    assert "NCCL_PXN_DISABLE is not set, NCCL_CROSS_NIC is 0" in why
    assert why.endswith("start again with: NCCL_PXN_DISABLE=1 NCCL_CROSS_NIC=1 ncclbench run cross_rail -b 1M")


def test_what_nccl_does_by_itself_need_not_be_set() -> None:
    assert why_not(CASE, needs("pxn"), NCCL, {"NCCL_PXN_DISABLE": "0"}, []) == ""
    assert "NCCL_PXN_DISABLE is 1" in why_not(CASE, needs("pxn"), NCCL, {"NCCL_PXN_DISABLE": "1"}, [])


@pytest.mark.parametrize("transport", ["gloo", "mpi"])
def test_other_libraries_go_straight_and_nowhere_else(transport: str) -> None:
    assert why_not(CASE, needs("spine"), capabilities_of(transport), {}, []) == ""
    assert why_not(CASE, needs("pxn"), capabilities_of(transport), {}, []) == (
        f"cross_rail: mode=pxn is a path that only NCCL takes; {transport} always goes straight"
    )


def test_all_ranks_skip_if_one_was_started_otherwise() -> None:
    """Two ranks that decide otherwise would wait for each other for ever."""
    asked = Needs(variables={"NCCL_CROSS_NIC": "0"})

    def main(transport: ThreadTransport) -> str:
        transport.capabilities = NCCL
        try:
            check_needs(asked, CASE, transport, {"NCCL_CROSS_NIC": "0" if transport.rank == 0 else "1"})
        except Unable as unable:
            return str(unable)
        return ""

    reasons = play(3, main)
    assert len(set(reasons)) == 1
    assert reasons[0].startswith("rank 1: NCCL reads its settings once")


def test_a_pattern_without_needs_asks_nothing() -> None:
    play(1, lambda transport: check_needs(None, CASE, transport, {}))


def test_one_run_directory_takes_every_mode_a_start_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a user does it: the plan once, then --resume in processes that were started otherwise."""
    like_nccl = replace(ThreadTransport.capabilities, reads_nccl_settings=True, uses_nics=True)
    monkeypatch.setattr(ThreadTransport, "capabilities", like_nccl)
    plan, fabric, out = tmp_path / "modes.toml", tmp_path / "fabric.toml", tmp_path / "run"
    case = 'pattern = "cross_rail"\nbytes = 4096\niterations = 6\nparams = { mode = ["spine", "pxn", "crossnic0"] }\n'
    plan.write_text(f'name = "modes"\n[[case]]\n{case}')
    nodes = "".join(f'[[node]]\nname = "n{d}"\n' for d in range(2))
    placements = "".join(f'[[rank]]\nrank = {r}\nnode = "n{r // 2}"\nrail = {r % 2}\n' for r in range(4))
    fabric.write_text(nodes + placements)
    measured = []
    for mode, environ in RIGHT.items():
        for name in ("NCCL_PXN_DISABLE", "NCCL_CROSS_NIC"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        again = ["--resume"] if out.exists() else []
        arguments = ["--plan", plan, "--transport", "threads", "--nproc", 4, "--topology", fabric, "-o", out, *again]
        result = CliRunner().invoke(run_command, [str(one) for one in arguments])
        assert result.exit_code == 0, result.output
        measured.append(mode)
        statuses = {r.params.get("mode", "spine"): r.status for r in read_run(out).records}
        assert statuses == {other: "ok" if other in measured else "skipped" for other in RIGHT}
