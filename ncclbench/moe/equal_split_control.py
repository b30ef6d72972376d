"""The control experiment of a dispatch: its bare all-to-alls, and the same bytes in equal splits.

The equal splits show how long the layer would take if all experts were equally busy. Every rank sends every other rank
the same number of rows, and the total is that of the routing. The two schedules take turns in one case, each from a
barrier on, so their ratio (the skew penalty) depends on the splits alone.
"""

import numpy as np

from ncclbench.moe.expected_buffers import (
    ExpectedRows,
    LayerContents,
    RowBuffer,
    render_bfloat16,
    render_packed,
    render_payload,
)
from ncclbench.moe.layer_schedule import LayerOptions
from ncclbench.moe.routing import Routing
from ncclbench.moe.row_routes import LayerRows, refuse_too_many_rows
from ncclbench.moe.token_values import Ints, TokenValues
from ncclbench.schedule.dtypes import DTYPES
from ncclbench.schedule.phases import AllToAllV
from ncclbench.schedule.row_formats import FORMATS
from ncclbench.schedule.schedule import Schedule


def equal_rows(rows_NN: Ints) -> Ints:
    """The same total as `rows_NN`, as equal as whole rows allow, shape (N, N).

    The remainder is spread over the members, one offset after the other.
    """
    members = len(rows_NN)
    base, extra = divmod(int(rows_NN.sum()), members * members)
    offset, turn = np.divmod(np.arange(members * members), members)
    out = np.full((members, members), base, np.int64)
    out[turn, (turn + offset + 1) % members] += np.arange(members * members) < extra
    return out


def build_split_control(layer: LayerRows, routing: Routing, options: LayerOptions, *, equal: bool) -> Schedule:
    """Two all-to-alls: ``dispatch`` of rows in their format, ``combine`` of bfloat16 rows.

    Args:
        layer: the rows between ranks.
        routing: the routing that they follow from.
        options: format and width of the rows.
        equal: use equal splits, and labels that begin with ``control_``; otherwise the splits of the routing.

    Raises:
        Unable: if any rank has more rows than an int32 can count.
    """
    groups, prefix = layer.placement.groups, "control_" if equal else ""
    rows = np.stack([equal_rows(one) for one in layer.flat_rows]) if equal else layer.flat_rows
    refuse_too_many_rows(rows)
    row, wide = options.format.row_bytes(options.hidden), 2 * options.hidden
    sent_R, received_R = rows.sum(axis=2), rows.sum(axis=1)
    most_out, most_in = int(sent_R.max()), int(received_R.max())

    def own(rank: int) -> ExpectedRows:
        g, member = layer.placement.group_and_member(rank)
        return _numbered(np.full(int(sent_R[g, member]), rank), np.arange(int(sent_R[g, member])))

    def arrived(rank: int) -> ExpectedRows:
        g, member = layer.placement.group_and_member(rank)
        first_NN = np.cumsum(rows[g], axis=1) - rows[g]
        counts = rows[g][:, member]
        tok = np.concatenate([first_NN[j, member] + np.arange(n) for j, n in enumerate(counts.tolist())])
        return _numbered(np.repeat(groups[g], counts), tok)

    def values(salt: int, backward: bool) -> TokenValues:
        format = FORMATS["bf16"] if backward else options.format
        return TokenValues(options.hidden, format, routing.router.top_k, True, salt, backward)

    render = render_packed if options.format.block else render_payload
    row_buffers = {
        "packed": RowBuffer(own, render, row),
        "received": RowBuffer(arrived, render, row),
        # The rows that come back are an input of their own, so that each all-to-all is checked by itself.
        "partial": RowBuffer(arrived, render_bfloat16, wide, backward=True),
        "returned": RowBuffer(own, render_bfloat16, wide, backward=True),
    }
    sizes = {
        "packed": most_out * row,
        "received": most_in * row,
        "partial": most_in * wide,
        "returned": most_out * wide,
    }
    return Schedule(
        world_size=len(routing.tokens),
        dtype=DTYPES["uint8"],
        buffers={name: max(8, nbytes) for name, nbytes in sizes.items()},
        inputs=("packed", "partial"),
        phases=(
            AllToAllV(f"{prefix}dispatch", groups, rows, row, "packed", "received"),
            AllToAllV(f"{prefix}combine", groups, rows.transpose(0, 2, 1), wide, "partial", "returned"),
        ),
        op=None,
        size_bytes=int(routing.tokens.max()) * row,
        count=int(routing.tokens.max()) * options.hidden,
        groups=groups,
        contents=LayerContents(row_buffers, {}, values, 0.0),
        subtotals={f"{prefix}comm_only": (f"{prefix}dispatch", f"{prefix}combine")},
        ratios={"skew_penalty": ("comm_only", "control_comm_only")},
        fingerprint=routing.sha256,
    )


def _numbered(rank: Ints, tok: Ints) -> ExpectedRows:
    return ExpectedRows(rank, tok, np.zeros((len(rank), 1), np.int64))
