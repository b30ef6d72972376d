"""The node, NVLink domain, rail and site of every rank, and the link class of a pair."""

from ncclbench.topology.model import Link, Topology, TopologyRecord
from ncclbench.topology.wiring import Wiring, WiringRecord

__all__ = ["Link", "Topology", "TopologyRecord", "Wiring", "WiringRecord"]
