"""Who sits where: nodes, domains, rails, sites, and the link class of a pair."""

from ncclbench.topology.model import Link, Topology

__all__ = ["Link", "Topology"]
