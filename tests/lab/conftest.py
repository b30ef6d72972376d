"""Labs, and gloo jobs in them that stay while faults come and go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass
from multiprocessing.connection import Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ncclbench.analysis.flows import FlowTable, endpoint_medians, rail_matrix
from scripts.lab import execute, faults, kernel
from scripts.lab.plan import Lab
from tests.helpers.paths import PYTHONPATH, SCRIPTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from multiprocessing.connection import Connection

SCRIPT = SCRIPTS / "fabric_lab.py"
WORKER = Path(__file__).with_name("worker.py")
_MBIT = 8e3  # in a GB/s
_START_SECONDS, _CASE_SECONDS = 120.0, 90.0
# At 100 Mbit/s a flow takes 21 ms, far longer than a busy machine takes to wake a rank.
NBYTES = 1 << 18


@pytest.fixture(autouse=True)
def _lab_is_possible() -> None:
    if (reason := kernel.unable()) is not None:
        pytest.skip(reason)


@pytest.fixture
def prefix() -> Iterator[str]:
    """A unique prefix. All that a test leaves under it is removed."""
    name = f"t{uuid.uuid4().hex[:8]}"
    yield name
    kernel.remove(name)


def fabric_lab(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """The command itself, as a user starts it."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60, check=False, **more
    )


def environment() -> dict[str, str]:
    """Variables with which ranks find this checkout, and believe in no launcher around the tests."""
    launchers = ("OMPI_", "PMI_", "PMIX_", "PRTE_", "SLURM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    paths = [PYTHONPATH, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "TORCH_CPP_LOG_LEVEL": "ERROR"}


@dataclass
class Flows:
    """The flows of some records: the median of each, in Mbit/s, and what `ncclbench.analysis.flows` makes of them.

    Attributes:
        rails: rails a node; rank = node x rails + rail.
        mbit: for each pair of ranks.
    """

    rails: int
    mbit: dict[tuple[int, int], float]

    def table(self, without: set[int] | None = None) -> FlowTable:
        """All flows, but for those of the ranks `without`."""
        kept = {pair: x for pair, x in self.mbit.items() if not without or not set(pair) & without}
        src, dst = np.array(list(kept)).T
        return FlowTable(src=src, dst=dst, gb_per_s=np.array(list(kept.values())) / _MBIT, rounds=("",) * len(kept))

    def matrix(self) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        """The median from each rail (row) to each rail."""
        ranks = max(max(pair) for pair in self.mbit) + 1
        return rail_matrix(self.table(), [rank % self.rails for rank in range(ranks)]) * _MBIT

    def endpoints(self, without: set[int] | None = None) -> dict[tuple[str, int], float]:
        """For each rank and direction the median over distinct peers, leaving out flows of the ranks `without`."""
        ranks = max(max(pair) for pair in self.mbit) + 1
        found = endpoint_medians(self.table(without), ranks)
        ways = (("send", found.send), ("receive", found.receive))
        return {(way, k): float(x) * _MBIT for way, ends in ways for k, x in enumerate(ends) if not np.isnan(x)}


class StayingJob:
    """A lab with a gloo job in it that measures one case after the other."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        """Make the lab, and start the job; `close` ends both."""
        self.lab, self.folder = lab, folder
        kernel.make(lab)
        self.topology = folder / "lab.toml"
        self.topology.write_text(lab.topology())
        self._faults: list[dict[str, Any]] = []
        self._listener = Listener(str(folder / "socket"))
        with (folder / "said").open("wb") as said:
            self.ranks = execute.start_ranks(
                lab,
                [sys.executable, str(WORKER), str(folder / "socket"), str(self.topology)],
                environ=environment(),
                stdout=said.fileno(),
                stderr=said.fileno(),
            )
        # If one rank fails to join, no rank connects.
        self._listener._listener._socket.settimeout(_START_SECONDS)  # type: ignore[attr-defined]
        self._link: Connection[Any, Any] = self._listener.accept()
        self.joined: dict[str, Any] = self._answer()

    def _answer(self) -> dict[str, Any]:
        if not self._link.poll(_CASE_SECONDS):
            pytest.fail(
                f"no answer after {_CASE_SECONDS:g} s; it had said: {(self.folder / 'said').read_text()[-2000:]}"
            )
        answer = json.loads(self._link.recv())
        assert isinstance(answer, dict)
        return answer

    def record(
        self, pattern: str, iterations: int, nbytes: int = NBYTES, *, check: bool = False, **params: Any
    ) -> dict[str, Any]:
        """Measure a case; its record. Checking the data takes as long as two iterations of every round."""
        wanted = {"pattern": pattern, "nbytes": nbytes, "params": params}
        wanted["settings"] = {"iterations": iterations, "check": check}
        self._link.send(json.dumps(wanted))
        return self._answer()

    def flows(self, *records: Mapping[str, Any]) -> Flows:
        """The flows of some records."""
        found = {}
        for record in records:
            for phase in record["phases"]:
                flows = phase["flows"]
                for a, b, nbytes, p50_us in zip(*(flows[k] for k in ("src", "dst", "nbytes", "p50_us")), strict=True):
                    found[a, b] = nbytes * 8 / p50_us
        return Flows(self.lab.rails, found)

    @property
    def at_once(self) -> int:
        """Flows that cross the rails out of one leaf at once, where no rank sends and receives: 2 nodes take turns."""
        return 3 if self.lab.nodes == 3 else 1

    def same_rail(self, samples: int = 5, nbytes: int = NBYTES, *, check: bool = False) -> dict[str, Any]:
        """All pairs of nodes, no rank sending and receiving at once: the other way of a NIC's fault would hide."""
        rounds = 6 if self.lab.nodes == 3 else 2
        return self.record("same_rail", samples * rounds, nbytes, check=check, direction="apart")

    def cross_rail(self, samples: int = 5, nbytes: int = NBYTES, *, check: bool = False) -> dict[str, Any]:
        """The same, every rail to every other."""
        rounds = (self.lab.nodes - 1) * (self.lab.rails - 1) * 2
        return self.record("cross_rail", samples * rounds, nbytes, check=check, direction="apart")

    def measure(self, samples: int = 5, nbytes: int = NBYTES, *, check: bool = False) -> Flows:
        """Both."""
        each = (self.same_rail(samples, nbytes, check=check), self.cross_rail(samples, nbytes, check=check))
        assert [record["wrong"] for record in each] == [0 if check else None] * 2
        return self.flows(*each)

    def break_it(
        self, where: str, name: str, kind: str, value: str = "", ways: tuple[str, ...] = ("send", "receive")
    ) -> None:
        """One more fault; `heal` takes all off."""
        self._faults = faults.inject(self.lab, self._faults, where, name, kind, value, ways)

    def heal(self) -> None:
        """As it was made."""
        faults.heal(self.lab, self._faults)
        self._faults = []

    def close(self) -> None:
        """End the job, and remove the lab."""
        try:
            self._link.send("")
            codes = self.ranks.wait(30)
            assert codes == [0] * len(codes), (self.folder / "said").read_text()[-2000:]
        finally:
            self._listener.close()
            self.ranks.end()
            kernel.remove(self.lab.prefix)


SHAPES = {"3x2": (3, 2), "2x4": (2, 4)}


@pytest.fixture(scope="session", params=SHAPES)
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StayingJob]:
    """A job in a lab of 3 nodes x 2 rails, then of 2 x 4, with spines that are wide enough for all NICs at once."""
    if (reason := kernel.unable()) is not None:
        pytest.skip(reason)
    nodes, rails = SHAPES[request.param]
    lab = Lab(prefix=f"t{uuid.uuid4().hex[:8]}", nodes=nodes, rails=rails, nic_rate=1e8, spine_rate=nodes * 1e8)
    started = None
    try:
        started = StayingJob(lab, tmp_path_factory.mktemp("job"))
        yield started
    finally:
        if started is not None:
            started.close()
        else:
            kernel.remove(lab.prefix)


@pytest.fixture
def staged(job: StayingJob) -> Iterator[StayingJob]:
    """The job; its lab is whole before and after the test."""
    yield job
    job.heal()
