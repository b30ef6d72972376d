"""Visible GPUs are counted without CUDA, from device files and CUDA_VISIBLE_DEVICES."""

import os
from pathlib import Path

import pytest

from ncclbench.launch.preparation import choose_transport, nproc_of
from ncclbench.launch.request import RunRequest
from ncclbench.topology.visible_gpus import gpus_are_meant, gpus_here


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    for name in ("nvidia0", "nvidia1", "nvidia5", "nvidia10", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("shown", "seen"),
    [
        (None, 4),
        ("0", 1),
        ("3, 1", 2),
        ("", 0),
        ("-1", 0),
        ("0,-1,1", 1),  # entries after an invalid one are ignored
        ("0,4,1", 1),
        ("GPU-a1,GPU-b2", 2),
        ("NoDevFiles", 0),
        ("0,1,1,0", 2),
        ("MIG-a1,MIG-b2", 1),  # a process sees one instance
    ],
)
def test_visible_devices_are_counted(shown: str | None, seen: int, dev: Path) -> None:
    assert gpus_here({} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}, dev) == seen


def test_a_rank_that_is_shown_what_is_not_there_means_a_gpu(dev: Path, tmp_path: Path) -> None:
    """A launcher does this for one rank too many; the rank must be refused and not run on a CPU."""
    for shown in ("4", "7,0", "GPU-a1"):
        assert gpus_are_meant({"CUDA_VISIBLE_DEVICES": shown}, dev)
    assert gpus_are_meant({}, dev)
    for hidden in ("", "-1", " "):
        assert not gpus_are_meant({"CUDA_VISIBLE_DEVICES": hidden}, dev)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert not gpus_are_meant({}, empty)


def test_no_device_file_means_no_gpu(tmp_path: Path) -> None:
    assert gpus_here({"CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path) == 0


def test_one_rank_per_visible_gpu(dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for asking in (gpus_here, gpus_are_meant):
        monkeypatch.setattr(asking, "__defaults__", (os.environ, dev))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # torch and CuPy are installed
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    asked = RunRequest()
    assert choose_transport("auto", None) == "nccl"
    assert [nproc_of(asked, name) for name in ("nccl", "cupy_nccl", "mpi")] == [3, 3, 3]
    assert nproc_of(RunRequest(nproc=2), "nccl") == 2
    # Transports on CPUs ignore the GPUs.
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert [nproc_of(asked, name) for name in ("gloo", "threads")] == [6, 6]
    assert nproc_of(RunRequest(device="cpu"), "mpi") == 6
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "cupy" else name)
    assert nproc_of(asked, "mpi") == 6  # its buffers are then on the host
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert nproc_of(asked, "nccl") == 6
    assert choose_transport("auto", None) == "gloo"
