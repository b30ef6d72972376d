"""Names of ranks and groups for a reader, as far as the topology is known; None stands for one that is not."""

from collections.abc import Sequence

import numpy as np

from ncclbench.topology.model import Ints, Topology


def distinct(column: Ints, ranks: Sequence[int] | Ints) -> int | None:
    """How many nodes, domains or rails `ranks` sit in; None if the world does not have such ranks.

    Args:
        column: `nodes`, `domains` or `rails` of a topology.
        ranks: at least one.
    """
    if not 0 < len(ranks) <= len(column) or max(ranks) >= len(column):
        return None
    return len(np.unique(column[np.asarray(ranks, np.int64)]))


def rank_name(topology: Topology | None, rank: int) -> str:
    """A rank with where it sits: ``rank 5 (n2, rail 1)``."""
    if topology is None or not 0 <= rank < topology.world_size:
        return f"rank {rank}"
    return f"rank {rank} ({topology.node_names[topology.nodes[rank]]}, rail {topology.rails[rank]})"


def group_name(topology: Topology | None, ranks: Sequence[int]) -> tuple[str, str]:
    """What a group is, and which: ``("rail", "rail 3")``, ``("node", "node n07")``, ``("group", "ranks 0,8")``."""
    if topology is not None and len(ranks) > 1:
        columns = {"node": topology.nodes, "domain": topology.domains, "rail": topology.rails}
        for kind, column in columns.items():
            if distinct(column, ranks) == 1:
                index = int(column[ranks[0]])
                return kind, f"{kind} {topology.node_names[index] if kind == 'node' else index}"
    shown = ",".join(map(str, ranks[:4])) + (",..." if len(ranks) > 4 else "")
    return "group", f"ranks {shown}"
