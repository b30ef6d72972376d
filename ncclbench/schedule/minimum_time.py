"""The least time a phase can take: what the wires that are known would need, all working at once without loss.

For every NIC, leaf uplink and NVLink port the bytes that a phase puts on it, divided by its rate; the largest of these
is the bound. Spreading over uplinks is taken as perfect, so that a bound is never too strict. Where no rate is known,
there is none.
"""

import numpy as np

from ncclbench.schedule.ledger import flows
from ncclbench.schedule.phases import Ints, Phase, flatten
from ncclbench.topology import Topology, Wiring

_BYTES_PER_GBIT = 1e9 / 8


def minimum_seconds(phase: Phase, topology: Topology, itemsize: int, *, aligned: bool = False) -> float | None:
    """Seconds below which no run of `phase` can be; None where the topology does not say how fast its wires are.

    Args:
        phase: what moves.
        topology: where, and over which wires.
        itemsize: bytes an element.
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
    """Bytes on every wire: NICs and NVLink of each rank, uplinks of each leaf, out and in."""

    def __init__(self, topology: Topology, wiring: Wiring) -> None:
        """Nothing moves yet."""
        self.topology, self.wiring = topology, wiring
        ranks, leaves = topology.world_size, len(wiring.leaf_names)
        self.nic, self.nvlink, self.uplink = (np.zeros((2, n), np.int64) for n in (ranks, ranks, leaves))

    def add(self, src: Ints, dst: Ints, nbytes: Ints, aligned: bool) -> None:
        """Put flows on the wires."""
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
        """Seconds of the wire that takes longest, of those whose rate is known."""
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
