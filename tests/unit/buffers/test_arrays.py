"""Memory: what there is, what a case needs, and that one too large is refused and never made smaller."""

import os
from pathlib import Path

import numpy as np
import pytest

from ncclbench.buffers import arrays as buffers
from ncclbench.buffers.arrays import allocate, memory_limits, refuse_too_large, uploader
from ncclbench.buffers.kinds import Device
from ncclbench.errors import UsageError
from ncclbench.schedule import DTYPES, Case
from ncclbench.schedule.pattern import build_schedule
from ncclbench.topology import Topology
from ncclbench.topology.host_memory import available_memory

GIB = 1 << 30


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    folder = tmp_path / "proc"
    folder.mkdir()
    (folder / "meminfo").write_text(
        "MemTotal:       32768000 kB\nMemFree:         1000000 kB\nMemAvailable:    8388608 kB\n"
    )
    return folder


@pytest.fixture
def cgroup(tmp_path: Path) -> Path:
    folder = tmp_path / "cgroup"
    folder.mkdir()
    return folder


def test_what_the_kernel_says_is_available(proc: Path, cgroup: Path) -> None:
    assert available_memory(proc, cgroup) == 8 * GIB


def test_a_control_group_leaves_less(proc: Path, cgroup: Path) -> None:
    (cgroup / "memory.max").write_text(f"{3 * GIB}\n")
    (cgroup / "memory.current").write_text(f"{GIB}\n")
    assert available_memory(proc, cgroup) == 2 * GIB


def test_a_control_group_larger_than_the_machine_gives_nothing(proc: Path, cgroup: Path) -> None:
    (cgroup / "memory.max").write_text(f"{300 * GIB}\n")
    (cgroup / "memory.current").write_text("0\n")
    assert available_memory(proc, cgroup) == 8 * GIB


def test_exhausted_cgroup_leaves_zero_bytes(proc: Path, cgroup: Path) -> None:
    (cgroup / "memory.max").write_text(f"{GIB}\n")
    (cgroup / "memory.current").write_text(f"{GIB + 4096}\n")
    assert available_memory(proc, cgroup) == 0


def test_a_control_group_without_a_limit(proc: Path, cgroup: Path) -> None:
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text(f"{GIB}\n")
    assert available_memory(proc, cgroup) == 8 * GIB


def group(folder: Path, limit: str, used: int, version: int = 2, inactive: int = 0) -> None:
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 77\n{names[2]} {inactive}\n")


def own_groups(proc: Path, *lines: str) -> None:
    (proc / "self").mkdir()
    (proc / "self/cgroup").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("limited", ["", "job", "job/step"])
def test_a_limit_counts_at_every_level_in_either_version(version: int, limited: str, proc: Path, cgroup: Path) -> None:
    root = cgroup / "memory" if version == 1 else cgroup
    own_groups(proc, "9:cpu,cpuacct:/elsewhere", "4:memory:/job/step" if version == 1 else "0::/job/step")
    for level in ("", "job", "job/step", "other"):
        none = "max" if version == 2 else str((1 << 63) - 4096)
        group(root / level, str(3 * GIB) if level == limited else none, GIB, version)
    assert available_memory(proc, cgroup) == 2 * GIB
    group(cgroup / "memory/elsewhere" if version == 1 else cgroup / "elsewhere", str(GIB), 0, version)
    assert available_memory(proc, cgroup) == 2 * GIB  # the group of another controller limits no memory


def test_cached_files_of_a_control_group_can_be_dropped(proc: Path, cgroup: Path) -> None:
    group(cgroup, str(3 * GIB), 2 * GIB, inactive=GIB)
    assert available_memory(proc, cgroup) == 2 * GIB


def test_missing_cgroup_path_is_no_limit(proc: Path, cgroup: Path) -> None:
    own_groups(proc, "4:memory:/kubepods/../pod1", "nonsense", "0::/kubepods")
    group(cgroup / "memory", str(3 * GIB), GIB, version=1)
    assert available_memory(proc, cgroup) == 2 * GIB


@pytest.mark.parametrize("content", [None, "MemTotal: 1 kB\n"])
def test_total_memory_is_used_without_available_memory(content: str | None, tmp_path: Path, cgroup: Path) -> None:
    if content is not None:
        (tmp_path / "meminfo").write_text(content)
    assert available_memory(tmp_path, cgroup) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_what_fits_is_not_refused() -> None:
    refuse_too_large("case", GIB, 4, 5 * GIB)


def test_refusal_names_needed_and_free_memory() -> None:
    with pytest.raises(UsageError) as caught:
        refuse_too_large("all_reduce/float32/1073741824/isolated", GIB, 4, 4 * GIB)
    assert str(caught.value) == (
        "all_reduce/float32/1073741824/isolated needs 4.0 GiB on this node (4 ranks x 1.0 GiB), "
        "and of the 4.0 GiB that is free 256.0 MiB a rank is kept for libraries: lower --max-bytes or --nproc"
    )


def test_interpreter_needs_memory_too() -> None:
    with pytest.raises(UsageError):
        refuse_too_large("case", GIB, 1, GIB + (256 << 20) - 1)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_buffers_have_the_schedules_sizes_and_type(dtype: str) -> None:
    schedule = build_schedule(Case(pattern="all_gather", nbytes=4096, dtype=dtype), Topology.single_node(4))
    buffers = allocate(schedule, "cpu")
    assert set(buffers) == set(schedule.buffers)
    for name, array in buffers.items():
        assert array.ndim == 1
        assert array.dtype == DTYPES[dtype].numpy
        assert array.nbytes == schedule.buffers[name]
    assert sum(array.nbytes for array in buffers.values()) == schedule.memory_bytes


def test_numpy_serves_the_cpu() -> None:
    assert uploader("cpu") is np.asarray


@pytest.mark.parametrize(
    ("device", "staged", "limits"),
    [
        ("cpu", None, [(4, 100, "this node")]),
        ("cuda", None, [(1, 10, "a GPU")]),
        ("cuda", False, [(1, 10, "a GPU")]),
        ("cuda", True, [(1, 10, "a GPU"), (4, 100, "this node")]),
    ],
)
def test_buffers_that_are_staged_must_fit_on_the_host_too(
    device: Device, staged: bool | None, limits: list[tuple[int, int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "available_memory", lambda: 100)
    monkeypatch.setattr(buffers, "free_device_memory", lambda: 10)
    assert memory_limits(device, staged, 4) == limits
