"""Faults on real GPUs: a peer that is killed inside a launch, and an error that NCCL has in the background."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.gpu.conftest import environment

both_transports = pytest.mark.parametrize("transport", ["nccl", "cupy_nccl"])


def start(out: Path, *arguments: str, **environ: str) -> "subprocess.Popen[str]":
    """Two ranks that all-reduce for longer than any time limit."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "ncclbench", "run", "all_reduce", "-b", "16M", "-e", "16M", "-n", "1000000"),
            *("--nproc", "2", "--json", "-o", str(out), *arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(2, **environ),
    )


def rank_pids(out: Path) -> list[int]:
    """The ranks' process ids, once the first case has begun."""
    for _ in range(600):
        if (out / "events.jsonl").exists() and '"case"' in (out / "events.jsonl").read_text():
            manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
            return [place["pid"] for place in manifest["ranks"]]
        time.sleep(0.1)
    raise AssertionError("the run did not begin")


@pytest.mark.parametrize("timing", ["isolated", "graph"])
@both_transports
def test_peer_killed_during_a_launch_is_named(transport: str, timing: str, tmp_path: Path) -> None:
    job = start(tmp_path / "run", "--transport", transport, "--timing", timing)
    try:
        pids = rank_pids(tmp_path / "run")
        time.sleep(20)  # connected, checked, warmed up and captured: the launches that are timed are under way
        assert job.poll() is None, job.communicate()[1]
        psutil.Process(pids[1]).send_signal(signal.SIGKILL)
        died = time.monotonic()
        stdout, stderr = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 3, stderr
    assert time.monotonic() - died < 30
    (record,) = json.loads(stdout.splitlines()[-1])["records"]
    assert (record["status"], record["ranks"]) == ("failed", [1]), record["reason"]
    assert record["reason"].startswith("rank 1 died (last seen in timed"), record["reason"]
    assert "Traceback" not in stderr
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


# Shuts the sockets that NCCL has opened for data, on rank 1, in the middle of what is timed.
SABOTEUR = """
import os
import socket

from ncclbench.config.plugins import load
from ncclbench.transports.capabilities import Capabilities


def sockets():
    return {fd for fd in os.listdir("/proc/self/fd") if is_socket(fd)}


def is_socket(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    except OSError:
        return False


def open_transport(name, identity, timeout):
    name = os.environ["SABOTAGED"]
    os.environ["NCCL_HOSTID"] = f"host{identity.rank}"  # on one host data would go from GPU to GPU, without a socket
    transport = load("transports", name).open_transport(name, identity, timeout)
    honest, before = transport.compile, None

    def compile(schedule, buffers):
        nonlocal before
        before = before or sockets()
        program = honest(schedule, buffers)
        release, launches = transport.stream.release, 0

        def shut():
            nonlocal launches
            launches += 1
            release()
            if identity.rank == 1 and launches == 3:
                for fd in sockets() - before:
                    try:
                        with socket.socket(fileno=os.dup(int(fd))) as one:
                            one.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        pass  # it only listens, or NCCL has closed it meanwhile

        transport.stream.release = shut
        return program

    transport.compile = compile
    return transport


CAPABILITIES = Capabilities(name="saboteur", devices=("cuda",), needs_store=True)
"""


@both_transports
def test_background_nccl_error_is_reported_in_its_words(transport: str, tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "saboteur-1.0.dist-info").mkdir(parents=True)
    (site / "saboteur.py").write_text(SABOTEUR)
    (site / "saboteur-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: saboteur\nVersion: 1.0\n")
    (site / "saboteur-1.0.dist-info" / "entry_points.txt").write_text("[ncclbench.transports]\nsaboteur = saboteur\n")
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    job = start(tmp_path / "run", "--transport", "saboteur", PYTHONPATH=path, SABOTAGED=transport, NCCL_NET="Socket")
    try:
        stdout, stderr = job.communicate(timeout=100)
    finally:
        job.kill()
    assert job.returncode == 3, stderr
    (record,) = json.loads(stdout.splitlines()[-1])["records"]
    assert record["status"] == "failed", record["reason"]
    assert "NCCL: " in record["reason"]
    assert "Traceback" not in stderr
