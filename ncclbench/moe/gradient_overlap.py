"""An expert all-to-all beside the reduction of data-parallel gradients: each alone, then both at the same time.

In the backward pass of a layer both use the same links. Three schedules take turns:

- the experts' dispatch and combine alone;
- a reduce-scatter of gradients and the all-gather of its result alone;
- the two as branches on communicators of their own.

The slowdown of a branch is its time beside the other branch over its time alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ncclbench.schedule.counter_rng import below, bits, key_of
from ncclbench.schedule.dtypes import DTYPES
from ncclbench.schedule.expected_contents import Contents, ExpectedBytes
from ncclbench.schedule.phases import AllToAllV, Collective, Concurrent, Ints, Op, Phase
from ncclbench.schedule.schedule import Schedule

_PERIOD = 65521
_LARGEST = 7
_STREAM_GRADIENTS = 20
_CHUNK_PERIODS = 16
EXPERTS, GRADIENTS, BOTH = "experts", "data_parallel", "both"
_FLOAT = DTYPES["float32"]


@dataclass(frozen=True, eq=False)
class GradientContents:
    """The contents of the gradients' buffers, and of the experts' buffers beside them; implements `Contents`.

    Attributes:
        rows: the contents of the experts' buffers, or None if their all-to-alls do not run.
        given: the contents of the experts' buffers before anything has run.
        reduced: whether the gradients are reduced in this schedule.
        groups: ranks that reduce together, shape (G, N).
        count: elements of a shard.
    """

    rows: Contents | None
    given: Contents
    reduced: bool
    groups: Ints
    count: int

    def before(self, rank: int, buffer: str, salt: int) -> Iterator[ExpectedBytes]:
        """The contents of an input."""
        if buffer == "grads":
            yield from _repeated(_gradients(rank, salt), 0, self.groups.shape[1] * self.count)
        else:
            yield from self.given.before(rank, buffer, salt)

    def after(self, rank: int, buffer: str, salt: int) -> Iterator[ExpectedBytes]:
        """Inputs are unchanged; shards are sums over the group."""
        if buffer in ("grads", "packed", "partial"):
            yield from self.before(rank, buffer, salt)
        elif buffer in ("shard", "gathered"):
            yield from self._sums(rank, buffer, salt) if self.reduced else ()
        elif self.rows is not None:
            yield from self.rows.after(rank, buffer, salt)

    def _sums(self, rank: int, buffer: str, salt: int) -> Iterator[ExpectedBytes]:
        g, member = (int(x) for x in np.argwhere(self.groups == rank)[0])
        total = np.zeros(_PERIOD, np.float32)
        for other in self.groups[g]:
            total += _gradients(int(other), salt)
        if buffer == "shard":
            yield from _repeated(total, member * self.count, self.count)
        else:
            yield from _repeated(total, 0, self.groups.shape[1] * self.count)

    @property
    def tolerance(self) -> float:
        """Zero: sums of small whole numbers are exact."""
        return 0.0

    @property
    def tolerance_reason(self) -> str | None:
        """None, since the tolerance is zero."""
        return None


def _gradients(rank: int, salt: int) -> NDArray[np.float32]:
    """One period of the gradients of a rank, shape (P,)."""
    return below(bits(key_of(salt, _STREAM_GRADIENTS, rank), np.arange(_PERIOD)), _LARGEST + 1).astype(np.float32)


def _repeated(period: NDArray[np.float32], first: int, count: int) -> Iterator[ExpectedBytes]:
    """`count` elements of the repeated period, from element `first` on, in chunks."""
    turned = np.tile(np.roll(period, -(first % _PERIOD)), _CHUNK_PERIODS).view(np.uint32)
    for start in range(0, count, len(turned)):
        yield ExpectedBytes(start * 4, turned[: min(len(turned), count - start)])


def overlap_schedules(bare: Schedule, groups: Ints, nbytes: int) -> list[Schedule]:
    """The three schedules that take turns.

    Args:
        bare: the experts' two all-to-alls, from `build_split_control`.
        groups: ranks that reduce gradients together, shape (G, N).
        nbytes: bytes of gradients per rank, at least one float32 per member.
    """
    assert bare.contents is not None
    members, count = groups.shape[1], nbytes // (_FLOAT.itemsize * groups.shape[1])
    experts = tuple(phase for phase in bare.phases if isinstance(phase, AllToAllV))
    gradients = (
        Collective("reduce_scatter", Op.REDUCE_SCATTER, groups, count, read="grads", write="shard"),
        Collective("all_gather", Op.ALL_GATHER, groups, count, read="shard", write="gathered"),
    )
    whole = count * members * _FLOAT.itemsize
    buffers = {**bare.buffers, "grads": whole, "shard": count * _FLOAT.itemsize, "gathered": whole}
    phases: dict[str, Phase] = {
        EXPERTS: Concurrent(EXPERTS, (experts,)),
        GRADIENTS: Concurrent(GRADIENTS, (gradients,)),
        BOTH: Concurrent(BOTH, (experts, gradients), names=(EXPERTS, GRADIENTS)),
    }
    return [
        replace(
            bare,
            dtype=_FLOAT,
            buffers=buffers,
            inputs=(*bare.inputs, "grads"),
            phases=(phase,),
            facts=bare.facts if name == EXPERTS else {},
            contents=GradientContents(
                bare.contents if name != GRADIENTS else None, bare.contents, name != EXPERTS, groups, count
            ),
            subtotals={f"{BOTH}.{part}": (f"{BOTH}.{part}",) for part in (EXPERTS, GRADIENTS)},
            ratios={f"slowdown_{part}": (f"{BOTH}.{part}", part) for part in (EXPERTS, GRADIENTS)},
        )
        for name, phase in phases.items()
    ]
