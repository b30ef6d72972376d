"""Schedules: phases over groups of ranks, and what is derived from them without running them.

- Data: `case` (what to measure), `phases`, `row_work`, `schedule`.
- Patterns: `pattern` (a pattern module, typed), `builders` and `flow_rounds` (shared by pattern files).
- Uses: `ledger` (exact bytes), `minimum_time` (lower bound of time), `symbolic_trace` (origin of contents),
  `input_values` and `oracle` (fill and check), `rates` (bus bandwidth).
- Representation: `dtypes`, `row_formats`, `expected_contents`, `counter_rng`.

Patterns import the names below, and no submodule.
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
