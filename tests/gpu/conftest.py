"""Jobs on GPUs. With one GPU two ranks share it, over sockets: that tests the libraries, and no link."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.pairs import pair_of, visible

_ALL = visible()
_MINE = pair_of(os.environ.get("PYTEST_XDIST_WORKER", ""), _ALL)
if _MINE != _ALL:
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(_MINE)
GPUS = len(_MINE)
# A world of one is what a machine with one GPU has; two ranks are the fewest that send anything.
WORLDS = sorted({1, max(2, GPUS)})
SHARED = WORLDS[-1] > GPUS

Records = dict[str, dict[str, Any]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of these need a GPU."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(GPUS == 0, reason="no GPU on this machine"))


def environment(ranks: int, **more: str) -> dict[str, str]:
    """This process's environment, in which ranks share GPUs if there are more of them."""
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    return {**os.environ, **root, **({"NCCLBENCH_SHARE_GPU": "1"} if ranks > GPUS else {}), **more}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Records]:
    """Runs ncclbench on that many ranks, and returns its records by case."""

    def call(ranks: int, *arguments: str, **environ: str) -> Records:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "ncclbench", "run", *arguments, "--nproc", str(ranks)),
                *("--json", "-o", str(tmp_path / "run")),
            ],
            capture_output=True,
            text=True,
            timeout=290,
            env=environment(ranks, **environ),
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return {record["case"]: record for record in json.loads(done.stdout.splitlines()[-1])["records"]}

    return call
