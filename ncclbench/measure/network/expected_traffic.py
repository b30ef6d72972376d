"""The bytes that each NIC must carry in a case, from its schedules; and whether they are known beforehand at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np

from ncclbench.schedule.case import Needs
from ncclbench.schedule.ledger import flows
from ncclbench.schedule.phases import AllToAllV, Collective, Exchange, Ints, Local, Op, SimplePhase, flatten
from ncclbench.schedule.row_work import RowWork
from ncclbench.schedule.schedule import Schedule
from ncclbench.topology import Topology
from ncclbench.transports.capabilities import Capabilities


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpectedTraffic:
    """What the NICs of a case must have carried.

    Attributes:
        bytes_2R: sent and received by each rank's NIC, shape (2, R).
        launches: iterations of any variant; each may add control messages.
        reason: why the bytes are not known beforehand; "" if they are.
        pxn: whether NCCL must hop over NVLink, or must not; None where NCCL may choose.
    """

    bytes_2R: Ints
    launches: int
    reason: str = ""
    pxn: bool | None = None


def expected_traffic(
    variants: Sequence[Schedule],
    runs_V: Sequence[int],
    topology: Topology,
    transport: Capabilities,
    needs: Needs | None = None,
) -> ExpectedTraffic:
    """The bytes that each NIC carries when variant v is run ``runs_V[v]`` times.

    Args:
        variants: of the case.
        runs_V: how often each variant was run.
        topology: where the ranks are.
        transport: what it can do; libraries differ in which routes they choose themselves.
        needs: how the process was started, which settles NCCL's choice of NIC.
    """
    total = np.zeros((2, topology.world_size), np.int64)
    other = np.zeros_like(total)
    reason = ""
    for schedule, runs in zip(variants, runs_V, strict=True):
        for phase in flatten(schedule.phases):
            reason = reason or _routed_by_library(phase, transport)
            _add(total, phase, schedule, topology, runs, aligned=schedule.aligned)
            _add(other, phase, schedule, topology, runs, aligned=not schedule.aligned)
    if transport.reads_nccl_settings and needs is None and not np.array_equal(total, other):
        reason = reason or "NCCL may hop over NVLink to another rail (PXN), and both would be right"
    pxn = needs.pxn if needs and transport.reads_nccl_settings else None
    return ExpectedTraffic(bytes_2R=total, launches=sum(runs_V), reason=reason, pxn=pxn)


def _add(
    total_2R: Ints, phase: SimplePhase, schedule: Schedule, topology: Topology, runs: int, *, aligned: bool
) -> None:
    for src, dst, nbytes in flows(phase, schedule.dtype.itemsize):
        out, into = topology.carriers(src, dst, aligned=aligned)
        outside = out >= 0
        np.add.at(total_2R[0], out[outside], runs * nbytes[outside])
        np.add.at(total_2R[1], into[outside], runs * nbytes[outside])


def _routed_by_library(phase: SimplePhase, transport: Capabilities) -> str:
    """Why the bytes of a phase on each NIC are not known beforehand; "" if they are."""
    all_to_all = f"{transport.name} chooses the route of an all-to-all" if transport.routes_all_to_all else ""
    match phase:
        case Exchange() | Local() | RowWork() | Collective(op=Op.BARRIER):
            return ""
        case AllToAllV() | Collective(op=Op.ALL_TO_ALL):
            return all_to_all
        case Collective():
            return f"the library chooses the route of {phase.op}"
        case _:
            assert_never(phase)
