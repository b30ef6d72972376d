"""What the scripts say to a command line that makes no sense, before they start anything."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["two_nodes"], "usage: scripts/two_nodes"),
        (["two_nodes", "4"], "usage: scripts/two_nodes"),
        (["two_nodes", "0", "true"], "RANKS_A_NODE is 0"),
        (["two_nodes", "ncclbench", "run"], "RANKS_A_NODE is ncclbench"),
        (["gpu_check"], "name a folder"),
        (["gpu_check", "out", "acept"], "no stage acept; there are: doctor timing"),
    ],
    ids=" ".join,
)
def test_a_command_line_that_makes_no_sense(line: list[str], said: str, tmp_path: Path) -> None:
    done = subprocess.run([SCRIPTS / line[0], *line[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="there is a GPU")
@pytest.mark.parametrize(("ranks", "code", "said"), [(None, 3, "no GPU on this machine"), ("two", 2, "RANKS is two")])
def test_gpu_check_where_there_is_no_gpu(ranks: str | None, code: int, said: str, tmp_path: Path) -> None:
    environ = {**os.environ, **({"RANKS": ranks} if ranks else {})}
    done = subprocess.run([SCRIPTS / "gpu_check", "out"], cwd=tmp_path, capture_output=True, text=True, env=environ)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []
