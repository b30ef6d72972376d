"""What every reader of a run must be told of it: simulated, GPUs that are shared, nodes of one machine."""

from collections.abc import Mapping
from typing import Any

from ncclbench.store.records import Record


def is_simulated(manifest: Mapping[str, Any]) -> bool:
    """Whether the run's times come from a model."""
    return bool(manifest.get("simulated")) or manifest.get("transport") == "model"


def ranks_per_gpu(manifest: Mapping[str, Any]) -> int:
    """How many ranks had a GPU together; more than one only where that was asked for, to try the software."""
    provenance = manifest.get("provenance")
    transport = provenance.get("transport") if isinstance(provenance, Mapping) else None
    count = transport.get("ranks_per_gpu") if isinstance(transport, Mapping) else None
    return count if isinstance(count, int) else 1


def share_a_machine(manifest: Mapping[str, Any]) -> bool:
    """Whether ranks of unlike host names ran under one kernel: containers, or nodes that are only played."""
    ranks = manifest.get("ranks")
    hosts: dict[str, set[str]] = {}
    for rank in ranks if isinstance(ranks, list) else []:
        if isinstance(rank, Mapping) and rank.get("boot"):
            hosts.setdefault(str(rank["boot"]), set()).add(str(rank.get("host")))
    return any(len(names) > 1 for names in hosts.values())


def time_is(record: Record) -> str | None:
    """What the headline is: ``median``, or ``mean`` where an imported log has one figure for many launches."""
    if record.time_us is None:
        return None
    return "mean" if record.imported is not None and record.time_us.n == 1 else "median"
