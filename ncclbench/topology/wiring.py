"""NICs, leaves, the links from leaves to spines, and the rate of each.

NCCL does not detect the fabric above the NIC, so all of this comes from a topology file, or is unknown. A link from
a leaf to a spine has the rate of the slower of the leaf's uplink and the spine's port.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ncclbench.units import Int64

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

UNKNOWN = -1


class WiringRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A `Wiring` as a manifest stores it; what is not known is null.

    Attributes:
        devices: the NIC of each rank by name, "" where unknown.
        nic_gbit_per_s: what each rank's NIC carries in one direction.
        leaves: the leaf of each rank's NIC.
        leaf_names: a name for each leaf.
        uplinks: how many links go up from each leaf.
        uplink_gbit_per_s: what each leaf can send up, over all its spines.
        domain_gbit_per_s: what each rank can send inside its NVLink domain.
    """

    devices: list[str] = []
    nic_gbit_per_s: list[float | None] = []
    leaves: list[Int64 | None] = []
    leaf_names: list[str] = []
    uplinks: list[Int64] = []
    uplink_gbit_per_s: list[float | None] = []
    domain_gbit_per_s: list[float | None] = []


@dataclass(frozen=True, eq=False, kw_only=True)
class Wiring:
    """How the R ranks of a topology are wired to L leaves.

    Attributes:
        devices: the NIC of each rank by name, shape (R,); its planes are joined by a comma, "" where unknown.
        nic_gbit_per_s: what each rank's NIC carries in one direction, over all planes, shape (R,); NaN if unknown.
        leaves: the leaf of each rank's NIC (of its first plane), shape (R,); -1 if unknown.
        leaf_names: a name for each leaf index.
        uplinks: how many links go up from each leaf, shape (L,).
        uplink_gbit_per_s: what each leaf can send up, over all its spines, shape (L,); NaN if unknown.
        domain_gbit_per_s: what each rank can send inside its NVLink domain, shape (R,); NaN if unknown.
    """

    devices: tuple[str, ...]
    nic_gbit_per_s: Floats
    leaves: Ints
    leaf_names: tuple[str, ...]
    uplinks: Ints
    uplink_gbit_per_s: Floats
    domain_gbit_per_s: Floats

    def __post_init__(self) -> None:
        """Freeze the arrays."""
        for name in ("leaves", "uplinks"):
            object.__setattr__(self, name, _frozen_ints(getattr(self, name)))
        for name in ("nic_gbit_per_s", "uplink_gbit_per_s", "domain_gbit_per_s"):
            object.__setattr__(self, name, _frozen_floats(getattr(self, name)))

    def as_record(self) -> WiringRecord:
        """The form that a manifest stores."""
        return WiringRecord(
            devices=list(self.devices),
            nic_gbit_per_s=_nullable(self.nic_gbit_per_s),
            leaves=[None if leaf == UNKNOWN else leaf for leaf in self.leaves.tolist()],
            leaf_names=list(self.leaf_names),
            uplinks=self.uplinks.tolist(),
            uplink_gbit_per_s=_nullable(self.uplink_gbit_per_s),
            domain_gbit_per_s=_nullable(self.domain_gbit_per_s),
        )

    @classmethod
    def from_record(cls, record: WiringRecord, world_size: int) -> "Wiring":
        """The inverse of `as_record`; a column that is missing or of another length is unknown."""
        leaves = [UNKNOWN if leaf is None else leaf for leaf in record.leaves]
        names = list(record.leaf_names)
        possible = max(leaves, default=UNKNOWN) < max(world_size, len(names))
        leaves = leaves if possible and len(leaves) == world_size else [UNKNOWN] * world_size
        names += [f"leaf {index}" for index in range(len(names), max(leaves, default=UNKNOWN) + 1)]
        count = len(names)
        return cls(
            devices=tuple(record.devices if len(record.devices) == world_size else [""] * world_size),
            nic_gbit_per_s=_rates(record.nic_gbit_per_s, world_size),
            leaves=np.array(leaves, np.int64),
            leaf_names=tuple(names),
            uplinks=np.array(record.uplinks if len(record.uplinks) == count else [0] * count, np.int64),
            uplink_gbit_per_s=_rates(record.uplink_gbit_per_s, count),
            domain_gbit_per_s=_rates(record.domain_gbit_per_s, world_size),
        )


def _frozen_ints(values: ArrayLike) -> Ints:
    array = np.array(values, dtype=np.int64)
    array.setflags(write=False)
    return array


def _frozen_floats(values: ArrayLike) -> Floats:
    array = np.array(values, dtype=np.float64)
    array.setflags(write=False)
    return array


def _nullable(values: Floats) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]


def _rates(values: Sequence[float | None], count: int) -> Floats:
    known = [np.nan if value is None else value for value in values]
    return np.array(known if len(known) == count else [np.nan] * count, np.float64)
