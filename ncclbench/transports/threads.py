"""Ranks as threads of one process over NumPy arrays: no launcher, no network, every pattern.

It proves logic, not speed. The tests of patterns use it, and it is a supported way to try a pattern in a few lines:

    results = play(4, lambda transport: run_case(case, transport, topology))
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import TypeAlias, TypeVar, assert_never
from weakref import WeakValueDictionary

import numpy as np

from ncclbench.buffers.arrays import Buffers
from ncclbench.buffers.kinds import Device
from ncclbench.errors import TransportError
from ncclbench.schedule.dtypes import Array, Redop, finish_average, reducer
from ncclbench.schedule.phases import (
    READS_ALL_SHARDS,
    REDUCING,
    WRITES_ALL_SHARDS,
    AllToAllV,
    Collective,
    Exchange,
    Ints,
    Op,
)
from ncclbench.schedule.schedule import Schedule
from ncclbench.transports._compiler import Branch, PhaseCompiler, refuse_mpi_only
from ncclbench.transports.base import Call, Control, Facts, Program, Transport, nothing
from ncclbench.transports.capabilities import Capabilities, Hosting

# One process holds the buffers of all ranks, and for each also received and expected values.
CAPABILITIES = Capabilities(name="threads", hosting=Hosting.THREADS, devices=("cpu",), uses_nics=False, memory_factor=3)

T = TypeVar("T")

# Phases that move data between ranks.
Moving: TypeAlias = Collective | AllToAllV | Exchange
# What one rank writes: a range of its own buffer, and the values.
Write = tuple[slice, Array]


class ProgramBuffers(dict[int, Buffers]):
    """The buffers of one program, by rank."""


class ThreadWorld:
    """What the threads of one job share.

    Args:
        size: number of ranks.
        timeout: seconds that a rank waits for the others before it raises an error.
    """

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        """Make a world without ranks; threads join it by `ThreadTransport`."""
        self.size = size
        self.timeout = timeout
        self.reason = ""
        # Weak references: the calls of a program own its buffers.
        self._programs: WeakValueDictionary[int, ProgramBuffers] = WeakValueDictionary()
        self.posted: dict[tuple[Hashable, int], Array] = {}
        self._barriers: dict[Hashable, threading.Barrier] = {}
        self._lock = threading.Lock()

    def barrier(self, key: Hashable, parties: int) -> threading.Barrier:
        """The barrier called `key`, made by the first call."""
        with self._lock:
            barrier = self._barriers.setdefault(key, threading.Barrier(parties, timeout=self.timeout))
            if self.reason:
                barrier.abort()
            return barrier

    def program(self, number: int) -> "ProgramBuffers":
        """The buffers of all ranks in a program, made by the first call."""
        with self._lock:
            shared = self._programs.get(number)
            if shared is None:
                shared = self._programs[number] = ProgramBuffers()
            return shared

    def abort(self, reason: str) -> None:
        """Have every rank that waits raise an error with the first reason given."""
        with self._lock:
            self.reason = self.reason or reason
            for barrier in self._barriers.values():
                barrier.abort()


class ThreadControl:
    """Control messages through the shared world."""

    def __init__(self, world: ThreadWorld, rank: int) -> None:
        """Take part as `rank`."""
        self._world, self._rank = world, rank
        self._arrived = world.barrier("control-arrived", world.size)
        self._read = world.barrier("control-read", world.size)

    def all_gather(self, array: Array) -> Array:
        """All ranks' arrays, on every rank."""
        self._world.posted["control", self._rank] = array
        self._arrived.wait()
        stacked = np.stack([self._world.posted["control", rank] for rank in range(self._world.size)])
        self._read.wait()
        return stacked

    def gather(self, array: Array) -> Array | None:
        """All ranks' arrays, on rank 0."""
        stacked = self.all_gather(array)
        return stacked if self._rank == 0 else None

    def broadcast(self, array: Array) -> Array:
        """Rank 0's array, on every rank."""
        return np.asarray(self.all_gather(array)[0])


class ThreadTransport(Transport):
    """One rank of a `ThreadWorld`."""

    name = CAPABILITIES.name
    capabilities = CAPABILITIES
    device: Device = "cpu"

    def __init__(self, world: ThreadWorld, rank: int) -> None:
        """Take part as `rank`."""
        self.world, self.rank, self.world_size = world, rank, world.size
        self.control: Control = ThreadControl(world, rank)
        self._programs = 0
        self._start = world.barrier("start", world.size)

    def compile(self, schedule: Schedule, buffers: Buffers) -> Program:
        """Ready calls; every rank compiles the same schedules in the same order."""
        self._programs += 1
        shared = self.world.program(self._programs)
        shared[self.rank] = buffers
        return Program(_ThreadCompiler(self.world, self._programs, self.rank, schedule, buffers, shared).steps())

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._start.wait()

    @contextmanager
    def translating(self, what: str) -> Iterator[None]:
        """Convert a broken barrier to a `TransportError` that names the rank that stopped."""
        try:
            yield
        except threading.BrokenBarrierError:
            waited = f"no answer for {self.world.timeout:g} s"
            raise TransportError(f"{what} on rank {self.rank}: {self.world.reason or waited}") from None

    def describe(self) -> Facts:
        """Versions for the manifest."""
        return {"transport": self.name, "numpy": np.__version__}

    def close(self) -> None:
        """Do nothing; there are no resources."""


class _ThreadCompiler(PhaseCompiler):
    """Copies between the ranks' arrays, between barriers."""

    def __init__(
        self, world: ThreadWorld, program: int, rank: int, schedule: Schedule, buffers: Buffers, shared: ProgramBuffers
    ) -> None:
        """Compile program number `program` of `world`; `shared` has the buffers of its ranks."""
        super().__init__(rank, schedule, buffers)
        self._world, self._program, self._shared = world, program, shared
        self._phases = 0

    def collective(self, phase: Collective, branch: Branch) -> Call:
        """All members read, then all write."""
        refuse_mpi_only(phase, "threads have")
        return self._move(phase, branch)

    def all_to_all_v(self, phase: AllToAllV, branch: Branch) -> Call:
        """All members read, then all write."""
        return self._move(phase, branch)

    def exchange(self, phase: Exchange, branch: Branch) -> Call:
        """All ends of the round read, then all write."""
        return self._move(phase, branch)

    def _move(self, phase: Moving, branch: Branch) -> Call:
        self._phases += 1  # the same on all ranks, which compile the same phases in the same order
        members = participants(phase, self.rank)
        if self.rank not in members:
            return nothing
        world, shared, rank, target = self._world, self._shared, self.rank, self.buffers[phase.write]
        key = (self._program, self._phases, branch, tuple(members))
        ready = world.barrier((*key, "ready"), len(members))
        read = world.barrier((*key, "read"), len(members))
        written = world.barrier((*key, "written"), len(members))
        itemsize = target.dtype.itemsize

        def launch() -> None:
            ready.wait()
            sources = {r: shared[r][phase.read] for r in members}
            writes = list(received(phase, rank, members, sources, itemsize))
            read.wait()  # no rank overwrites what another still reads, in place or not
            for where, values in writes:
                target[where] = values
            written.wait()

        return launch


def participants(phase: Moving, rank: int) -> list[int]:
    """The ranks that take part in a phase with `rank`: its group in order, or all ends of the flows."""
    match phase:
        case Exchange():
            return sorted({*phase.src.tolist(), *phase.dst.tolist()})
        case Collective() | AllToAllV():
            return next(([int(r) for r in group] for group in phase.groups if rank in group), [])
        case _:
            assert_never(phase)


def received(
    phase: Moving, rank: int, members: list[int], sources: Mapping[int, Array], itemsize: int
) -> Iterator[Write]:
    """What `rank` writes, as copies of the data of all participants."""
    match phase:
        case Exchange():
            for k in np.flatnonzero(phase.dst == rank):
                count = int(phase.nbytes[k]) // itemsize
                first, start = int(phase.send_offset[k]) // itemsize, int(phase.recv_offset[k]) // itemsize
                yield slice(start, start + count), sources[int(phase.src[k])][first : first + count].copy()
        case AllToAllV():
            group = int(np.flatnonzero(np.any(phase.groups == rank, axis=1))[0])
            rows_NN: Ints = phase.rows[group] * (phase.row_bytes // itemsize)
            me, start = members.index(rank), 0
            for j, source in enumerate(members):
                first, count = int(rows_NN[j, :me].sum()), int(rows_NN[j, me])
                yield slice(start, start + count), sources[source][first : first + count].copy()
                start += count
        case Collective():
            values = _collective(phase, members.index(rank), [sources[r] for r in members])
            if values is not None:
                yield slice(0, len(values)), values
        case _:
            assert_never(phase)


def _collective(phase: Collective, me: int, arrays: list[Array]) -> Array | None:
    """What member `me` holds after a collective over `arrays`, or None where it receives nothing."""
    is_root = me == phase.root
    if phase.op is Op.BARRIER or (phase.op in (Op.REDUCE, Op.GATHER) and not is_root):
        return None
    if phase.op is Op.BROADCAST and is_root and phase.read == phase.write:
        return None
    # An op takes either the first shard of what it reads, or the shard for `me`.
    first = me * phase.count if phase.op in READS_ALL_SHARDS else 0
    shard = slice(first, first + phase.count)
    if phase.op in REDUCING:
        return _fold([array[shard] for array in arrays], phase.redop)
    if phase.op in WRITES_ALL_SHARDS:
        return np.concatenate([array[shard] for array in arrays])
    return arrays[phase.root][shard].copy()


def _fold(arrays: list[Array], redop: Redop) -> Array:
    with np.errstate(over="ignore"):  # repeated in-place sums overflow the type during timing
        total = reduce(reducer(redop), arrays[1:], arrays[0].copy())
    return finish_average(total, len(arrays)).astype(total.dtype) if redop is Redop.AVG else total


def play(size: int, main: Callable[[ThreadTransport], T], timeout: float = 60.0) -> list[T]:
    """Run `main` on `size` ranks at once; returns their results in rank order.

    Raises:
        Exception: the first error that any rank raised, after all of them have ended.
    """
    world = ThreadWorld(size, timeout)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def rank_main(rank: int) -> None:
        try:
            results[rank] = main(ThreadTransport(world, rank))
        except BaseException as error:
            errors.append(error)
            world.abort(f"rank {rank} stopped: {error}")

    threads = [threading.Thread(target=rank_main, args=(r,), name=f"rank-{r}", daemon=True) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]
