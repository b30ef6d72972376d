"""One rank of a test: runs the cases in a file over MPI, then some schedules that no pattern makes.

    mpiexec -n 4 python mpi_worker.py CASES.json RECORDS.json [MOST]

MOST is the largest count of one MPI call, to try what otherwise needs more than 2**31 elements. THREAD_LEVEL in the
environment (``FUNNELED``, ``SERIALIZED``) has MPI started with less than it could.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np

from ncclbench.buffers.arrays import allocate
from ncclbench.buffers.nccl_mem_alloc import BLOCKS
from ncclbench.errors import Unable
from ncclbench.measure.case import run_case
from ncclbench.plan.plan import Settings
from ncclbench.schedule import DTYPES, AllToAllV, Case, Collective, Concurrent, Exchange, Kernel, Local, Op, Schedule
from ncclbench.schedule.oracle import Oracle
from ncclbench.topology import Topology
from ncclbench.transports import _mpi_transport as mpi
from ncclbench.transports._mpi_library import MPI, start_mpi
from ncclbench.transports._mpi_transport import MpiTransport
from ncclbench.transports.base import Transport
from tests.helpers.fake_device import FakeDevice

SETTINGS = Settings(iterations=6, warmup=1)


def main(cases: Path, records: Path, most: int | None) -> None:
    level = os.environ.get("THREAD_LEVEL")
    if level:
        MPI.Init_thread(getattr(MPI, f"THREAD_{level}"))
    owned = start_mpi() or bool(level)
    transport = MpiTransport(MPI.COMM_WORLD, owned=owned, most=most, memory=fake_device())
    transport.device = "cpu"
    topology = Topology.single_node(transport.world_size)
    found = []
    for case in msgspec.json.decode(cases.read_bytes(), type=list[Case]):
        measured = run_case(case, transport, topology, SETTINGS)
        if measured is not None:
            found.append(msgspec.to_builtins(measured.record))
    odd: dict[str, Any] = {name: wrong(transport, schedule) for name, schedule in odd_schedules(transport.world_size)}
    described = dict(transport.describe())
    if transport.rank == 0:
        records.write_text(json.dumps({"records": found, "odd": odd, "describe": described}))
    with patch("ncclbench.buffers.nccl_mem_alloc.NcclMemory") as made:
        BLOCKS.take(64)
    transport.close()
    made.return_value.free.assert_called_once_with()  # what cases have kept goes when the transport does


def fake_device() -> FakeDevice | None:
    """FAKE_DEVICE in the environment: ``staged``, or ``aware`` for an MPI that takes its pointers, as it does here.

    The rank NO_DEVICE_ON has none.
    """
    kind = os.environ.get("FAKE_DEVICE")
    if os.environ.get("NO_DEVICE_ON") == str(MPI.COMM_WORLD.rank):
        return None
    if kind == "aware":
        patch.object(mpi, "library_says_cuda", lambda: True).start()
        patch.object(mpi, "device_bytes", lambda nbytes: np.empty(nbytes, np.uint8)).start()
    return FakeDevice() if kind else None


def odd_schedules(size: int) -> Iterator[tuple[str, Schedule]]:
    """What the schedule can say and the shipped patterns do not."""
    world, turned = np.arange(size)[None], np.roll(np.arange(size), 1)[::-1][None]
    for name, op in [
        ("turned", Op.ALL_GATHER),
        ("turned reduce_scatter", Op.REDUCE_SCATTER),
        ("turned gather", Op.GATHER),
    ]:
        yield name, of(size, Collective("a", op, turned, 6))
    for op in (Op.ALL_REDUCE, Op.BROADCAST, Op.REDUCE):
        yield f"{op} out of place", of(size, Collective("a", op, world, 6, root=size - 1))
    for op in (Op.ALL_TO_ALL, Op.REDUCE_SCATTER):
        yield f"{op} in place", of(size, Collective("a", op, world, 6, read="send", write="send"))
    yield "gather in place", of(size, Collective("a", Op.GATHER, world, 6, read="send", write="send"))
    yield "barrier", of(size, Collective("b", Op.BARRIER, world, 0), Collective("a", Op.ALL_REDUCE, world, 6))
    yield "one of two in a group", of(size, Collective("a", Op.ALL_REDUCE, world[:, : size - 1], 6))
    rows = np.add.outer(np.arange(size), np.arange(size))[None] % 3  # some of them zero
    yield "uneven", of(size, AllToAllV("a", turned, rows, row_bytes=8))
    only = np.zeros((1, size, size), np.int64)
    only[0, 0, size - 1] = 2
    yield "rows for one", of(size, AllToAllV("a", world, only, row_bytes=8))
    twice = np.concatenate([np.arange(size), np.arange(size)])
    yield (
        "flows to oneself and two to a neighbour",
        of(
            size,
            Exchange(
                "a",
                src=np.concatenate([twice, np.arange(size)]),
                dst=np.concatenate([(twice + 1) % size, np.arange(size)]),
                nbytes=np.repeat([8, 16, 4], size),
                send_offset=np.repeat([0, 8, 24], size),
                recv_offset=np.repeat([16, 0, 32], size),
            ),
        ),
    )
    yield (
        "concurrent",
        of(
            size,
            Concurrent(
                "both",
                (
                    (Collective("x", Op.ALL_REDUCE, world, 6), Local("c", Kernel.COPY, 6, read="recv", write="third")),
                    (Collective("y", Op.ALL_GATHER, world, 6, write="fourth"),),
                ),
            ),
        ),
    )


def of(size: int, *phases: Any) -> Schedule:
    dtype = DTYPES["float32"]
    limit = 64 * size * dtype.itemsize
    return Schedule(
        world_size=size,
        dtype=dtype,
        buffers=dict.fromkeys(("send", "recv", "third", "fourth"), limit),
        inputs=("send",),
        phases=phases,
        op=None,
        size_bytes=limit,
        count=6,
    )


def wrong(transport: Transport, schedule: Schedule) -> int | str | None:
    """Wrong elements on all ranks after two passes with other values; the reason if it cannot run."""
    buffers = allocate(schedule, transport.device)
    try:
        program = transport.compile(schedule, buffers)
    except Unable as unable:
        return str(unable)
    count = 0
    for salt in (0, 1):
        oracle = Oracle(schedule, transport.rank, salt)
        oracle.prepare(buffers)
        transport.barrier()
        program.run()
        transport.barrier()
        count += oracle.count_wrong(buffers)
    gathered = transport.control.gather(np.array([count], np.int64))
    return None if gathered is None else int(gathered.sum())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
