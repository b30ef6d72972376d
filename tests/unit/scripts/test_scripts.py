"""What the scripts say to a command line that makes no sense, before they start anything."""

import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from tests.gpu.pairs import pair_of
from tests.helpers.paths import SCRIPTS


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["two_nodes"], "usage: scripts/two_nodes"),
        (["two_nodes", "4"], "usage: scripts/two_nodes"),
        (["two_nodes", "0", "true"], "RANKS_A_NODE is 0"),
        (["two_nodes", "ncclbench", "run"], "RANKS_A_NODE is ncclbench"),
        (["gpu_check"], "name a folder"),
        (["gpu_check", "out", "acept"], "no stage acept; there are: doctor timing"),
        (["gpu_check", "out", "moe rails"], "no stage moe rails; there are: doctor timing"),
        (["gpu_check", "doctor"], "name a folder before the stages: scripts/gpu_check OUT doctor"),
        (["gpu_check", "--ranks"], "name a folder"),
    ],
    ids=" ".join,
)
def test_a_command_line_that_makes_no_sense(line: list[str], said: str, tmp_path: Path) -> None:
    done = subprocess.run([SCRIPTS / line[0], *line[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="there is a GPU")
@pytest.mark.parametrize(
    ("ranks", "code", "said"),
    [(None, 3, "no GPU on this machine"), ("two", 2, "RANKS is two"), ("08", 2, "RANKS is 08")],
)
def test_gpu_check_where_there_is_no_gpu(ranks: str | None, code: int, said: str, tmp_path: Path) -> None:
    environ = {**os.environ, **({"RANKS": ranks} if ranks else {})}
    done = subprocess.run([SCRIPTS / "gpu_check", "out"], cwd=tmp_path, capture_output=True, text=True, env=environ)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_gpu_check_packs_its_results(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    """Time on such a machine is dear, and a batch system ends what takes too long."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nif [ "$3" = doctor ]; then echo "2 GPUs"; exec sleep 100; fi\n')
    fake.chmod(0o755)
    environ = {**os.environ, "RANKS": "2", "PYTHON": str(fake)}
    line = [str(SCRIPTS / "gpu_check"), "out", "doctor", "timing"]
    with subprocess.Popen(
        line, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environ,
        start_new_session=True,
    ) as script:  # fmt: skip
        done = tmp_path / "out" / "doctor.txt"
        while not (done.exists() and done.read_text()) and script.poll() is None:
            time.sleep(0.02)
        os.killpg(script.pid, sent)
        _, said = script.communicate(timeout=60)
    assert script.returncode == code
    assert "interrupted during doctor" in said
    with tarfile.open(tmp_path / "out" / "all.tgz") as packed:
        assert "./doctor.txt" in packed.getnames()


@pytest.mark.parametrize(
    ("worker", "gpus", "mine"),
    [
        ("", ["0", "1", "2", "3"], ["0", "1", "2", "3"]),
        ("gw0", ["0", "1", "2", "3"], ["0", "1"]),
        ("gw1", ["4", "5", "6", "7", "9"], ["6", "7"]),
        ("gw5", ["0", "1", "2", "3"], ["2", "3"]),
        ("gw1", ["0", "1"], ["0", "1"]),
        ("gw2", [], []),
    ],
)
def test_concurrent_gpu_tests_have_separate_pairs_of_gpus(worker: str, gpus: list[str], mine: list[str]) -> None:
    assert pair_of(worker, gpus) == mine
