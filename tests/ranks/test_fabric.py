"""The fabric catalogue on real processes, placed on made-up nodes by a topology file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ncclbench.config.plugins import load, names
from ncclbench.errors import Exit
from ncclbench.store.run_directory import read_run
from tests.helpers.stored import known

if TYPE_CHECKING:
    from pathlib import Path

    from tests.ranks.conftest import Starter

pytestmark = pytest.mark.ranks

VARYING = [name for name in names("patterns") if hasattr(load("patterns", name), "variants")]
PATTERNS = [name for name in VARYING if not hasattr(load("patterns", name), "size_and_dtype")]
FABRIC = [name for name in PATTERNS if load("patterns", name).__name__.startswith("ncclbench_patterns.")]
# Open MPI does not start for root unless told twice.
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
# What cannot be on two nodes of two rails, or on four of one; both together leave none out.
SKIPPED = {
    (2, 2): {"leaf_contrast", "bisection"},
    (4, 1): {"cross_rail", "rail_groups", "rail_hot", "domain_straddle"},
}


def topology(nodes: int, rails: int) -> str:
    """Nodes under leaves of two, with the identity of every rank given."""
    lines = ["schema = 1"]
    for rank in range(nodes * rails):
        node, rail = divmod(rank, rails)
        if rail == 0:
            lines += ["[[node]]", f'name = "n{node}"']
        lines += ["[[node.nic]]", f"rail = {rail}", f'leaf = "l{node // 2}-{rail}"', f'device = "rail{rail}"']
    for block in range(-(-nodes // 2)):
        for rail in range(rails):
            lines += ["[[leaf]]", f'name = "l{block}-{rail}"']
    for rank in range(nodes * rails):
        node, rail = divmod(rank, rails)
        lines += ["[[rank]]", f"rank = {rank}", f'node = "n{node}"', f"rail = {rail}"]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("transport", ["gloo", "mpi"])
@pytest.mark.parametrize(("nodes", "rails"), SKIPPED)
def test_every_pattern_is_right_and_every_flow_reported(transport: str, nodes: int, rails: int, jobs: Starter) -> None:
    file = jobs.folder / "fabric.toml"
    file.write_text(topology(nodes, rails))
    some = " ".join(name for name in FABRIC if not name.startswith("moe"))
    sizes = f"-b 4K -e 4K -n 6 -w 1 --topology {file} -o run"
    job = jobs.ncclbench(f"run {some} --transport {transport} --nproc 4 {sizes}", AS_ROOT)
    finished = job.wait(200)
    assert finished.code == Exit.GOOD, finished.err
    assert job.no_process_is_left()
    run = read_run(jobs.folder / "run")
    assert {r.pattern for r in run.records if r.status == "skipped"} == SKIPPED[nodes, rails]
    for record in run.records:
        if record.status == "skipped":
            continue
        assert (record.status, record.wrong) == ("ok", 0)
        assert record.path is not None
        assert record.path.proof == "unverified"
        assert "this host has no port rail0" in known(record.path.reason) or "chooses the route" in known(
            record.path.reason
        )
        told = [phase.flows or phase.groups for phase in record.phases]
        assert all(told) or record.pattern == "rail_hot"
    assert known(run.manifest.topology).nodes == [rank // rails for rank in range(4)]
    assert known(run.manifest.topology).sources["file"].startswith(f"{jobs.folder}/fabric.toml sha256:")


def test_ranks_with_different_files_do_not_start(jobs: Starter, tmp_path: Path) -> None:
    """A stale copy of the file on one node would put ranks where they are not."""
    for name, text in (("0.toml", topology(2, 1)), ("1.toml", topology(2, 1) + "# newer\n")):
        (tmp_path / name).write_text(text)
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\n"
        "from ncclbench.cli import main\n"
        f"sys.argv[1:] = ['run', 'same_rail', '-b', '1K', '-e', '1K', '--transport', 'gloo', '-o', 'run',\n"
        f"    '--topology', {str(tmp_path)!r} + '/' + os.environ['RANK'] + '.toml']\n"
        "main()\n"
    )
    finished = jobs.start(f"torchrun --standalone --nproc-per-node 2 {script}").wait(120)
    assert finished.code != Exit.GOOD
    assert "rank 1 has topology file" in finished.err
