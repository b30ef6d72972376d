"""An expert-parallel group inside one NVLink domain, then the same size of group over two and four domains.

Inside a domain an all-to-all runs at NVLink speed. If the group is split over c domains, (c - 1) / c of each rank's
bytes leave through its NIC, which is several times slower. The step between the rounds is the cost of a bad placement
of ranks.
"""

import numpy as np

from ncclbench.schedule import Case, Collective, Ints, Op, Schedule, Unable, grid_of, shard_count
from ncclbench.schedule import Params as BaseParams
from ncclbench.topology import Topology

_SPLITS = (1, 2, 4)


class Params(BaseParams, frozen=True, kw_only=True):
    """Parameters of domain_straddle: none."""


def variants(case: Case, topology: Topology) -> list[Schedule]:
    """Phases ``domains=C``: an all_to_all in groups as large as a domain, over C of them; S is a rank's buffer.

    Raises:
        Unable: with fewer than 2 domains, an odd number of them, or fewer than 2 ranks in each.
    """
    case.read(Params)
    shard_count(case, 1)
    grid_DTR = grid_of(topology, "domain_straddle")
    grid_DM = grid_DTR.reshape(len(grid_DTR), -1)
    domains, members = grid_DM.shape
    if domains % 2 or members % 2:
        raise Unable(
            f"domain_straddle needs an even number of domains and of ranks in each; here are {domains} and {members}"
        )
    count = shard_count(case, members)
    splits = [c for c in _SPLITS if domains % c == 0 and members % c == 0]
    return [_one(case, topology, f"domains={c}", straddling(grid_DM, c), count) for c in splits]


def straddling(grid_DM: Ints, split: int) -> Ints:
    """Groups of M ranks, each with M / split from each of `split` neighboring domains; shape (D, M)."""
    domains, members = grid_DM.shape
    blocks = grid_DM.reshape(domains // split, split, split, members // split)  # block, domain, part, rank
    return np.sort(blocks.transpose(0, 2, 1, 3).reshape(domains, members), axis=1)


def _one(case: Case, topology: Topology, label: str, groups_GN: Ints, count: int) -> Schedule:
    members = groups_GN.shape[1]
    nbytes = count * members * case.element.itemsize
    return Schedule(
        world_size=topology.world_size,
        dtype=case.element,
        buffers={"send": nbytes, "recv": nbytes},
        inputs=("send",),
        phases=(Collective(label=label, op=Op.ALL_TO_ALL, groups=groups_GN, count=count),),
        op="all_to_all",
        size_bytes=nbytes,
        count=count,
        groups=groups_GN,
    )
