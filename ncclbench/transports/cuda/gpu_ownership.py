"""The GPU of each rank, and the check that no two ranks share one.

A job with two ranks on one GPU is refused, since each would halve the other's figures. ``NCCLBENCH_SHARE_GPU=1`` allows
it, to try schedules and libraries with more ranks than GPUs. NCCL refuses ranks on one GPU unless they are on different
hosts. Ranks that share a GPU therefore set different ``NCCL_HOSTID`` and communicate through sockets. Such results are
stamped wherever they are shown.
"""

import os
import socket
from collections import Counter
from collections.abc import MutableMapping
from typing import Protocol

from ncclbench.errors import EnvironmentFault
from ncclbench.transports.base import SHARE_GPU, Control, RankIdentity, all_gather_text


def choose_gpu(identity: RankIdentity, count: int, environ: MutableMapping[str, str] = os.environ) -> int:
    """The index of this rank's GPU among the `count` visible ones: the rank's index on the node.

    If the launcher shows each rank only its own GPU, that one is used. Must be called before NCCL reads its variables.

    Raises:
        EnvironmentFault: if there are fewer GPUs than ranks, and sharing is not allowed.
    """
    if count == 0:
        raise EnvironmentFault(f"rank {identity.rank} sees no CUDA GPU; use --transport gloo")
    shown = environ.get("CUDA_VISIBLE_DEVICES", "")
    if _sharing_allowed(environ):
        environ.setdefault("NCCL_HOSTID", f"{socket.gethostname()}-{identity.local_rank // count}")
        return identity.local_rank % count
    if count == 1 and identity.local_size > 1 and shown and "," not in shown:
        return 0  # `ranks_per_gpu` and `refuse_shared` find two ranks with the same GPU
    if identity.local_rank >= count:
        raise EnvironmentFault(
            f"{identity.local_size} ranks on a node of {count} GPUs: start at most one a GPU, --nproc {count}"
        )
    return identity.local_rank


def cupy_gpus(instead: str) -> int:
    """The number of GPUs that CuPy can use here.

    Args:
        instead: an alternative for the user, such as ``--transport gloo``.

    Raises:
        EnvironmentFault: without CuPy, without a driver, or if CuPy and the driver are for different CUDA versions; it
            names the wheel to install.
    """
    try:
        import cupy
    except ImportError as error:
        raise EnvironmentFault(
            f"buffers on GPUs are CuPy's: pip install cupy-cuda13x (or cupy-cuda12x), or use {instead} ({error})"
        ) from error
    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except Exception as error:
        raise unusable_cupy(error, instead) from error


def unusable_cupy(error: BaseException, instead: str) -> EnvironmentFault:
    """The error for a CuPy that fails before anything was measured."""
    import cupy

    why = (str(error).strip() or type(error).__name__).splitlines()[0]
    try:
        cuda = int(cupy.cuda.runtime.driverGetVersion()) // 1000
    except Exception:  # without a driver there is no version
        cuda = 0
    if cuda == 0:
        return EnvironmentFault(f"no GPU can be used, no NVIDIA driver is loaded: use {instead} ({why})")
    return EnvironmentFault(
        f"CuPy {cupy.__version__} cannot be used here, where the driver is for CUDA {cuda}: "
        f"pip install cupy-cuda{cuda}x, or use {instead} ({why})"
    )


def ranks_per_gpu(control: Control, identity: str, environ: MutableMapping[str, str] = os.environ) -> int:
    """The largest number of ranks on one GPU; `identity` identifies this rank's GPU, such as its UUID.

    Raises:
        EnvironmentFault: naming two ranks on one GPU, unless sharing is allowed; on every rank.
    """
    ids = all_gather_text(control, identity)
    for rank, one in enumerate(ids):
        first = ids.index(one)
        if first != rank and not _sharing_allowed(environ):
            raise _shared_gpu_error(first, rank)
    return max(Counter(ids).values())


class KeyValueStore(Protocol):
    """The methods of ``torch.distributed.Store`` that are used; each call is a round trip to rank 0's host."""

    def set(self, key: str, value: str) -> None:
        """Store a value under a key."""

    def get(self, key: str) -> bytes:
        """Wait for a key and return its value."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys exist."""

    def add(self, key: str, value: int) -> int:
        """Add to a counter and return its new value."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Replace the value of a key if it is the expected one; return the value after that."""


def refuse_shared(
    store: KeyValueStore, rank: int, world_size: int, identity: str, environ: MutableMapping[str, str] = os.environ
) -> None:
    """Refuse two ranks on one GPU, for ranks that share only a store so far.

    NCCL would refuse them as well, but with the message "invalid usage". Each rank makes a few round trips, whatever
    the number of ranks. The second rank on a GPU reports both ranks in the store. The last rank to arrive writes the
    verdict that all ranks wait for.

    Args:
        store: the store, with keys that no other start of the job uses.
        rank: this rank.
        world_size: number of ranks.
        identity: identifies this rank's GPU.
        environ: the variables that may allow sharing.

    Raises:
        EnvironmentFault: naming two ranks on one GPU, unless sharing is allowed; or, after the store's time limit,
            saying how many ranks have arrived. Every rank raises it, while rank 0, which has the store, waits.
    """
    first = int(store.compare_set(f"gpu/{identity}", "", str(rank)))
    if first != rank:
        store.set("twice", f"{min(first, rank)} {max(first, rank)}")
    if store.add("came", 1) == world_size:
        store.set("verdict", store.get("twice").decode() if store.check(["twice"]) else "none")
    try:
        verdict = store.get("verdict").decode()  # waits until the key exists
    except RuntimeError as error:
        arrived = store.add("came", 0)
        if arrived >= world_size:
            raise
        reason = f"only {arrived} of {world_size} ranks have met: see whether the others were started ({error})"
        raise EnvironmentFault(reason.splitlines()[0]) from error
    if verdict != "none" and not _sharing_allowed(environ):
        raise _shared_gpu_error(*map(int, verdict.split()))


def _shared_gpu_error(first: int, second: int) -> EnvironmentFault:
    return EnvironmentFault(
        f"ranks {first} and {second} are on the same GPU: start at most one rank a GPU "
        f"({SHARE_GPU}=1 lets them share it, to try the software)"
    )


def _sharing_allowed(environ: MutableMapping[str, str]) -> bool:
    return environ.get(SHARE_GPU, "") not in ("", "0")
