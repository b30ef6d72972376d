"""Wrong data on one real rank: every pattern notices and says which rank, and the exit code is 4 whatever else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ncclbench.config.plugins import load, names
from ncclbench.errors import Exit
from ncclbench.store.run_directory import read_run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.ranks.conftest import Job, Starter

pytestmark = pytest.mark.ranks

BUILT_IN = [load("patterns", name) for name in names("patterns")]
PATTERNS = [
    module.__name__.rpartition(".")[2]
    for module in BUILT_IN
    if module.__name__.startswith("ncclbench_patterns.") and not hasattr(module, "variants")
]


def start(jobs: Starter, saboteur: Mapping[str, str], sabotage: str, line: str) -> Job:
    environ = {**saboteur, "SABOTAGE": sabotage, "SABOTAGE_MARK": str(jobs.folder / "mark")}
    return jobs.ncclbench(f"run {line} --transport saboteur -n 6 -w 1 --json -o run", environ)


def test_one_changed_element_is_caught_in_every_pattern(jobs: Starter, saboteur: dict[str, str]) -> None:
    plan = jobs.folder / "plan.toml"
    entries = []
    for pattern in PATTERNS:
        # The mutated rank is the root, where only a root receives anything.
        root = "params = { root = 2 }\n" if pattern in ("reduce", "gather") else ""
        entries.append(f'[[case]]\npattern = "{pattern}"\nbytes = 4096\ndtype = ["float32", "uint8"]\n{root}')
    plan.write_text('name = "mutated"\n' + "".join(entries))
    finished = start(jobs, saboteur, "wrong:2:0:0", f"--plan {plan} --nproc 4").wait()
    assert finished.code == Exit.WRONG_DATA
    assert finished.summary["exit_code"] == Exit.WRONG_DATA
    assert [(r["pattern"], r["dtype"]) for r in finished.records] == [
        (pattern, dtype) for pattern in PATTERNS for dtype in ("float32", "uint8")
    ]
    for record in finished.records:
        # In place, the changed element of one rank may reach others in the next launch; each check is of one launch.
        assert (record["status"], record["wrong_ranks"]) == ("wrong", [2]), record["case"]
        assert record["wrong"] == 2  # one element, before the timing and after it
        assert record["reason"] == "2 elements differ from what they must be, on rank 2"
        assert record["time_us"]["n"] == 6  # it is timed all the same
    assert [record.status for record in read_run(jobs.folder / "run").records] == ["wrong"] * len(PATTERNS) * 2


def test_unchecked_case_reports_no_correctness(jobs: Starter, saboteur: dict[str, str]) -> None:
    finished = start(jobs, saboteur, "wrong:1:0:0", "all_reduce -b 4K -e 4K --nproc 2 --no-check").wait()
    assert finished.code == Exit.GOOD
    (record,) = finished.records
    assert (record["status"], record["wrong"]) == ("ok", None)


def test_wrong_data_outrank_a_lost_rank_also_after_resume(jobs: Starter, saboteur: dict[str, str]) -> None:
    """Both happen in one run; the most severe is what the exit code tells, then and when the run is finished."""
    sizes = "all_reduce -b 1K -e 4K -f 4 --nproc 3"
    finished = start(jobs, saboteur, "wrong:1:1024:0;kill:2:4096:3", sizes).wait()
    assert [(r["status"], r["wrong_ranks"], r["ranks"]) for r in finished.records] == [
        ("wrong", [1], []),
        ("failed", [], [2]),
    ]
    assert (finished.code, finished.summary["exit_code"]) == (Exit.WRONG_DATA, Exit.WRONG_DATA)

    resumed = start(jobs, saboteur, "", f"{sizes} --resume").wait()
    assert resumed.code == Exit.WRONG_DATA  # wrong data are a finding, and stay one
    assert [r["status"] for r in resumed.records] == ["wrong", "ok"]
