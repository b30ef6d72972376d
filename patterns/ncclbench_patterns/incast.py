"""Several GPUs to one at the same time, and one unrelated flow (the victim) beside them.

The k senders share the NIC of the receiver, so their rates must add up to its rate and be equal; Jain's index measures
how equal. The victim is a flow between two other GPUs. If it is slower than alone, packets that wait for the shared NIC
block others (head-of-line blocking).
"""

import numpy as np

from ncclbench.schedule import Case, Ints, Round, Schedule, Unable, grid_of, rounds_of, shard_count
from ncclbench.schedule import Params as BaseParams
from ncclbench.topology import Topology

_SENDERS = (2, 4, 8, 16)


class Params(BaseParams, frozen=True, kw_only=True):
    """Parameters of incast."""

    target: int = 0
    """the rank that receives."""
    senders: int = 16
    """largest number of senders; rounds have 2, 4, 8 and 16, up to this number and to the ranks that exist."""
    seed: int = 0


def variants(case: Case, topology: Topology) -> list[Schedule]:
    """Rounds ``senders=K`` with the victim as last flow, if ranks are left for it, and ``victim=K`` with it alone.

    Raises:
        Unable: with fewer than 2 ranks on other nodes than the target's.
    """
    params = case.read(Params)
    shard_count(case, 1)
    grid_DTR = grid_of(topology, "incast")
    if not 0 <= params.target < topology.world_size:
        raise Unable(f"incast: no rank {params.target}; this job has ranks 0 to {topology.world_size - 1}")
    order = _nearest_rails_first(topology, grid_DTR, params.target)
    wanted = [k for k in _SENDERS if k <= min(params.senders, len(order))]
    if not wanted:
        raise Unable(f"incast needs 2 ranks on other nodes than rank {params.target}'s; there are {len(order)}")
    rounds = []
    for k in wanted:
        src, dst = order[:k], np.full(k, params.target)
        victim = _victim(topology, params.target, src)
        if victim is not None:
            src, dst = np.append(src, victim[0]), np.append(dst, victim[1])
        rounds.append(Round(f"senders={k}", src, dst))
        if victim is not None:
            rounds.append(Round(f"victim={k}", np.array(victim[:1]), np.array(victim[1:])))
    return rounds_of(case, topology, rounds, seed=params.seed)


def _nearest_rails_first(topology: Topology, grid_DTR: Ints, target: int) -> Ints:
    """The ranks of other domains: those on the target's rail first, then rail by rail."""
    rails = int(topology.rails.max()) + 1
    others = grid_DTR.ravel()[topology.domains[grid_DTR.ravel()] != topology.domains[target]]
    distance = (topology.rails[others] - topology.rails[target]) % rails
    return np.asarray(others[np.argsort(distance, kind="stable")])


def _victim(topology: Topology, target: int, senders: Ints) -> tuple[int, int] | None:
    """Two other ranks in different domains, preferably on the target's rail and away from its node."""
    free = np.setdiff1d(np.arange(topology.world_size), np.append(senders, target))
    beside = topology.domains[free] == topology.domains[target]
    free = free[np.lexsort((topology.rails[free] != topology.rails[target], beside))]
    for a in free.tolist():
        elsewhere = free[topology.domains[free] != topology.domains[a]]
        if len(elsewhere):
            return a, int(elsewhere[0])
    return None
