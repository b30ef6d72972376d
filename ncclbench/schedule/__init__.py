"""What moves: phases over groups, and the four uses of them that need no rank: build, count, trace, check.

This is what a pattern imports.
"""

from ncclbench.errors import Unable
from ncclbench.schedule.builders import collective, shard_count
from ncclbench.schedule.case import Case, CollectiveParams, GroupParams, Needs, Params, Timing
from ncclbench.schedule.dtypes import DTYPES, Dtype, Redop
from ncclbench.schedule.flow_rounds import Direction, Round, derangement, grid_of, offsets, round_robin, rounds_of
from ncclbench.schedule.phases import AllToAllV, Collective, Concurrent, Exchange, Ints, Kernel, Local, Op, Phase
from ncclbench.schedule.row_work import RowKernel, RowPlan, RowWork
from ncclbench.schedule.schedule import Schedule

__all__ = [
    "DTYPES",
    "AllToAllV",
    "Case",
    "Collective",
    "CollectiveParams",
    "Concurrent",
    "Direction",
    "Dtype",
    "Exchange",
    "GroupParams",
    "Ints",
    "Kernel",
    "Local",
    "Needs",
    "Op",
    "Params",
    "Phase",
    "Redop",
    "Round",
    "RowKernel",
    "RowPlan",
    "RowWork",
    "Schedule",
    "Timing",
    "Unable",
    "collective",
    "derangement",
    "grid_of",
    "offsets",
    "round_robin",
    "rounds_of",
    "shard_count",
]
