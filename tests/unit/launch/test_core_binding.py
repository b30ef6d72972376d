"""Core binding: shares are disjoint, near the GPU if its cores are known, and within the allowed cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncclbench.launch.core_binding import allowed_cores, cores_near, parse_cores, share_of


@pytest.mark.parametrize(("text", "cores"), [("0-3,8", [0, 1, 2, 3, 8]), ("5", [5]), ("", []), ("0-1\n", [0, 1])])
def test_core_lists_are_parsed(text: str, cores: list[int]) -> None:
    assert parse_cores(text) == cores


@given(cores=st.lists(st.integers(0, 500), unique=True, min_size=1, max_size=128), ranks=st.integers(1, 16))
def test_core_shares_are_disjoint_and_equal(cores: list[int], ranks: int) -> None:
    shares = [share_of(cores, index, ranks) for index in range(ranks)]
    assert all(shares)
    assert set().union(*shares) <= set(cores)
    if len(cores) >= ranks:
        assert len({len(share) for share in shares}) == 1
        assert sum(map(len, shares)) == len(set().union(*shares))


def test_cores_near_a_gpu_come_from_its_numa_node(tmp_path: Path) -> None:
    folder = tmp_path / "bus/pci/devices/0000:06:00.0"
    folder.mkdir(parents=True)
    (folder / "local_cpulist").write_text("48-51,144\n")
    assert cores_near("0000:06:00.0", tmp_path) == [48, 49, 50, 51, 144]
    assert cores_near("0000:07:00.0", tmp_path) == []


def test_bound_process_stays_on_its_share() -> None:
    code = (
        "import os; from ncclbench.launch.core_binding import bind; from ncclbench.transports.base import RankIdentity;"
        "identity = RankIdentity(rank=1, world_size=2, local_rank=1, local_size=2, launcher='local');"
        "print(bind(identity) == sorted(os.sched_getaffinity(0)), bind(identity))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    same, _, cores = done.stdout.partition(" ")
    assert same == "True"
    assert set(parse_cores(cores.strip("[]\n").replace(" ", ""))) <= set(allowed_cores())
