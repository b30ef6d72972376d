"""The schedule of an expert-parallel layer: counts, splits, pack, dispatch, expert, combine, unpack.

One builder makes all variants from a list of hops (`row_routes.Hop`): one hop directly to the ranks, or two, first
along the rail and then inside the domain. On the way out, each hop packs rows and sends them. On the way back, each hop
sends partial sums in the opposite direction and adds them up. Every phase is timed by itself; `docs/moe.md` defines
them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ncclbench.moe.expected_buffers import (
    CountBuffer,
    ExpectedRows,
    LayerContents,
    RowBuffer,
    render_bfloat16,
    render_entries,
    render_packed,
    render_payload,
    render_scales,
)
from ncclbench.moe.routing import Routing
from ncclbench.moe.row_routes import Hop, LayerRows, RowSet, all_positions, positions, refuse_too_many_rows
from ncclbench.moe.token_values import Floats, Ints, TokenValues, expert_exponents
from ncclbench.schedule.dtypes import DTYPES
from ncclbench.schedule.phases import AllToAllV, Collective, Op, Phase
from ncclbench.schedule.row_formats import FORMATS, RowFormat
from ncclbench.schedule.row_work import ENTRY_BYTES, RowKernel, RowPlan, RowWork
from ncclbench.schedule.schedule import Schedule

_BF16 = FORMATS["bf16"]
# Largest relative rounding error of a bfloat16 sum.
_ROUNDING = 2.0**-8 * 1.01
# Ranks whose rows are cached.
_CACHED_RANKS = 64


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """How the rows of a layer are moved.

    Attributes:
        hidden: elements per token.
        format: format of dispatched rows; sums come back as bfloat16.
        separate_scales: send scales in a message of their own.
        exchange_counts: exchange counts first and copy them to the host, as a real layer must. This is done for its
            cost only: the all-to-alls take their splits from the routing, which every rank knows beforehand.
        exact: weights are powers of two, and results are compared bit by bit.
        quad: add the two all-to-alls of the backward pass.
    """

    hidden: int
    format: RowFormat
    separate_scales: bool = False
    exchange_counts: bool = True
    exact: bool = True
    quad: bool = False


@dataclass
class _Parts:
    """What the builder collects, phase by phase.

    `outward` and `homeward` have the labels of phases on the way out and back; `comm` has those of the all-to-alls per
    hop.
    """

    phases: list[Phase] = field(default_factory=list)
    buffers: dict[str, int] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    row_buffers: dict[str, RowBuffer] = field(default_factory=dict)
    count_buffers: dict[str, CountBuffer] = field(default_factory=dict)
    outward: list[str] = field(default_factory=list)
    homeward: list[str] = field(default_factory=list)
    comm: dict[str, list[str]] = field(default_factory=dict)

    def buffer(self, name: str, nbytes: int, rows: RowBuffer | None = None, *, given: bool = False) -> None:
        """Add a buffer of at least 8 bytes with its expected rows; `given` makes it an input."""
        self.buffers[name] = max(8, nbytes)
        if given:
            self.inputs.append(name)
        if rows is not None:
            self.row_buffers[name] = rows

    def add(self, labels: list[str], phase: Phase) -> None:
        """Add the next phase, and its label to `labels`."""
        self.phases.append(phase)
        labels.append(phase.label)


class _Builder:
    """Builds one layer's schedule.

    Args:
        layer: the rows between ranks.
        hops: the route of the rows.
        routing: the routing that they follow from.
        options: how rows are moved.
    """

    def __init__(self, layer: LayerRows, hops: list[Hop], routing: Routing, options: LayerOptions) -> None:
        """Derive the sizes that every phase needs."""
        self.layer, self.options, self.routing = layer, options, routing
        self.hops = [_cached(hop) for hop in hops]
        self.tokens, self.top_k = routing.experts.shape[1:]
        self.exponents = expert_exponents(routing.router.experts)
        self.parts = _Parts()
        self.wide = options.hidden * 2

    def build(self) -> Schedule:
        """Make all phases, buffers and expected contents."""
        self._forward()
        forward = list(self.parts.outward), list(self.parts.homeward)
        comm = {name: tuple(labels) for name, labels in self.parts.comm.items()}
        if self.options.quad:
            self._backward()
        subtotals = {
            "dispatch": tuple(forward[0]),
            "combine": tuple(forward[1]),
            "comm_only": tuple(label for labels in comm.values() for label in labels),
            "roundtrip": (*forward[0], *forward[1]),
        }
        if len(comm) > 1:
            subtotals |= {f"comm_{name}": labels for name, labels in comm.items()}
        if self.options.quad:
            later = len(forward[0]), len(forward[1])
            subtotals["backward"] = (*self.parts.outward[later[0] :], *self.parts.homeward[later[1] :])
        return self._schedule(subtotals)

    def _schedule(self, subtotals: dict[str, tuple[str, ...]]) -> Schedule:
        parts, options = self.parts, self.options
        most = int(self.routing.tokens.max())
        return Schedule(
            world_size=len(self.routing.tokens),
            dtype=DTYPES["uint8"],
            buffers=parts.buffers,
            inputs=tuple(parts.inputs),
            phases=tuple(parts.phases),
            op=None,
            size_bytes=most * options.format.row_bytes(options.hidden),
            count=most * options.hidden,
            groups=self.layer.placement.groups,
            contents=LayerContents(
                parts.row_buffers, parts.count_buffers, self._values, self._allowed(len(self.hops) + 1)
            ),
            subtotals=subtotals,
            fingerprint=self.routing.sha256,
        )

    def _values(self, salt: int, backward: bool) -> TokenValues:
        options = self.options
        return TokenValues(
            hidden=options.hidden,
            format=_BF16 if backward else options.format,
            top_k=self.top_k,
            exact=options.exact,
            salt=salt,
            backward=backward,
        )

    def _allowed(self, roundings: int) -> float:
        return 0.0 if self.options.exact else roundings * _ROUNDING

    # Names of rows in expected contents.

    def _named(self, rows: RowSet, rank: int) -> tuple[Ints, Ints, Ints]:
        """Ranks (n,) and tokens (n,) of rows, and the experts (n, k) that those tokens chose."""
        g, _ = self.layer.placement.group_and_member(rank)
        ranks = np.where(rows.src < 0, -1, self.layer.placement.groups[g][rows.src])
        return ranks, rows.tok, self.routing.experts[ranks, rows.tok].astype(np.int64)

    def _rows(self, of: Callable[[int], RowSet]) -> Callable[[int], ExpectedRows]:
        """Rows with the choices that they carry, multiplied by the sum of weight x expert factor of these."""

        def rows(rank: int) -> ExpectedRows:
            found = of(rank)
            ranks, tok, choices = self._named(found, rank)

            def carried(weights: Floats, part: slice) -> Floats:
                slots = found.slots[part]
                terms = weights * np.exp2(self.exponents[np.maximum(choices[part], 0)].astype(np.float32))
                picked = np.take_along_axis(terms, np.maximum(slots, 0), axis=1)
                return np.asarray(np.where(slots < 0, np.float32(0), picked).sum(axis=1), np.float32)

            return ExpectedRows(ranks, tok, choices, found.slots, carried)

        return rows

    def _sorted_rows(self, rank: int) -> ExpectedRows:
        """The outputs of the experts of a rank: expert by expert, each with its rows in the order of arrival."""
        found = self.hops[-1].received(rank)
        ranks, tok, choices = self._named(found, rank)
        carried = np.where(found.slots < 0, -1, np.take_along_axis(choices, np.maximum(found.slots, 0), axis=1))
        g, member = self.layer.placement.group_and_member(rank)
        of_expert = [
            (np.flatnonzero((carried == expert).any(axis=1)), int(expert))
            for expert in np.flatnonzero(self.layer.groups[g].hosts == member)
        ]
        order = np.concatenate([rows for rows, _ in of_expert] or [np.zeros(0, np.int64)])
        power = np.concatenate([np.full(len(rows), self.exponents[e]) for rows, e in of_expert] or [np.zeros(0)])
        factor = np.exp2(power).astype(np.float32)
        return ExpectedRows(ranks[order], tok[order], choices[order], factor=lambda _weights, part: factor[part])

    # The way out.

    def _forward(self) -> None:
        parts, options = self.parts, self.options
        own: Callable[[int], RowSet] = self.layer.own
        format, hidden = options.format, options.hidden
        row = format.payload_bytes(hidden) if options.separate_scales else format.row_bytes(hidden)
        render = render_payload if options.separate_scales or not format.block else render_packed
        entry = self.top_k * ENTRY_BYTES
        parts.buffer("tokens", self.tokens * row, RowBuffer(self._rows(own), render, row), given=True)
        choices = RowBuffer(self._rows(own), render_entries, entry)
        parts.buffer("choices", self.tokens * entry, choices, given=True)
        if options.separate_scales:
            scale = format.scale_bytes(hidden)
            parts.buffer("scales", self.tokens * scale, RowBuffer(self._rows(own), render_scales, scale), given=True)
        stored, slots, names = own, self.top_k, {"": "tokens", "_meta": "choices", "_scales": "scales"}
        for hop in self.hops:
            suffix = f"_{hop.name}" if hop.name else ""
            if options.exchange_counts:
                self._counts(hop, suffix)
            carried = hop.sent(0).slots.shape[1]
            comm = parts.comm.setdefault(hop.name or "flat", [])
            names = {kind: self._hop_out(hop, stored, source, kind, suffix, (slots, carried), comm)
                     for kind, source in names.items() if kind != "_scales" or options.separate_scales}  # fmt: skip
            stored, slots = hop.received, carried
        self._expert(names, slots, "")
        self._home("", "partial", "combine")

    def _counts(self, hop: Hop, suffix: str) -> None:
        """Add the exchange of counts, and their copy to the host."""
        parts, placement = self.parts, self.layer.placement
        last = hop is self.hops[-1]
        own_experts = int(np.bincount(self.layer.groups[0].hosts).max()) if last else 0
        row_bytes = 4 * (2 + own_experts)
        nbytes = row_bytes * hop.groups.shape[1]
        sent, received = f"counts{suffix}", f"counts{suffix}_in"

        @lru_cache(maxsize=_CACHED_RANKS)
        def table(rank: int, mine: bool) -> NDArray[np.int32]:
            where = np.argwhere(hop.groups == rank)[0]
            peers, rows = hop.groups[where[0]], hop.rows[where[0]]
            out = np.zeros((len(peers), 2 + own_experts), np.int32)
            out[:, 1] = rows[where[1]] if mine else rows[:, where[1]]
            for p, peer in enumerate(peers.tolist() if last else []):
                source, target = (rank, peer) if mine else (peer, rank)
                out[p, 2:] = self._expert_counts(hop, source, target, own_experts)
            return out

        parts.buffer(sent, nbytes, given=True)
        parts.buffer(received, nbytes)
        parts.count_buffers[sent] = CountBuffer(lambda rank: table(rank, True))
        parts.count_buffers[received] = CountBuffer(lambda rank: table(rank, False))
        assert placement.members >= hop.groups.shape[1]
        parts.add(parts.outward, Collective(
            f"counts{suffix}", Op.ALL_TO_ALL, hop.groups, row_bytes, read=sent, write=received))  # fmt: skip
        parts.add(parts.outward, RowWork(
            label=f"splits{suffix}", kernel=RowKernel.TO_HOST, read=received, write=received, read_row=row_bytes,
            read_extent=nbytes))  # fmt: skip

    def _expert_counts(self, hop: Hop, source: int, target: int, number: int) -> NDArray[np.int32]:
        """Rows that each expert of `target` gets from `source`, shape (number,)."""
        g, member = self.layer.placement.group_and_member(target)
        first = int(np.flatnonzero(self.layer.groups[g].hosts == member).min(initial=1 << 30))
        rows = hop.received(target)
        mine = rows.take(_from(hop, source, target))
        _, _, choices = self._named(mine, target)
        carried = np.take_along_axis(choices, np.maximum(mine.slots, 0), axis=1)[mine.slots >= 0]
        return np.bincount(carried - first, minlength=number).astype(np.int32)

    def _hop_out(
        self,
        hop: Hop,
        stored: Callable[[int], RowSet],
        source: str,
        kind: str,
        suffix: str,
        slots: tuple[int, int],
        comm: list[str],
    ) -> str:
        """Pack and send one kind of rows (payload, ``_meta`` or ``_scales``); return the name of the receive buffer."""
        parts, before = self.parts, self.parts.row_buffers[source]
        meta = kind == "_meta"
        row = slots[1] * ENTRY_BYTES if meta else before.row_bytes
        packed, received = f"packed{suffix}{kind}", f"received{suffix}{kind}"
        most_out, most_in = _most(hop)
        parts.buffer(
            packed, most_out * row, RowBuffer(self._rows(hop.sent), before.render, row, backward=before.backward)
        )
        parts.buffer(
            received, most_in * row, RowBuffer(self._rows(hop.received), before.render, row, backward=before.backward)
        )

        def plan(rank: int) -> RowPlan:
            sent, own = hop.sent(rank), stored(rank)
            where = positions(sent, own, self.tokens)
            return RowPlan(_entry_positions(sent, own, where) if meta else where)

        unit = ENTRY_BYTES if meta else row
        parts.add(parts.outward, RowWork(
            label=f"pack{suffix}{kind}", kernel=RowKernel.TAKE, read=source, write=packed, read_row=unit,
            write_row=unit, read_extent=parts.buffers[source], write_extent=most_out * row, plan=plan))  # fmt: skip
        label = f"dispatch{suffix}{kind}"
        parts.add(parts.outward, AllToAllV(label, hop.groups, hop.rows, row, packed, received))
        if not meta:
            comm.append(label)
        return received

    # The experts.

    def _expert(self, names: dict[str, str], slots: int, backward: str) -> None:
        """Add two phases: sort rows by expert and scale them, then sum each row's experts by weight."""
        parts, options, last = self.parts, self.options, self.hops[-1]
        format = _BF16 if backward else options.format
        most_in = _most(last)[1]
        computed = max(int(group.selection_rows.sum(axis=0).max()) for group in self.layer.groups)
        experts, partial = f"experts{backward}", f"partial{backward}"
        grads = bool(backward)
        parts.buffer(
            experts, computed * self.wide, RowBuffer(self._sorted_rows, render_bfloat16, self.wide, backward=grads)
        )
        parts.buffer(partial, most_in * self.wide, RowBuffer(
            self._rows(last.received), render_bfloat16, self.wide, self._allowed(1), grads))  # fmt: skip

        def sort_plan(rank: int) -> RowPlan:
            rows, order, experts_n = self._sorting(rank)
            return RowPlan(order // rows.slots.shape[1], self.exponents[experts_n])

        def reduce_plan(rank: int) -> RowPlan:
            rows, order, _ = self._sorting(rank)
            index = np.full(rows.slots.size, -1, np.int64)
            index[order] = np.arange(len(order))
            return RowPlan(index.reshape(rows.slots.shape))

        source = names[""]
        scales = names.get("_scales", "")
        parts.add(parts.outward, RowWork(
            label=f"expert{backward}", kernel=RowKernel.SCALE, read=source, write=experts,
            read_row=parts.row_buffers[source].row_bytes, write_row=self.wide, read_extent=parts.buffers[source],
            write_extent=computed * self.wide, plan=sort_plan, format=format, hidden=options.hidden, scales=scales,
            scales_extent=parts.buffers.get(scales, 0)))  # fmt: skip
        parts.add(parts.outward, RowWork(
            label=f"expert_reduce{backward}", kernel=RowKernel.SUM, read=experts, write=partial, read_row=self.wide,
            write_row=self.wide, read_extent=computed * self.wide, write_extent=most_in * self.wide,
            plan=reduce_plan, weights=names["_meta"], weights_extent=most_in * slots * ENTRY_BYTES))  # fmt: skip

    def _sorting(self, rank: int) -> tuple[RowSet, Ints, Ints]:
        """Received rows, the flat indices of their slots in the order of experts, and these experts."""
        rows = self.hops[-1].received(rank)
        _, _, choices = self._named(rows, rank)
        carried = np.where(rows.slots < 0, -1, np.take_along_axis(choices, np.maximum(rows.slots, 0), axis=1)).ravel()
        there = np.flatnonzero(carried >= 0)
        order = there[np.argsort(carried[there], kind="stable")]
        return rows, order, carried[order]

    # The way back.

    def _home(self, backward: str, source: str, verb: str) -> None:
        """Send partial sums back along the route of the rows, and add them up at the end of every hop."""
        parts = self.parts
        for i in range(len(self.hops) - 1, -1, -1):
            hop = self.hops[i]
            suffix = (f"_{hop.name}" if hop.name else "") + backward
            stored = self.hops[i - 1].received if i else self.layer.own
            most_back = _most(hop)[0]
            most_stored = _most(self.hops[i - 1])[1] if i else self.tokens
            returned, target = f"returned{suffix}", f"summed{suffix}" if i else f"out{backward}"
            done, grads = len(self.hops) - i, bool(backward)
            parts.buffer(returned, most_back * self.wide, RowBuffer(
                self._rows(hop.sent), render_bfloat16, self.wide, self._allowed(done), grads))  # fmt: skip
            parts.buffer(target, most_stored * self.wide, RowBuffer(
                self._rows(stored), render_bfloat16, self.wide, self._allowed(done + 1), grads))  # fmt: skip
            label = f"{verb}{suffix}"
            parts.add(parts.homeward, AllToAllV(
                label, hop.groups, hop.rows.transpose(0, 2, 1), self.wide, source, returned))  # fmt: skip
            if not backward:
                parts.comm[hop.name or "flat"].append(label)
            parts.add(parts.homeward, RowWork(
                label=f"unpack{suffix}", kernel=RowKernel.SUM, read=returned, write=target, read_row=self.wide,
                write_row=self.wide, read_extent=most_back * self.wide, write_extent=most_stored * self.wide,
                plan=self._gathering(hop, stored)))  # fmt: skip
            source = target

    def _gathering(self, hop: Hop, stored: Callable[[int], RowSet]) -> Callable[[int], RowPlan]:
        return lambda rank: RowPlan(all_positions(stored(rank), hop.sent(rank), self.tokens, hop.fan_out))

    def _backward(self) -> None:
        """Add the backward counterparts: gradients leave in a reversed combine and return in a reversed dispatch."""
        parts = self.parts
        own: Callable[[int], RowSet] = self.layer.own
        parts.buffer("grad", self.tokens * self.wide,
                     RowBuffer(self._rows_plain(own), render_bfloat16, self.wide, backward=True),
                     given=True)  # fmt: skip
        source, stored = "grad", own
        for hop in self.hops:
            suffix = (f"_{hop.name}" if hop.name else "") + "_bwd"
            packed, received = f"packed{suffix}", f"received{suffix}"
            most_out, most_in = _most(hop)
            for name, most, rows in ((packed, most_out, hop.sent), (received, most_in, hop.received)):
                parts.buffer(
                    name,
                    most * self.wide,
                    RowBuffer(self._rows_plain(rows), render_bfloat16, self.wide, backward=True),
                )
            plan = self._picking(hop, stored)
            parts.add(parts.outward, RowWork(
                label=f"pack{suffix}", kernel=RowKernel.TAKE, read=source, write=packed, read_row=self.wide,
                write_row=self.wide, read_extent=parts.buffers[source], write_extent=most_out * self.wide,
                plan=plan))  # fmt: skip
            parts.add(parts.outward, AllToAllV(
                f"combine{suffix}", hop.groups, hop.rows, self.wide, packed, received))  # fmt: skip
            source, stored = received, hop.received
        meta = f"received{f'_{self.hops[-1].name}' if self.hops[-1].name else ''}_meta"
        self._expert({"": source, "_meta": meta}, self.hops[-1].sent(0).slots.shape[1], "_bwd")
        self._home("_bwd", "partial_bwd", "dispatch")

    def _picking(self, hop: Hop, stored: Callable[[int], RowSet]) -> Callable[[int], RowPlan]:
        return lambda rank: RowPlan(positions(hop.sent(rank), stored(rank), self.tokens))

    def _rows_plain(self, of: Callable[[int], RowSet]) -> Callable[[int], ExpectedRows]:
        """Rows that no factor applies to."""

        def rows(rank: int) -> ExpectedRows:
            return ExpectedRows(*self._named(of(rank), rank))

        return rows


def _cached(hop: Hop) -> Hop:
    """The same hop, with the rows of recent ranks cached."""
    remember = lru_cache(maxsize=_CACHED_RANKS)
    return Hop(hop.name, hop.groups, hop.rows, remember(hop.sent), remember(hop.received), hop.fan_out)


def _most(hop: Hop) -> tuple[int, int]:
    """The largest number of rows that any rank sends, and receives."""
    return int(hop.rows.sum(axis=2).max()), int(hop.rows.sum(axis=1).max())


def _from(hop: Hop, source: int, target: int) -> NDArray[np.bool_]:
    """A mask over the rows that `target` receives: whether each came from `source`."""
    (g, me), (_, peer) = np.argwhere(hop.groups == target)[0], np.argwhere(hop.groups == source)[0]
    counts = hop.rows[g, :, me]
    return np.repeat(np.arange(len(counts)) == peer, counts)


def _entry_positions(sent: RowSet, own: RowSet, where: Ints) -> Ints:
    """The flat index among the stored entries of each entry sent, shape (n x S,); -1 for none."""
    if not len(own):  # only padding is sent
        return np.full(sent.slots.size, -1, np.int64)
    width = own.slots.shape[1]
    matches = own.slots[where][:, None, :] == sent.slots[:, :, None]
    index = where[:, None] * width + matches.argmax(axis=2)
    return np.asarray(np.where(sent.slots < 0, -1, index), np.int64).ravel()


def build_layer_schedule(layer: LayerRows, hops: list[Hop], routing: Routing, options: LayerOptions) -> Schedule:
    """The schedule of one layer over `hops`.

    Raises:
        Unable: if any rank has more rows than an int32 can count.
    """
    for hop in hops:
        refuse_too_many_rows(hop.rows)
    return _Builder(layer, hops, routing, options).build()
