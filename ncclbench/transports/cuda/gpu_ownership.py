"""Which GPU a rank has, and who else has it.

One rank a GPU, or the job is refused: two on one would halve each other's figures. ``NCCLBENCH_SHARE_GPU=1`` lets ranks
share all the same, to try schedules and libraries with more ranks than GPUs. NCCL takes ranks on one GPU for a mistake
unless they are on different hosts, so those that share one say that they are (``NCCL_HOSTID``) and talk through
sockets. Such results are stamped wherever they are shown.
"""

import os
import socket
from collections import Counter
from collections.abc import MutableMapping
from typing import Protocol

from ncclbench.errors import EnvironmentFault
from ncclbench.transports.base import SHARE_GPU, Control, RankIdentity, all_gather_text


def choose_gpu(identity: RankIdentity, count: int, environ: MutableMapping[str, str] = os.environ) -> int:
    """The index of this rank's GPU among the `count` that it sees: its place on the node.

    A launcher that shows each rank only its own GPU is honoured. To be called before NCCL reads its variables.

    Raises:
        EnvironmentFault: if there are fewer GPUs than ranks, and they are not to share.
    """
    if count == 0:
        raise EnvironmentFault(f"rank {identity.rank} sees no CUDA GPU; use --transport gloo")
    shown = environ.get("CUDA_VISIBLE_DEVICES", "")
    if _may_share(environ):
        environ.setdefault("NCCL_HOSTID", f"{socket.gethostname()}-{identity.local_rank // count}")
        return identity.local_rank % count
    if count == 1 and identity.local_size > 1 and shown and "," not in shown:
        return 0  # if it is the same one for two ranks, `ranks_per_gpu` or `refuse_shared` finds out
    if identity.local_rank >= count:
        raise EnvironmentFault(
            f"{identity.local_size} ranks on a node of {count} GPUs: start at most one a GPU, --nproc {count}"
        )
    return identity.local_rank


def cupy_gpus(instead: str) -> int:
    """How many GPUs CuPy can use here.

    Args:
        instead: what else a user can do, such as ``--transport gloo``.

    Raises:
        EnvironmentFault: without CuPy, without a driver, or with a CuPy that is for another CUDA than the driver; it
            names the wheel.
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
    """What to say of a CuPy that fails before anything was measured."""
    import cupy

    why = (str(error).strip() or type(error).__name__).splitlines()[0]
    try:
        cuda = int(cupy.cuda.runtime.driverGetVersion()) // 1000
    except Exception:  # there is nobody to ask
        cuda = 0
    if cuda == 0:
        return EnvironmentFault(f"no GPU can be used, no NVIDIA driver is loaded: use {instead} ({why})")
    return EnvironmentFault(
        f"CuPy {cupy.__version__} cannot be used here, where the driver is for CUDA {cuda}: "
        f"pip install cupy-cuda{cuda}x, or use {instead} ({why})"
    )


def ranks_per_gpu(control: Control, identity: str, environ: MutableMapping[str, str] = os.environ) -> int:
    """How many ranks the GPU with most of them has; `identity` is that of this rank's, such as its UUID.

    Raises:
        EnvironmentFault: naming two ranks on one GPU, unless they are to share; on every rank alike.
    """
    ids = all_gather_text(control, identity)
    for rank, one in enumerate(ids):
        first = ids.index(one)
        if first != rank and not _may_share(environ):
            raise _on_the_same(first, rank)
    return max(Counter(ids).values())


class KeyValueStore(Protocol):
    """What is used of ``torch.distributed.Store``: each call is one round trip to rank 0's host."""

    def set(self, key: str, value: str) -> None:
        """Store a value under a key."""

    def get(self, key: str) -> bytes:
        """Wait for a key and return its value."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""

    def add(self, key: str, value: int) -> int:
        """Add to a counter and return its new value."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Replace the value of a key if it is the expected one; return what is there now."""


def refuse_shared(
    board: KeyValueStore, rank: int, world_size: int, identity: str, environ: MutableMapping[str, str] = os.environ
) -> None:
    """As `ranks_per_gpu`, for ranks that have nothing but a store in common yet.

    NCCL would refuse two ranks on one GPU as well, by the words "invalid usage". A few round trips a rank, however many
    ranks there are: who claims a GPU second says so, and the last to come has everybody go on.

    Args:
        board: the store, with keys that no other start of the job uses.
        rank: this rank.
        world_size: how many there are.
        identity: of this rank's GPU.
        environ: where ranks are allowed to share.

    Raises:
        EnvironmentFault: naming two ranks on one GPU, unless they are to share; or saying how many ranks have come,
            when the store's time is over. On every rank, as long as rank 0, which has the store, waits for them.
    """
    first = int(board.compare_set(f"gpu/{identity}", "", str(rank)))
    if first != rank:
        board.set("twice", f"{min(first, rank)} {max(first, rank)}")
    if board.add("came", 1) == world_size:
        board.set("verdict", board.get("twice").decode() if board.check(["twice"]) else "none")
    try:
        verdict = board.get("verdict").decode()  # waits for it
    except RuntimeError as error:
        came = board.add("came", 0)
        if came >= world_size:
            raise
        raise EnvironmentFault(
            f"only {came} of {world_size} ranks have met: see whether the others were started ({error})".splitlines()[0]
        ) from error
    if verdict != "none" and not _may_share(environ):
        raise _on_the_same(*map(int, verdict.split()))


def _on_the_same(first: int, second: int) -> EnvironmentFault:
    return EnvironmentFault(
        f"ranks {first} and {second} are on the same GPU: start at most one rank a GPU "
        f"({SHARE_GPU}=1 lets them share it, to try the software)"
    )


def _may_share(environ: MutableMapping[str, str]) -> bool:
    return environ.get(SHARE_GPU, "") not in ("", "0")
