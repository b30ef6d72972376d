"""Rounds of point-to-point flows, for patterns that search for a slow NIC, leaf or path.

A round is a variant of a case with a label of its own, so it has samples of its own. All its flows start at once, and
each is reported by itself. The order of the rounds is random with a seed, so that a drift of the machine does not look
like a property of the last offset.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ncclbench.errors import Unable
from ncclbench.schedule.builders import shard_count
from ncclbench.schedule.case import Case
from ncclbench.schedule.phases import Exchange, Ints, frozen_ints
from ncclbench.schedule.schedule import Schedule
from ncclbench.topology import Topology

Direction = Literal["both", "apart"]


@dataclass(frozen=True, eq=False)
class Round:
    """Flows that run at once: from ranks `src` to ranks `dst`, both of shape (F,)."""

    label: str
    src: Ints
    dst: Ints

    def __post_init__(self) -> None:
        """Freeze the arrays."""
        object.__setattr__(self, "src", frozen_ints(np.ravel(self.src), 1, "src"))
        object.__setattr__(self, "dst", frozen_ints(np.ravel(self.dst), 1, "dst"))


def rounds_of(
    case: Case,
    topology: Topology,
    rounds: Iterable[Round],
    *,
    seed: int = 0,
    direction: Direction = "both",
    aligned: bool = False,
) -> list[Schedule]:
    """One schedule per round, in random order; every flow has the case's bytes.

    Args:
        case: S is the bytes of one directed flow.
        topology: node, domain and rail of every rank.
        rounds: rounds with different labels.
        seed: seed of the order.
        direction: ``apart`` splits every round so that no rank sends and receives at once.
        aligned: see `Schedule`.
    """
    split = [part for whole in rounds for part in (split_directions(whole) if direction == "apart" else [whole])]
    order = np.random.default_rng(seed).permutation(len(split))
    return [flow_schedule(case, topology, split[k], aligned=aligned) for k in order]


def flow_schedule(case: Case, topology: Topology, flows: Round, *, aligned: bool = False) -> Schedule:
    """The schedule of one round; several flows to one rank are received one after the other in its buffer."""
    count = shard_count(case, 1)
    nbytes = count * case.element.itemsize
    index_F = occurrence_numbers(flows.dst)
    phase = Exchange(
        label=flows.label,
        src=flows.src,
        dst=flows.dst,
        nbytes=np.array([nbytes]),
        recv_offset=index_F * nbytes,
    )
    return Schedule(
        world_size=topology.world_size,
        dtype=case.element,
        buffers={"send": nbytes, "recv": nbytes * (int(index_F.max()) + 1)},
        inputs=("send",),
        phases=(phase,),
        op="send_recv",
        size_bytes=nbytes,
        count=count,
        aligned=aligned,
    )


def occurrence_numbers(values: ArrayLike) -> Ints:
    """For each value, the number of equal values before it: 0 for the first of its kind."""
    keys = np.asarray(values, np.int64)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    first = np.searchsorted(ordered, ordered, side="left")
    numbers = np.empty(len(keys), np.int64)
    numbers[order] = np.arange(len(keys)) - first
    return numbers


def split_directions(whole: Round) -> list[Round]:
    """The round in parts in which no rank both sends and receives: two, or three if a cycle of flows is odd.

    Raises:
        ValueError: if a rank sends twice or receives twice.
    """
    src, dst = whole.src.tolist(), whole.dst.tolist()
    leaving = {a: k for k, a in enumerate(src)}
    arriving = {b: k for k, b in enumerate(dst)}
    if len(leaving) != len(src) or len(arriving) != len(dst):
        raise ValueError(f"{whole.label}: only rounds in which a rank sends and receives once can be taken apart")
    part: dict[int, int] = {}
    # Chains first, from their starts, then cycles: consecutive edges are in different parts.
    starts = [k for k, a in enumerate(src) if a not in arriving] + list(range(len(src)))
    for start in starts:
        edge: int | None = start
        turn = 0
        last = start
        while edge is not None and edge not in part:
            part[edge], last = turn % 2, edge
            turn, edge = turn + 1, leaving.get(dst[edge])
        if edge == start and turn % 2 and turn > 1:
            part[last] = 2  # the last edge of an odd cycle is adjacent to both other parts
    colours = np.array([part[k] for k in range(len(src))])
    if not colours.any():
        return [whole]
    return [
        Round(f"{whole.label},part={c + 1}", whole.src[colours == c], whole.dst[colours == c])
        for c in range(int(colours.max()) + 1)
    ]


def offsets(domains: int, wanted: int, seed: int) -> list[int]:
    """Up to `wanted` distances between `domains` domains in a ring, from 1 on; a random choice if there are more."""
    every = np.arange(1, domains)
    if len(every) <= wanted:
        return [int(s) for s in every]
    return sorted(int(s) for s in np.random.default_rng(seed).choice(every, wanted, replace=False))


def grid_of(topology: Topology, pattern: str, *, domains: int = 2, rails: int = 1) -> Ints:
    """`Topology.grid`, shape (D, T, R), if it is large enough for a pattern.

    Raises:
        Unable: naming the pattern, what it needs and what the job has.
    """
    found = len(np.unique(topology.domains))
    if found < domains:
        nodes = len(np.unique(topology.nodes))
        inside = f", whose {nodes} nodes share NVLink" if nodes > found else ""
        hint = "; --topology FILE says where ranks sit" if topology.wiring is None else ""
        raise Unable(f"{pattern} needs {domains} nodes (NVLink domains); this job has {found}{inside}{hint}")
    grid_DTR = topology.grid()
    if grid_DTR.shape[2] < rails:
        raise Unable(
            f"{pattern} needs {rails} rails, ranks on as many NICs of a node; this job has {grid_DTR.shape[2]}"
        )
    return grid_DTR


def round_robin(teams: int) -> list[list[tuple[int, int]]]:
    """Every pair of `teams` exactly once, in rounds in which each team plays once (the circle method).

    There are N - 1 rounds for an even number N, and N for an odd number, with one team idle in each.
    """
    order = [*range(teams)] + ([-1] if teams % 2 else [])
    rounds = []
    for _ in range(len(order) - 1):
        pairs = [(order[k], order[-1 - k]) for k in range(len(order) // 2)]
        rounds.append([(a, b) for a, b in pairs if a >= 0 and b >= 0])
        order = [order[0], order[-1], *order[1:-1]]
    return rounds


def derangement(size: int, rng: np.random.Generator) -> Ints:
    """A random permutation of 0..size-1 without a fixed point; every one is equally likely.

    Raises:
        ValueError: if `size` is below 2, since there is none.
    """
    if size < 2:
        raise ValueError(f"{size} things have no derangement")
    while True:  # a fraction 1/e of all permutations is a derangement: three attempts on average
        candidate = rng.permutation(size)
        if not np.any(candidate == np.arange(size)):
            return np.asarray(candidate, dtype=np.int64)
