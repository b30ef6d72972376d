"""Jobs of real processes: started, waited for with a deadline, and never left behind.

Every process of a job carries a token in its environment, so that one that outlives the job is found under any
parent.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

TOKEN = "NCCLBENCH_TESTS_TOKEN"
# What a launcher around the tests may have set; a job must not take that launcher for its own.
_LAUNCHERS = ("OMPI_", "PMI_", "PMIX_", "PRTE_", "MPI_LOCAL", "SLURM_", "FLUX_", "GROUP_", "TORCHELASTIC_")
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


_OVER_MPI = re.compile(r"(?<![a-z])mpi")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts ranks of MPI, by its name: they spin while they wait, and need the machine for themselves."""
    for item in items:
        if Path(__file__).parent in item.path.parents and _OVER_MPI.search(item.nodeid.lower()):
            item.add_marker("mpi")


@dataclass(frozen=True)
class Finished:
    """A job that has ended: what it said, and when (seconds of the epoch)."""

    code: int
    out: str
    err: str
    ended: float

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object in the last line of stdout."""
        lines = self.out.splitlines()
        assert lines, self.err
        summary = json.loads(lines[-1])
        assert isinstance(summary, dict)
        return summary

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records in that object."""
        records = self.summary["records"]
        assert isinstance(records, list)
        return records


@dataclass
class Job:
    """A job that runs."""

    process: "subprocess.Popen[bytes]"
    token: str
    folder: Path
    finished: Finished | None = field(default=None, init=False)

    def wait(self, seconds: float = 120.0) -> Finished:
        """Wait for its end; one that does not end in time is ended, and the test fails."""
        if self.finished is None:
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.end()
                said = (self.folder / "stderr").read_text()[-2000:]
                pytest.fail(f"the job was still running after {seconds:g} s; it had said: {said}")
            self.finished = Finished(
                self.process.returncode,
                (self.folder / "stdout").read_text(),
                (self.folder / "stderr").read_text(),
                time.time(),
            )
        return self.finished

    def survivors(self) -> list[psutil.Process]:
        """Processes of this job that are still there; one that only waits to be reaped is not."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(TOKEN) == self.token and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:  # gone meanwhile, or of another user
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        """Those of them that are ranks, and not what started them."""
        found = []
        for process in self.survivors():
            try:
                if "RANK" in process.environ():
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def no_process_is_left(self, seconds: float = 5.0) -> bool:
        """Whether all processes of the job end, within some seconds after it."""
        return eventually(lambda: not self.survivors(), seconds)

    def signal(self, number: int) -> None:
        """A signal to the process that was started, and to no other."""
        self.process.send_signal(number)

    def end(self) -> None:
        """End what is left of it."""
        for process in self.survivors():
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self.process.wait(10)


def eventually(is_so: Callable[[], object], seconds: float) -> bool:
    """Whether `is_so` becomes true within some seconds."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Starter:
    """Starts jobs, each with files of its own for what it says."""

    def __init__(self, folder: Path) -> None:
        """Keep everything below `folder`."""
        self.folder = folder
        self.jobs: list[Job] = []

    def start(self, line: str, environ: Mapping[str, str] | None = None) -> Job:
        """Start any command, written as in a shell."""
        folder = self.folder / f"job-{len(self.jobs)}"
        folder.mkdir()
        token = uuid.uuid4().hex
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHERS) and k not in _NAMES}
        scripts = str(Path(sys.executable).parent)
        path = os.pathsep.join([scripts, inherited.get("PATH", os.defpath)])
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = subprocess.Popen(
                shlex.split(line),
                env={**inherited, "PATH": path, **(environ or {}), TOKEN: token},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        job = Job(process, token, folder)
        self.jobs.append(job)
        return job

    def ncclbench(self, line: str, environ: Mapping[str, str] | None = None) -> Job:
        """Start ``ncclbench LINE``, which starts its own ranks."""
        return self.start(f"{shlex.quote(sys.executable)} -m ncclbench {line}", environ)

    @staticmethod
    def eventually(is_so: Callable[[], object], seconds: float) -> bool:
        """Whether `is_so` becomes true within some seconds."""
        return eventually(is_so, seconds)

    def torchrun(self, ranks: int, line: str, environ: Mapping[str, str] | None = None) -> Job:
        """Start ``ncclbench LINE`` under torchrun on this machine."""
        return self.start(f"torchrun --standalone --nproc-per-node {ranks} -m ncclbench {line}", environ)


def _starter(folder: Path) -> Iterator[Starter]:
    starter = Starter(folder)
    yield starter
    for job in starter.jobs:
        job.end()


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Starter]:
    """Starts jobs; whatever of them is left when the test is over is ended."""
    yield from _starter(tmp_path)


@pytest.fixture(scope="module")
def module_jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """The same for jobs that several tests look at."""
    yield from _starter(tmp_path_factory.mktemp("jobs"))


# What a saboteur does, at which rank, in the case of how many bytes, and at which launch of it. Several with ";".
_SABOTEUR = '''
"""gloo through torch.distributed, and one rank that misbehaves at one place."""

import dataclasses
import os
import shlex
import signal
import socket
import time
from pathlib import Path

from ncclbench.transports import gloo


def open_transport(name, identity, timeout):
    """Join as gloo does."""
    transport = gloo.open_transport("gloo", identity, timeout)
    for plot in filter(None, os.environ.get("SABOTAGE", "").split(";")):
        kind, rank, nbytes, number = plot.split(":")
        if identity.rank == int(rank):
            _sabotage(transport, kind, int(nbytes), int(number))
    return transport


def _sabotage(transport, kind, nbytes, number):
    honest = transport.compile

    def compile(schedule, buffers):
        program = honest(schedule, buffers)
        if nbytes not in (0, schedule.size_bytes):
            return program
        if kind == "hang-compile":
            _mark()
            time.sleep(3600)
        launches = 0

        def launch():
            nonlocal launches
            launches += 1
            if kind != "wrong" and launches == number:
                _mark()
                _misbehave(kind, transport)
            last.launch()
            if kind == "wrong":
                element = buffers[schedule.phases[-1].write].view("u1")
                element[0] ^= 1

        *before, last = program.steps
        return dataclasses.replace(program, steps=(*before, dataclasses.replace(last, launch=launch)))

    transport.compile = compile
    transport.troubles = []
    asked = iter([ValueError("a library that cannot be asked yet")])

    def trouble():
        for error in asked:
            raise error
        return next(iter(transport.troubles), None)

    transport.trouble = trouble


def _mark():
    path = Path(os.environ["SABOTAGE_MARK"])
    path.with_suffix(".tmp").write_text(str(time.time()))
    path.with_suffix(".tmp").replace(path)


def _misbehave(kind, transport):
    if kind == "background":
        transport.troubles.append("NCCL: remote process exited or there was a network error")
    if kind == "raise":
        raise ValueError("sabotage")
    if kind == "library":
        raise RuntimeError("connection reset by sabotage\\nException raised from somewhere.cpp:1")
    if kind == "exit":
        os._exit(7)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(3600)
'''


@pytest.fixture(scope="session")
def saboteur(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables with which a job finds the transport ``saboteur``, installed as a third party's would be."""
    site = tmp_path_factory.mktemp("site")
    (site / "saboteur.py").write_text(_SABOTEUR)
    info = site / "saboteur-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: saboteur\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ncclbench.transports]\nsaboteur = saboteur\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))}
