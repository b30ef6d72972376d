"""A schedule: the phases of a case, their buffers, and the meaning of its size and rate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import assert_never

import numpy as np

from ncclbench.schedule.case import JsonValue
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
    """A rate as another program defines it, to be compared with the output of that program only.

    Attributes:
        nbytes: the numerator.
        over: label of the phase, or name of the subtotal, whose time is the denominator.
        definition: definition in words.
    """

    nbytes: int
    over: str
    definition: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Schedule:
    """The phases of a case, from which transports, ledger and oracle work; a pattern makes it.

    Attributes:
        world_size: R.
        dtype: element type of every buffer.
        buffers: bytes of each buffer on every rank; a multiple of the element size.
        inputs: the buffers that are filled before the first phase; the others start as canaries.
        phases: the phases, in order.
        op: the name whose bus-bandwidth factor applies (see `rates`), or None if there is no single rate.
        size_bytes: S, the bytes that rates are computed from: the whole buffer, as nccl-tests counts it.
        count: elements that a rank contributes, for the `count` column.
        groups: shape (G, N), the groups that rates are reported for; one group of all ranks by default.
        redop: the reduction for the `redop` column, or None.
        root: the root's position in its group for the `root` column, or None.
        aligned: flows leave by the NIC of the receiver's rail (NCCL's PXN, or its choice of NIC), not the sender's.
        contents: the expected contents of the buffers, if they do not follow from the phases (work on rows).
        subtotals: times to report besides those of phases: a name, and the labels whose durations are added up.
        ratios: medians to divide, by labels of phases or names of subtotals that any variant has.
        facts: further data about this schedule for the record.
        comparable: rates as other programs define them, for the record.
        fingerprint: hash of everything that was sampled; ranks compare theirs before they start.
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
    facts: Mapping[str, JsonValue] = field(default_factory=dict)
    comparable: Mapping[str, ForeignRate] = field(default_factory=dict)
    fingerprint: str = ""

    def __post_init__(self) -> None:
        """Refuse phases that exceed their buffers, name ranks or buffers that do not exist, or share a label."""
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
        self._check_extents(phase)
        match phase:
            case Collective() | AllToAllV():
                self._check_ranks(phase.label, int(phase.groups.max()))
            case Exchange():
                self._check_ranks(phase.label, int(max(phase.src.max(), phase.dst.max())))
            case Local():
                if phase.kernel is Kernel.GATHER_ROWS and len(phase.rows) != self.world_size:
                    raise ValueError(f"{phase.label}: gather_rows needs the rows of all {self.world_size} ranks")
            case RowWork():
                for name, needed in phase.extra:
                    if needed > self.buffers.get(name, 0):
                        raise ValueError(f"{phase.label}: needs {needed} bytes of {name!r}")
            case _:
                assert_never(phase)

    def _check_extents(self, phase: SimplePhase) -> None:
        for name, needed in zip((phase.read, phase.write), extents(phase, self.dtype.itemsize), strict=True):
            if name not in self.buffers:
                raise ValueError(f"{phase.label}: no buffer {name!r}; there are: {', '.join(self.buffers)}")
            if needed > self.buffers[name]:
                raise ValueError(f"{phase.label}: needs {needed} bytes of {name!r}, which has {self.buffers[name]}")

    def _check_ranks(self, label: str, highest: int) -> None:
        if highest >= self.world_size:
            raise ValueError(f"{label}: rank {highest} of a world of {self.world_size}")

    @cached_property
    def waits_for_host(self) -> bool:
        """Whether the host needs results in the middle of an iteration, so that it cannot be queued or captured."""
        row_works = [step for step in flatten(self.phases) if isinstance(step, RowWork)]
        return any(work.kernel is RowKernel.TO_HOST for work in row_works)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all buffers on every rank."""
        return sum(self.buffers.values())

    @cached_property
    def rate_groups(self) -> Ints:
        """The groups that rates are reported for, shape (G, N)."""
        if self.groups is not None:
            return self.groups
        return frozen_ints(np.arange(self.world_size)[None], 2, "groups")


def shared_buffers(variants: Sequence[Schedule]) -> Mapping[str, int]:
    """Bytes of each buffer such that all variants of a case can use it, one after the other.

    Raises:
        ValueError: if the variants differ in inputs, element type or world size.
    """
    first = variants[0]
    for variant in variants[1:]:
        if (variant.inputs, variant.dtype, variant.world_size) != (first.inputs, first.dtype, first.world_size):
            raise ValueError("the variants of a case must have the same inputs, element type and world size")
    names = dict.fromkeys(name for variant in variants for name in variant.buffers)
    return {name: max(variant.buffers.get(name, 0) for variant in variants) for name in names}


def extents(phase: SimplePhase, itemsize: int) -> tuple[int, int]:
    """Bytes of the read and of the write buffer that a phase uses, on the rank that uses most.

    Raises:
        ValueError: if flows or rows are not whole elements of `itemsize` bytes.
    """
    match phase:
        case Collective() | Local():
            return phase.read_count * itemsize, phase.write_count * itemsize
        case AllToAllV():
            if phase.row_bytes % itemsize:
                raise ValueError(f"{phase.label}: a row of {phase.row_bytes} bytes is not whole elements")
            sent_GN, received_GN = phase.rows.sum(axis=2), phase.rows.sum(axis=1)
            return int(sent_GN.max()) * phase.row_bytes, int(received_GN.max()) * phase.row_bytes
        case Exchange():
            if np.any((phase.send_offset | phase.recv_offset | phase.nbytes) % itemsize):
                raise ValueError(f"{phase.label}: flows must start and end on whole elements of {itemsize} bytes")
            return int((phase.send_offset + phase.nbytes).max()), int((phase.recv_offset + phase.nbytes).max())
        case RowWork():
            return phase.read_extent, phase.write_extent
        case _:
            assert_never(phase)
