"""NICs, leaves, the links from leaves to spines, and the rate of each.

NCCL does not detect the fabric above the NIC, so all of this comes from a topology file, or is unknown. A link from
a leaf to a spine has the rate of the slower of the leaf's uplink and the spine's port.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

UNKNOWN = -1


def _frozen(values: ArrayLike, kind: type[np.int64] | type[np.float64]) -> NDArray[Any]:
    array = np.array(values, dtype=kind)
    array.setflags(write=False)
    return array


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
            object.__setattr__(self, name, _frozen(getattr(self, name), np.int64))
        for name in ("nic_gbit_per_s", "uplink_gbit_per_s", "domain_gbit_per_s"):
            object.__setattr__(self, name, _frozen(getattr(self, name), np.float64))

    def as_record(self) -> dict[str, Any]:
        """Plain data for the manifest; what is not known is null."""
        return {
            "devices": list(self.devices),
            "nic_gbit_per_s": _nullable(self.nic_gbit_per_s),
            "leaves": [None if leaf == UNKNOWN else leaf for leaf in self.leaves.tolist()],
            "leaf_names": list(self.leaf_names),
            "uplinks": self.uplinks.tolist(),
            "uplink_gbit_per_s": _nullable(self.uplink_gbit_per_s),
            "domain_gbit_per_s": _nullable(self.domain_gbit_per_s),
        }


def _nullable(values: Floats) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]
