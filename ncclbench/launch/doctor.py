"""Examine this machine for ``ncclbench doctor``: launcher, libraries, GPUs, NICs and settings. Nothing is changed.

A finding is `ok`, `warning` (measurements work, but may be slow), `missing` (this machine needs it) or `info`. A laptop
does not miss what only a GPU node needs: such checks run only if there is a GPU or an InfiniBand port. Libraries are
examined in separate processes, so that a broken library cannot end this one.
"""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ncclbench.errors import EnvironmentFault
from ncclbench.launch.launcher_detection import detect, without_rank
from ncclbench.store.provenance import cpu_model
from ncclbench.transports.library_checks import Answer, HealthFinding, examine_libraries
from ncclbench.units import format_bytes

_PROBE_SECONDS = 60
_VARIABLES = ("NCCL_", "UCX_", "OMPI_", "GLOO_", "TORCH_", "MPICH_", "FI_")


@dataclass(frozen=True)
class Machine:
    """What the checks examine; tests replace each part.

    Attributes:
        root: root of the file system.
        environ: the environment variables.
        ask: runs a Python program in a separate process, and returns its JSON or an error message.
        memlock: the limit of locked memory in bytes; -1 for no limit.
    """

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    ask: Callable[[str], Answer] = lambda program: ask_python(program)
    memlock: int = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]

    def read(self, path: str) -> str | None:
        """The text of a file; None if it cannot be read."""
        try:
            return (self.root / path.lstrip("/")).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None

    def names(self, path: str) -> list[str]:
        """The sorted names in a folder; empty if it cannot be read."""
        try:
            return sorted(entry.name for entry in (self.root / path.lstrip("/")).iterdir())
        except OSError:
            return []

    @property
    def gpus(self) -> list[str]:
        """GPU device files."""
        return [name for name in self.names("/dev") if re.fullmatch(r"nvidia\d+", name)]

    @property
    def hcas(self) -> list[str]:
        """InfiniBand and RoCE adapters."""
        return self.names("/sys/class/infiniband")


def ask_python(program: str) -> Answer:
    """Run `program` with this interpreter; return its JSON output, or an error message of one line."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            env=without_rank(os.environ),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {done.returncode}"
    try:
        answer: Mapping[str, object] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return "no answer"
    return answer


def examine(machine: Machine) -> list[HealthFinding]:
    """All findings, grouped by area."""
    checks = (_launcher, _libraries, _gpus, _nics, _gpu_direct, _memlock, _system, _variables)
    return [finding for check in checks for finding in check(machine)]


def _launcher(machine: Machine) -> Iterator[HealthFinding]:
    why = "each process reads its rank from the launcher's variables"
    try:
        identity = detect(machine.environ)
    except EnvironmentFault as fault:
        yield HealthFinding("launcher", "launcher", "missing", "contradictory", str(fault))
        return
    if identity is None:
        yield HealthFinding("launcher", "launcher", "ok", "none", "no launcher; `run --nproc N` starts the ranks")
    else:
        yield HealthFinding(
            "launcher", "launcher", "ok", f"{identity.launcher}, rank {identity.rank} of {identity.world_size}", why
        )


def _libraries(machine: Machine) -> Iterator[HealthFinding]:
    return examine_libraries(machine.ask, len(machine.gpus))


def _gpus(machine: Machine) -> Iterator[HealthFinding]:
    driver = machine.read("/proc/driver/nvidia/version")
    if not machine.gpus:
        yield HealthFinding("gpu", "GPUs", "info", "none", "results on CPUs prove logic, not a fabric")
        return
    yield HealthFinding("gpu", "GPUs", "ok", str(len(machine.gpus)), "one rank per GPU")
    line = driver.splitlines()[0] if driver else "unknown"
    yield HealthFinding("gpu", "driver", "ok" if driver else "warning", line, "recorded, so that runs can be compared")


def _nics(machine: Machine) -> Iterator[HealthFinding]:
    for hca in machine.hcas:
        for port in machine.names(f"/sys/class/infiniband/{hca}/ports"):
            yield _port(machine, hca, port)
    if machine.gpus and not machine.hcas:
        why = "NCCL uses slow sockets between nodes; inside one node this does not matter"
        yield HealthFinding("nic", "InfiniBand or RoCE", "warning", "none", why)
    for name in machine.names("/sys/class/net"):
        speed = machine.read(f"/sys/class/net/{name}/speed")
        state = machine.read(f"/sys/class/net/{name}/operstate") or "unknown"
        rate = f", {speed} Mbit/s" if speed and speed.isdecimal() else ""
        yield HealthFinding("nic", name, "info", f"{state}{rate}", "gloo and NCCL's sockets can use it")


def _port(machine: Machine, hca: str, port: str) -> HealthFinding:
    where = f"/sys/class/infiniband/{hca}/ports/{port}"
    layer = machine.read(f"{where}/link_layer") or "unknown"
    kind = {"Ethernet": "RoCE", "InfiniBand": "IB"}.get(layer, layer)
    state, rate = machine.read(f"{where}/state") or "unknown", machine.read(f"{where}/rate") or "unknown rate"
    active = "ACTIVE" in state
    why = "a rail" if active else "a port that is down disables its rail: check the cable and the switch"
    return HealthFinding("nic", f"{hca}:{port}", "ok" if active else "warning", f"{kind}, {state}, {rate}", why)


def _gpu_direct(machine: Machine) -> Iterator[HealthFinding]:
    if not (machine.gpus and machine.hcas):
        return
    modules = {line.split()[0] for line in (machine.read("/proc/modules") or "").splitlines() if line}
    peer = modules & {"nvidia_peermem", "nv_peer_mem"}
    # From NCCL 2.21 and kernel 5.12 on, DMA-BUF does the same without a module.
    value = ", ".join(sorted(peer)) or "no module (NCCL may use DMA-BUF)"
    why = "lets NICs read GPU memory directly; without it all data goes through host memory. modprobe nvidia-peermem"
    yield HealthFinding("gpu", "peer memory", "ok" if peer else "warning", value, why)
    copy = "gdrdrv" in modules
    why = "GDRCopy lowers the latency of small messages"
    yield HealthFinding("gpu", "gdrdrv", "ok" if copy else "info", "loaded" if copy else "not loaded", why)
    channels = machine.names("/dev/nvidia-caps-imex-channels")
    why = "needed to reach GPUs of other trays over NVLink (NVL72); an HGX node has none"
    yield HealthFinding("gpu", "IMEX channels", "ok" if channels else "info", str(len(channels)), why)


def _memlock(machine: Machine) -> Iterator[HealthFinding]:
    unlimited = machine.memlock in (-1, resource.RLIM_INFINITY)
    value = "unlimited" if unlimited else format_bytes(machine.memlock)
    needed = bool(machine.hcas) and not unlimited
    why = "InfiniBand registers memory by locking it; set `* - memlock unlimited` in limits.conf"
    yield HealthFinding("system", "locked memory", "warning" if needed else "ok", value, why)


def _system(machine: Machine) -> Iterator[HealthFinding]:
    yield HealthFinding("system", "CPU", "info", cpu_model(machine.root / "proc/cpuinfo") or "unknown", "recorded")
    governor = machine.read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    slow = governor in ("powersave", "ondemand", "conservative")
    why = "a varying clock causes varying latency; cpupower frequency-set -g performance"
    yield HealthFinding(
        "system", "CPU governor", "warning" if slow and machine.gpus else "info", governor or "none", why
    )
    pages = machine.read("/sys/kernel/mm/transparent_hugepage/enabled") or "unknown"
    chosen = re.search(r"\[(\w+)\]", pages)
    yield HealthFinding(
        "system", "huge pages", "info", chosen[1] if chosen else pages, "large host buffers need fewer TLB entries"
    )


def _variables(machine: Machine) -> Iterator[HealthFinding]:
    for name, value in sorted(machine.environ.items()):
        if not name.startswith(_VARIABLES) or re.search(r"KEY|TOKEN|SECRET|PASS", name):
            continue
        slows = (name, value) in {("NCCL_P2P_DISABLE", "1"), ("NCCL_IB_DISABLE", "1"), ("NCCL_SHM_DISABLE", "1")}
        noisy = name == "NCCL_DEBUG" and value.upper() in ("INFO", "TRACE")
        why = "it affects measurements"
        if slows:
            why = "it disables a fast path: results will be slow"
        elif noisy:
            why = "NCCL writes its log during measurements"
        yield HealthFinding("variables", name, "warning" if slows or noisy else "info", value, why)
