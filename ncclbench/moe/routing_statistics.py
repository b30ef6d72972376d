"""Statistics of a routing for the record: its skew, and the rows between every two ranks in three bases.

- ``selection``: one row per choice, k per token.
- ``rank_dedup``: one row per token and destination rank.
- ``domain_dedup``: one row per token and destination domain, counted at the member at the sender's position there.

All are counted from the sampled table, never from its expectation. Rows that a rank sends to itself are on the
diagonal, and no "remote" figure counts them.
"""

from collections.abc import Sequence

import numpy as np

from ncclbench.errors import Unable
from ncclbench.moe.routing import Ints, Routing
from ncclbench.moe.row_routes import GroupRows, Hop, LayerRows
from ncclbench.schedule.case import JsonValue
from ncclbench.schedule.row_formats import RowFormat
from ncclbench.schedule.row_work import ENTRY_BYTES

# Larger matrices are not recorded; their sums are.
_LARGEST_MATRIX = 64


def bases(group: GroupRows, by_domain: Ints | None) -> dict[str, Ints]:
    """Rows from member to member, shape (N, N), by basis; `by_domain` (D, L) if domains are of equal size."""
    found = {"selection": group.selection_rows, "rank_dedup": group.rank_rows}
    if by_domain is not None:
        matrix = np.zeros_like(group.rank_rows)
        for peers_D in by_domain.T:  # the members at one position, one in each domain
            matrix[np.ix_(peers_D, peers_D)] = group.domain_rows[peers_D]
        found["domain_dedup"] = matrix
    return found


def remote(matrix_NN: Ints) -> Ints:
    """The matrix with a diagonal of zeros."""
    return np.asarray(matrix_NN - np.diag(np.diag(matrix_NN)))


def received_in_all(hops: Sequence[Hop]) -> Ints:
    """Rows that reach each rank from others, over all hops; shape (W,).

    A rank that passes rows on has received them in the hop before. Rows that it passes on to itself are not counted.
    """
    total = np.zeros(hops[0].groups.size, np.int64)
    for hop in hops:
        for ranks, rows in zip(hop.groups, hop.rows, strict=True):
            total[ranks] += remote(rows).sum(axis=0)
    return total


def describe_routing(
    layer: LayerRows, hops: Sequence[Hop], routing: Routing, format: RowFormat, hidden: int, capacity: float
) -> dict[str, JsonValue]:
    """The statistics of one routing; `hops` is the route of its rows, without padding."""
    tokens = routing.tokens
    try:
        by_domain: Ints | None = layer.placement.by_domain
    except Unable:  # domains of unequal size have no such matrix
        by_domain = None
    matrices = [bases(g, None if by_domain is None else by_domain[i]) for i, g in enumerate(layer.groups)]
    received = received_in_all(hops)
    facts: dict[str, JsonValue] = {
        "routing_sha256": routing.sha256,
        "tokens": {"total": int(tokens.sum()), "min": int(tokens.min()), "max": int(tokens.max())},
        "max_vio": routing.max_vio,
        "max_over_mean_received": float(received.max() / received.mean()) if received.any() else 1.0,
        "over_capacity": routing.over_capacity(capacity),
        "capacity_factor": capacity,
        "row_bytes": format.row_bytes(hidden),
        "combine_row_bytes": 2 * hidden,
        "metadata_bytes_a_row": {"rank_dedup": ENTRY_BYTES * routing.router.top_k, "selection": ENTRY_BYTES},
        "bases": {name: _totals([m[name] for m in matrices], format.row_bytes(hidden)) for name in matrices[0]},
    }
    if routing.reached is not None:
        facts["zipf_alpha_found"] = routing.reached
    if layer.placement.assumed:
        facts["domains_assumed"] = layer.placement.assumed
    if layer.placement.members <= _LARGEST_MATRIX:
        facts["rows"] = {name: [m[name].tolist() for m in matrices] for name in matrices[0]}
    return facts


def _totals(matrices: list[Ints], row_bytes: int) -> dict[str, JsonValue]:
    """Payload bytes of a dispatch: kept, remote over all ranks, and of the busiest rank."""
    off_diagonal = [remote(matrix) for matrix in matrices]
    sent, received = (np.concatenate([m.sum(axis=axis) for m in off_diagonal]) * row_bytes for axis in (1, 0))
    return {
        "self_bytes": int(sum(np.trace(matrix) for matrix in matrices)) * row_bytes,
        "remote_bytes": int(sent.sum()),
        "remote_bytes_a_rank": float(sent.mean()),
        "bottleneck_bytes": int(max(sent.max(), received.max())),
    }
