"""A schedule: the phases of a case, the buffers they use, and what its size and rate mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ncclbench.schedule.dtypes import Dtype
from ncclbench.schedule.expected_contents import Contents
from ncclbench.schedule.phases import (
    AllToAllV,
    Collective,
    Exchange,
    Ints,
    Kernel,
    Local,
    Phase,
    SimplePhase,
    flatten,
    frozen_ints,
)
from ncclbench.schedule.row_work import RowKernel, RowWork


@dataclass(frozen=True)
class ForeignRate:
    """A rate as another program defines it, to be read beside that program's and never as our own.

    Attributes:
        nbytes: what it divides.
        over: label of the phase or name of the subtotal whose time it divides by.
        definition: in words.
    """

    nbytes: int
    over: str
    definition: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Schedule:
    """Who sends what to whom, in which phases; made by a pattern, used by transports, ledger and oracle alike.

    Attributes:
        world_size: R.
        dtype: element type of every buffer.
        buffers: bytes of each buffer on every rank; a multiple of the element size.
        inputs: the buffers that are filled before the first phase; the others start as canaries.
        phases: run in order.
        op: the name whose bus-bandwidth factor applies (see `rates`), or None where there is no single rate.
        size_bytes: S, the bytes that rates are computed from: the whole buffer, as nccl-tests counts it.
        count: elements a rank contributes, the `count` column.
        groups: shape (G, N), the groups that the rates are reported for; one group of all ranks by default.
        redop: the reduction for the `redop` column, or None.
        root: the root's position in its group for the `root` column, or None.
        aligned: flows leave by the NIC of the receiver's rail (NCCL's PXN, or its choice of NIC), not the sender's.
        contents: what buffers hold before and after, where the phases themselves do not say it (work on rows).
        subtotals: times to report besides the phases': a name, and the labels whose durations are added up.
        ratios: medians to divide, by the labels of phases or names of subtotals that any variant has.
        facts: plain data about this schedule for the record.
        comparable: figures as other programs define them, for the record, under names that say so.
        fingerprint: of whatever was drawn at random; ranks compare theirs before they start.
    """

    world_size: int
    dtype: Dtype
    buffers: Mapping[str, int]
    inputs: tuple[str, ...]
    phases: tuple[Phase, ...]
    op: str | None
    size_bytes: int
    count: int
    groups: Ints | None = None
    redop: str | None = None
    root: int | None = None
    aligned: bool = False
    contents: Contents | None = None
    subtotals: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ratios: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    comparable: Mapping[str, ForeignRate] = field(default_factory=dict)
    fingerprint: str = ""

    def __post_init__(self) -> None:
        """Refuse phases that leave their buffers, name ranks or buffers that do not exist, or share a label."""
        if not self.phases:
            raise ValueError("a schedule needs at least one phase")
        if self.groups is not None:
            object.__setattr__(self, "groups", frozen_ints(self.groups, 2, "groups"))
        labels = [phase.label for phase in self.phases]
        if len(set(labels)) != len(labels):
            raise ValueError(f"phase labels must differ: {labels}")
        for name, nbytes in self.buffers.items():
            if nbytes < 1 or nbytes % self.dtype.itemsize:
                raise ValueError(f"buffer {name!r}: {nbytes} bytes is not a positive multiple of {self.dtype.name}")
        if not set(self.inputs) <= set(self.buffers):
            raise ValueError(f"inputs {self.inputs} are not among the buffers {tuple(self.buffers)}")
        for phase in flatten(self.phases):
            self._check_phase(phase)

    def _check_phase(self, phase: SimplePhase) -> None:
        for name, needed in zip((phase.read, phase.write), extents(phase, self.dtype.itemsize), strict=True):
            if name not in self.buffers:
                raise ValueError(f"{phase.label}: no buffer {name!r}; there are: {', '.join(self.buffers)}")
            if needed > self.buffers[name]:
                raise ValueError(f"{phase.label}: needs {needed} bytes of {name!r}, which has {self.buffers[name]}")
        for name, needed in phase.extra if isinstance(phase, RowWork) else ():
            if needed > self.buffers.get(name, 0):
                raise ValueError(f"{phase.label}: needs {needed} bytes of {name!r}")
        if highest_rank(phase) >= self.world_size:
            raise ValueError(f"{phase.label}: rank {highest_rank(phase)} of a world of {self.world_size}")
        if isinstance(phase, Local) and phase.kernel is Kernel.GATHER_ROWS and len(phase.rows) != self.world_size:
            raise ValueError(f"{phase.label}: gather_rows needs the rows of all {self.world_size} ranks")

    @cached_property
    def waits_for_host(self) -> bool:
        """Whether the host must see results in the middle of an iteration, so that no queue or graph can hold it."""
        return any(isinstance(step, RowWork) and step.kernel is RowKernel.TO_HOST for step in flatten(self.phases))

    @property
    def memory_bytes(self) -> int:
        """Bytes of buffers on every rank."""
        return sum(self.buffers.values())

    @cached_property
    def rate_groups(self) -> Ints:
        """The groups that rates are reported for, shape (G, N)."""
        if self.groups is not None:
            return self.groups
        return frozen_ints(np.arange(self.world_size)[None], 2, "groups")


def shared_buffers(variants: Sequence[Schedule]) -> Mapping[str, int]:
    """Bytes of each buffer that all variants of a case can run on, one after the other.

    Raises:
        ValueError: if they could not share buffers: other inputs, another element type or another world.
    """
    first = variants[0]
    for variant in variants[1:]:
        if (variant.inputs, variant.dtype, variant.world_size) != (first.inputs, first.dtype, first.world_size):
            raise ValueError("the variants of a case must have the same inputs, element type and world size")
    names = dict.fromkeys(name for variant in variants for name in variant.buffers)
    return {name: max(variant.buffers.get(name, 0) for variant in variants) for name in names}


def highest_rank(phase: SimplePhase) -> int:
    """The largest rank that a phase names; -1 for a local one."""
    if isinstance(phase, Exchange):
        return int(max(phase.src.max(), phase.dst.max()))
    return -1 if isinstance(phase, Local | RowWork) else int(phase.groups.max())


def extents(phase: SimplePhase, itemsize: int) -> tuple[int, int]:
    """Bytes of the read and of the write buffer that a phase touches, on the rank that touches most."""
    if isinstance(phase, Exchange):
        sent, received = phase.send_offset + phase.nbytes, phase.recv_offset + phase.nbytes
        if np.any((phase.send_offset | phase.recv_offset | phase.nbytes) % itemsize):
            raise ValueError(f"{phase.label}: flows must start and end on whole elements of {itemsize} bytes")
        return int(sent.max()), int(received.max())
    if isinstance(phase, AllToAllV):
        if phase.row_bytes % itemsize:
            raise ValueError(f"{phase.label}: a row of {phase.row_bytes} bytes is not whole elements")
        return (
            int(phase.rows.sum(axis=2).max()) * phase.row_bytes,
            int(phase.rows.sum(axis=1).max()) * phase.row_bytes,
        )
    if isinstance(phase, RowWork):
        return phase.read_extent, phase.write_extent
    assert isinstance(phase, Collective | Local)
    return phase.read_count * itemsize, phase.write_count * itemsize
