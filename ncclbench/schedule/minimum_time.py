"""The minimum time of a phase: a lower bound from the rates of NICs, NVLink ports and leaf uplinks.

For every NIC, leaf uplink and NVLink port, the bytes of the phase are divided by the rate; the largest quotient is the
bound. All links work at once and without loss, and flows are distributed perfectly over the uplinks, so the bound is
never too strict. Without a known rate there is no bound.
"""

import numpy as np

from ncclbench.schedule.ledger import flows
from ncclbench.schedule.phases import Ints, Phase, flatten
from ncclbench.topology import Topology, Wiring

_BYTES_PER_GBIT = 1e9 / 8


def minimum_seconds(phase: Phase, topology: Topology, itemsize: int, *, aligned: bool = False) -> float | None:
    """The lower bound of the time of `phase` in seconds; None if the topology has no rates of links.

    Args:
        phase: the phase.
        topology: the ranks, and the links between them.
        itemsize: bytes per element.
        aligned: see `Schedule`.
    """
    if topology.wiring is None:
        return None
    loads = _Loads(topology, topology.wiring)
    for step in flatten((phase,)):
        for src, dst, nbytes in flows(step, itemsize):
            loads.add(src, dst, nbytes, aligned)
    return loads.slowest()


class _Loads:
    """Bytes on every link, out and in: NIC and NVLink port of each rank, shape (2, R); uplinks of each leaf, (2, L)."""

    def __init__(self, topology: Topology, wiring: Wiring) -> None:
        """Start with no bytes on any link."""
        self.topology, self.wiring = topology, wiring
        ranks, leaves = topology.world_size, len(wiring.leaf_names)
        self.nic, self.nvlink, self.uplink = (np.zeros((2, n), np.int64) for n in (ranks, ranks, leaves))

    def add(self, src: Ints, dst: Ints, nbytes: Ints, aligned: bool) -> None:
        """Add the bytes of flows."""
        out, into = self.topology.carriers(src, dst, aligned=aligned)
        moves = src != dst
        outside, inside = moves & (out >= 0), moves & (out < 0)
        np.add.at(self.nic[0], out[outside], nbytes[outside])
        np.add.at(self.nic[1], into[outside], nbytes[outside])
        np.add.at(self.nvlink[0], src[inside], nbytes[inside])
        np.add.at(self.nvlink[1], dst[inside], nbytes[inside])
        leaves = self.wiring.leaves
        crossing = outside & (leaves[out] != leaves[into]) & (leaves[out] >= 0) & (leaves[into] >= 0)
        np.add.at(self.uplink[0], leaves[out[crossing]], nbytes[crossing])
        np.add.at(self.uplink[1], leaves[into[crossing]], nbytes[crossing])

    def slowest(self) -> float | None:
        """Seconds of the slowest link, of those with a known rate; None if there is none."""
        wiring = self.wiring
        worst = 0.0
        for load, gbit_per_s in (
            (self.nic, wiring.nic_gbit_per_s),
            (self.nvlink, wiring.domain_gbit_per_s),
            (self.uplink, wiring.uplink_gbit_per_s),
        ):
            if load.size:
                seconds = load.max(axis=0) / (gbit_per_s * _BYTES_PER_GBIT)
                worst = max(worst, float(np.nanmax(seconds, initial=0.0)))
        return worst or None
