"""The control of a dispatch: its bare all-to-alls, and as many bytes in equal splits.

What the same layer would take if no expert were busier than another: every rank sends every other the same number of
rows, and all rows together are as many as the routing has. The two take turns in one case, each from a barrier on, so
that their ratio, the skew penalty, compares nothing but splits.
"""

import numpy as np

from ncclbench.moe import expected_buffers as contents
from ncclbench.moe.expected_buffers import ExpectedRows, LayerContents, RowBuffer
from ncclbench.moe.layer_schedule import LayerOptions
from ncclbench.moe.routing import Routing
from ncclbench.moe.row_routes import LayerRows, refuse_too_many_rows
from ncclbench.moe.token_values import Ints, TokenValues
from ncclbench.schedule.dtypes import DTYPES
from ncclbench.schedule.phases import AllToAllV
from ncclbench.schedule.row_formats import FORMATS
from ncclbench.schedule.schedule import Schedule


def equal_rows(rows_NN: Ints) -> Ints:
    """As many rows in all, as equal as whole rows can be; what does not divide goes in turns over the offsets."""
    members = len(rows_NN)
    base, extra = divmod(int(rows_NN.sum()), members * members)
    offset, turn = np.divmod(np.arange(members * members), members)
    out = np.full((members, members), base, np.int64)
    out[turn, (turn + offset + 1) % members] += np.arange(members * members) < extra
    return out


def build_split_control(layer: LayerRows, routing: Routing, options: LayerOptions, *, equal: bool) -> Schedule:
    """Two all-to-alls: ``dispatch`` of rows in their format, ``combine`` of bfloat16 rows.

    Args:
        layer: who sends which rows.
        routing: what was drawn.
        options: how rows look.
        equal: in equal splits, labels beginning with ``control_``; otherwise in those of the routing.

    Raises:
        Unable: with more rows than an int32 counts.
    """
    groups, prefix = layer.placement.groups, "control_" if equal else ""
    rows = np.stack([equal_rows(one) for one in layer.flat_rows]) if equal else layer.flat_rows
    refuse_too_many_rows(rows)
    row, wide = options.format.row_bytes(options.hidden), 2 * options.hidden
    sent_R, received_R = rows.sum(axis=2), rows.sum(axis=1)
    most_out, most_in = int(sent_R.max()), int(received_R.max())

    def own(rank: int) -> ExpectedRows:
        g, member = layer.placement.seat(rank)
        return _numbered(np.full(int(sent_R[g, member]), rank), np.arange(int(sent_R[g, member])))

    def arrived(rank: int) -> ExpectedRows:
        g, member = layer.placement.seat(rank)
        first_NN = np.cumsum(rows[g], axis=1) - rows[g]
        counts = rows[g][:, member]
        tok = np.concatenate([first_NN[j, member] + np.arange(n) for j, n in enumerate(counts.tolist())])
        return _numbered(np.repeat(groups[g], counts), tok)

    def values(salt: int, backward: bool) -> TokenValues:
        format = FORMATS["bf16"] if backward else options.format
        return TokenValues(options.hidden, format, routing.router.top_k, True, salt, backward)

    render = contents.packed if options.format.block else contents.payload
    held = {
        "packed": RowBuffer(own, render, row),
        "received": RowBuffer(arrived, render, row),
        # What comes back are rows of its own kind, so that both all-to-alls are checked by what was filled in.
        "partial": RowBuffer(arrived, contents.numbers, wide, backward=True),
        "returned": RowBuffer(own, contents.numbers, wide, backward=True),
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
        contents=LayerContents(held, {}, values, 0.0),
        subtotals={f"{prefix}comm_only": (f"{prefix}dispatch", f"{prefix}combine")},
        ratios={"skew_penalty": ("comm_only", "control_comm_only")},
        fingerprint=routing.sha256,
    )


def _numbered(rank: Ints, tok: Ints) -> ExpectedRows:
    return ExpectedRows(rank, tok, np.zeros((len(rank), 1), np.int64))
