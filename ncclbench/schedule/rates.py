"""Algorithm and bus bandwidth, as nccl-tests defines them.

algbw = S / t, where S is the whole buffer (N x the count per rank for the ops that shard it). busbw is algbw times the
fraction of S that the busiest link of an optimal algorithm must carry, so that it can be compared with the hardware's
rate at any N. Source: ``PERFORMANCE.md`` of nccl-tests. GB is 1e9 bytes.
"""

from collections.abc import Callable

GIGA = 1e9


def _whole(_n: int) -> float:
    return 1.0


def _sharded(n: int) -> float:
    return (n - 1) / n


def _both_ways(n: int) -> float:
    return 2 * (n - 1) / n


_FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": _both_ways,
    "all_gather": _sharded,
    "reduce_scatter": _sharded,
    "all_to_all": _sharded,
    "gather": _sharded,
    "scatter": _sharded,
    "broadcast": _whole,
    "reduce": _whole,
    "send_recv": _whole,
}


def bus_factor(op: str, n: int) -> float:
    """Busbw / algbw of `op` in a group of `n`.

    Raises:
        ValueError: if the op has no factor. An unknown op is an error, never an uncorrected number.
    """
    if op not in _FACTORS:
        raise ValueError(f"no bus bandwidth is defined for {op!r}; it is for: {', '.join(_FACTORS)}")
    if n < 1:
        raise ValueError(f"a group has at least one rank, got {n}")
    return _FACTORS[op](n)


def alg_gb_per_s(size_bytes: int, seconds: float) -> float:
    """S / t in GB/s."""
    return size_bytes / seconds / GIGA


def bus_gb_per_s(op: str, n: int, size_bytes: int, seconds: float) -> float:
    """S / t in GB/s, times `bus_factor`."""
    return alg_gb_per_s(size_bytes, seconds) * bus_factor(op, n)
