"""The kinds of buffers: their device, their allocator, and whether the cache may hold them."""

from typing import Literal, TypeAlias, get_args

Device: TypeAlias = Literal["cpu", "cuda"]
# On GPUs: CuPy's pool, ncclMemAlloc, or torch's caching allocator.
Kind: TypeAlias = Literal["pool", "nccl", "torch"]
Cache: TypeAlias = Literal["cold", "warm"]

KINDS: tuple[Kind, ...] = get_args(Kind)


def is_registered(kind: Kind) -> bool:
    """Whether buffers of this kind come from ncclMemAlloc and are registered with the communicators that move them."""
    return kind == "nccl"
