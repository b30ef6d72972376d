"""Ranks as threads of one process over NumPy arrays: no launcher, no network, every pattern.

It proves logic, not speed. It is what patterns are tested on, and a supported way to try a pattern in a few lines:

    results = play(4, lambda transport: run_case(case, transport, topology))
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from ncclbench.buffers.arrays import Buffers, Device
from ncclbench.errors import TransportError
from ncclbench.schedule.dtypes import Array, Redop, finish_average, reducer
from ncclbench.schedule.phases import (
    READS_ALL_SHARDS,
    REDUCING,
    WRITES_ALL_SHARDS,
    AllToAllV,
    Collective,
    Concurrent,
    Exchange,
    Ints,
    Local,
    Op,
    SimplePhase,
)
from ncclbench.schedule.row_work import RowWork
from ncclbench.schedule.schedule import Schedule
from ncclbench.transports._local import branches_step, local_call, refuse_what_only_mpi_has
from ncclbench.transports.base import Call, Control, DeviceStream, Program, Step, nothing

T = TypeVar("T")

# What one rank is to write: a stretch of its own buffer, and the values.
Write = tuple[slice, Array]


class _Shared(dict[int, Buffers]):
    """The buffers of one program, by rank."""


class ThreadWorld:
    """What the threads of one job share.

    Args:
        size: how many ranks.
        timeout: seconds that a rank waits for the others before it gives up.
    """

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        """Make a world in which nobody has arrived yet."""
        self.size = size
        self.timeout = timeout
        self.reason = ""
        # Held by the calls of the programs: a program that is dropped lets go of its buffers.
        self._programs: WeakValueDictionary[int, _Shared] = WeakValueDictionary()
        self.posted: dict[tuple[Hashable, int], Array] = {}
        self._barriers: dict[Hashable, threading.Barrier] = {}
        self._lock = threading.Lock()

    def barrier(self, key: Hashable, parties: int) -> threading.Barrier:
        """The barrier called `key`, made by whoever asks first."""
        with self._lock:
            barrier = self._barriers.setdefault(key, threading.Barrier(parties, timeout=self.timeout))
            if self.reason:
                barrier.abort()
            return barrier

    def program(self, number: int) -> "_Shared":
        """The buffers of all ranks in a program, made by whoever asks first."""
        with self._lock:
            shared = self._programs.get(number)
            if shared is None:
                shared = self._programs[number] = _Shared()
            return shared

    def abort(self, reason: str) -> None:
        """Free every rank that waits; each raises, naming the first reason given."""
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


class ThreadTransport:
    """One rank of a `ThreadWorld`."""

    name = "threads"
    device: Device = "cpu"
    stream: DeviceStream | None = None

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
        steps = []
        for k, phase in enumerate(schedule.phases):
            if isinstance(phase, Concurrent):
                branches = [
                    [self._call(step, (k, b, s), buffers, shared) for s, step in enumerate(branch)]
                    for b, branch in enumerate(phase.branches)
                ]
                steps.append(branches_step(phase, branches))
            else:
                steps.append(Step(phase.label, self._call(phase, (k,), buffers, shared)))
        return Program(tuple(steps))

    def _call(self, phase: SimplePhase, path: tuple[int, ...], buffers: Buffers, shared: _Shared) -> Call:
        if isinstance(phase, Local | RowWork):
            return local_call(phase, self.rank, buffers)
        if isinstance(phase, Collective):
            refuse_what_only_mpi_has(phase, "threads have")
        party = participants(phase, self.rank)
        if self.rank not in party:
            return nothing
        program, target = self._programs, buffers[phase.write]
        key = (program, path, tuple(party))
        ready = self.world.barrier((*key, "ready"), len(party))
        read = self.world.barrier((*key, "read"), len(party))
        written = self.world.barrier((*key, "written"), len(party))
        itemsize = target.dtype.itemsize

        def launch() -> None:
            ready.wait()
            sources = {r: shared[r][phase.read] for r in party}
            writes = list(received(phase, self.rank, party, sources, itemsize))
            read.wait()  # nobody overwrites what another still reads, in place or not
            for where, values in writes:
                target[where] = values
            written.wait()

        return launch

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._start.wait()

    @contextmanager
    def translating(self, what: str) -> Iterator[None]:
        """A broken barrier means that another rank stopped, and says which."""
        try:
            yield
        except threading.BrokenBarrierError:
            waited = f"no answer for {self.world.timeout:g} s"
            raise TransportError(f"{what} on rank {self.rank}: {self.world.reason or waited}") from None

    def describe(self) -> Mapping[str, Any]:
        """Versions for the manifest."""
        return {"transport": "threads", "numpy": np.__version__}

    def evidence(self) -> Mapping[str, Any]:
        """There is nothing to ask."""
        return {}

    def close(self) -> None:
        """Nothing is held."""


def participants(phase: Collective | AllToAllV | Exchange, rank: int) -> list[int]:
    """The ranks that meet `rank` in a phase: its group in order, or all ends of a round of flows."""
    if isinstance(phase, Exchange):
        return sorted({*phase.src.tolist(), *phase.dst.tolist()})
    for group in phase.groups:
        if rank in group:
            return [int(r) for r in group]
    return []


def received(
    phase: Collective | AllToAllV | Exchange, rank: int, party: list[int], sources: Mapping[int, Array], itemsize: int
) -> Iterator[Write]:
    """What `rank` writes, as copies, from what all of its party hold."""
    if isinstance(phase, Exchange):
        for k in np.flatnonzero(phase.dst == rank):
            count = int(phase.nbytes[k]) // itemsize
            first, start = int(phase.send_offset[k]) // itemsize, int(phase.recv_offset[k]) // itemsize
            yield slice(start, start + count), sources[int(phase.src[k])][first : first + count].copy()
    elif isinstance(phase, AllToAllV):
        group = int(np.flatnonzero(np.any(phase.groups == rank, axis=1))[0])
        rows_NN: Ints = phase.rows[group] * (phase.row_bytes // itemsize)
        me, start = party.index(rank), 0
        for j, source in enumerate(party):
            first, count = int(rows_NN[j, :me].sum()), int(rows_NN[j, me])
            yield slice(start, start + count), sources[source][first : first + count].copy()
            start += count
    else:
        values = _collective(phase, party.index(rank), [sources[r] for r in party])
        if values is not None:
            yield slice(0, len(values)), values


def _collective(phase: Collective, me: int, arrays: list[Array]) -> Array | None:
    """What member `me` holds after a collective over `arrays`, or None where it receives nothing."""
    is_root = me == phase.root
    if phase.op is Op.BARRIER or (phase.op in (Op.REDUCE, Op.GATHER) and not is_root):
        return None
    if phase.op is Op.BROADCAST and is_root and phase.read == phase.write:
        return None
    # Each op takes either the first shard of what it reads, or the one that is meant for `me`.
    first = me * phase.count if phase.op in READS_ALL_SHARDS else 0
    shard = slice(first, first + phase.count)
    if phase.op in REDUCING:
        return _fold([array[shard] for array in arrays], phase.redop)
    if phase.op in WRITES_ALL_SHARDS:
        return np.concatenate([array[shard] for array in arrays])
    return arrays[phase.root][shard].copy()


def _fold(arrays: list[Array], redop: Redop) -> Array:
    with np.errstate(over="ignore"):  # an in-place sum that is repeated for timing leaves the type's range
        total = reduce(reducer(redop), arrays[1:], arrays[0].copy())
    return finish_average(total, len(arrays)).astype(total.dtype) if redop is Redop.AVG else total


def play(size: int, main: Callable[[ThreadTransport], T], timeout: float = 60.0) -> list[T]:
    """Run `main` on `size` ranks at once; their results in rank order.

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
