"""Room for buffers on GPUs: over how many sets of them each case of a plan can rotate; the same on all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ncclbench.buffers import (
    WARM,
    Cache,
    Kind,
    Rotation,
    free_device_memory,
    l2_bytes,
    room_for_one,
    rotation,
)
from ncclbench.nccl_memory import widened
from ncclbench.transports.base import Transport


@dataclass(frozen=True)
class Demand:
    """What a case asks of memory.

    Attributes:
        sizes: bytes of each buffer of one set.
        variants: schedules that share them.
        kind: whose memory it is to be.
        cache: whether sets are to be rotated over.
    """

    sizes: tuple[int, ...]
    variants: int
    kind: Kind
    cache: Cache

    @property
    def nbytes(self) -> int:
        """Of one set."""
        return sum(self.sizes)


class Planned(NamedTuple):
    """The rotation of each case, and the blocks that serve all those with memory from ncclMemAlloc."""

    each: list[Rotation]
    blocks: list[int]


def kept_blocks(demands: Sequence[Demand]) -> list[int]:
    """Blocks from ncclMemAlloc that one set of each case needs; they are kept from case to case."""
    blocks: list[int] = []
    for one in demands:
        if one.kind == "nccl":
            blocks = widened(blocks, one.sizes)
    return blocks


def rotations(demands: Sequence[Demand], room: int, l2: int) -> Planned:
    """Rotate where several sets fit into `room` bytes; where only one does, the case is warm.

    Memory from ncclMemAlloc is kept, so what all cases of it need must fit beside any other case.
    """
    each, blocks = [WARM] * len(demands), kept_blocks(demands)
    others = max((one.nbytes for one in demands if one.kind != "nccl"), default=0)
    for k in sorted(range(len(demands)), key=lambda k: demands[k].kind != "nccl"):
        one = demands[k]
        wanted = rotation(one.nbytes, l2, one.cache, one.variants)
        grown = widened(blocks, one.sizes * wanted.copies) if one.kind == "nccl" else blocks
        beside = others if one.kind == "nccl" else wanted.copies * one.nbytes
        if wanted.copies == 1 or sum(grown) + beside <= room:
            each[k], blocks = wanted, grown
    return Planned(each, blocks)


def agreed_room(transport: Transport, room: int | None = None) -> tuple[int, int]:
    """Bytes of buffers that every rank can have, `room` on this one or what its GPU has left, and the largest L2.

    All ranks call it.
    """
    if room is None:
        room = room_for_one([(getattr(transport, "ranks_per_gpu", 1), free_device_memory(), "a GPU")])
    least = transport.control.all_gather(np.array([room, -l2_bytes()], np.int64)).min(axis=0)
    return int(least[0]), -int(least[1])
