"""MPI through mpi4py: buffers in upper-case calls, never pickle.

The library is Open MPI, MPICH or one with the same ABI, found at run time. torch is not needed. Calls are in place
(MPI_IN_PLACE) where the pattern is in place, and out of place otherwise.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import mpi4py
import numpy as np

from ncclbench.buffers.arrays import Buffers, device_bytes
from ncclbench.buffers.kinds import Device
from ncclbench.buffers.nccl_mem_alloc import BLOCKS
from ncclbench.errors import EnvironmentFault, TransportError, Unable, UsageError
from ncclbench.schedule.dtypes import Array, Dtype, Redop, finish_average
from ncclbench.schedule.phases import REDUCING, AllToAllV, Collective, Concurrent, Exchange, Op, SimplePhase
from ncclbench.schedule.schedule import Schedule
from ncclbench.topology.network_addresses import LOOPBACK, connect_first, local_addresses
from ncclbench.topology.visible_gpus import gpus_are_meant
from ncclbench.transports._compiler import Branch, PhaseCompiler
from ncclbench.transports._mpi_library import MPI, Elements, MpiControl, library, most_count, start_mpi, thread_level
from ncclbench.transports._staging import (
    CupyMemory,
    Memory,
    Staging,
    after_synchronising,
    library_says_cuda,
    transfer_arrives,
)
from ncclbench.transports._tcp_control import StarControl
from ncclbench.transports._tcp_probe import Listeners
from ncclbench.transports.base import (
    CONTROL_NETWORK,
    Call,
    Control,
    Facts,
    Program,
    RankIdentity,
    Split,
    Transport,
    all_gather_text,
    broadcast_text,
    nothing,
)
from ncclbench.transports.capabilities import Capabilities
from ncclbench.transports.cuda.gpu_ownership import choose_gpu, cupy_gpus, ranks_per_gpu
from ncclbench.transports.mpi import CAPABILITIES

# For these, MPI's in-place shard lies at the rank's position in the larger buffer; a schedule's lies at the front.
_NEVER_IN_PLACE = frozenset({Op.ALL_GATHER, Op.GATHER, Op.SCATTER})

# Vendors as mpi4py names them; all start through Hydra's PMI.
_MPICH_FAMILY = frozenset({"MPICH", "Intel MPI", "MVAPICH", "MVAPICH2"})

# Time limit for each of rank 0's addresses.
_CONNECT_SECONDS = 5.0

# The interface of the measured messages; all transports use this variable.
_MEASURED_NETWORK = "GLOO_SOCKET_IFNAME"

# Large enough that no library sends the data inside its message header, which needs no CUDA support.
_PROBE_BYTES = 1 << 20

# A buffer and its datatype as mpi4py takes them, from which the count follows; or MPI.IN_PLACE.
Message = Any


def open_transport(capabilities: Capabilities, identity: RankIdentity, timeout: float) -> "MpiTransport":
    """Join the job as `identity`; MPI itself has no time limit for joining.

    Raises:
        EnvironmentFault: if MPI does not start, or if MPI and the launcher disagree on this process's rank.
    """
    address = separate_control_address()
    owned = _start_as(identity)
    star = StarControl(identity.rank, identity.world_size, address, timeout) if address else None
    return MpiTransport(
        MPI.COMM_WORLD, capabilities=capabilities, owned=owned, memory=_device_memory(identity), star=star
    )


def separate_control_address() -> tuple[str, int] | None:
    """Rank 0's address on a separate control network; None if there is no such network.

    Raises:
        UsageError: if the address is not set.
    """
    network = os.environ.get(CONTROL_NETWORK)
    if not network:
        return None
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(
            f"{CONTROL_NETWORK}={network} needs MASTER_ADDR, rank 0's address on that network, and MASTER_PORT, a free "
            f"port there, on all ranks; they are {host!r} and {port!r}"
        )
    return host, int(port)


def _device_memory(identity: RankIdentity) -> Memory | None:
    """This rank's GPU, if buffers go there; with ``auto`` they do where there are a GPU and CuPy.

    Raises:
        EnvironmentFault: if buffers must be on a GPU and cannot be.
    """
    if identity.device == "cpu" or (identity.device == "auto" and not (gpus_are_meant() and find_spec("cupy"))):
        return None
    return CupyMemory(choose_gpu(identity, cupy_gpus("--device cpu")))


def agree_on_store(identity: RankIdentity) -> RankIdentity:
    """`identity` with the address of a store for another library; MPI runs only for this exchange.

    Raises:
        EnvironmentFault: as `open_transport`, or if a rank does not reach rank 0.
    """
    owned = _start_as(identity)
    control = MpiControl(MPI.COMM_WORLD)
    one_node = len(set(all_gather_text(control, socket.gethostname()))) == 1
    hosts, port, listen_fd = [LOOPBACK], 0, None
    if identity.rank == 0:
        listener = socket.create_server((LOOPBACK if one_node else "", 0), backlog=min(identity.world_size, 4096))
        hosts, port = [LOOPBACK] if one_node else local_addresses(), listener.getsockname()[1]
        listen_fd = listener.detach()
    *hosts, port_text = broadcast_text(control, "|".join([*hosts, str(port)])).split("|")
    host = hosts[0] if identity.rank == 0 else _first_reachable(hosts, int(port_text), identity.rank)
    if owned:
        MPI.Finalize()
    return replace(identity, address=(host, int(port_text)), listen_fd=listen_fd)


def _first_reachable(hosts: list[str], port: int, rank: int) -> str:
    for host in hosts:
        with suppress(OSError), connect_first([host], port, _CONNECT_SECONDS):
            return host
    raise EnvironmentFault(f"rank {rank} cannot reach rank 0 as {' or '.join(hosts)} on port {port}: see the firewall")


def _start_as(identity: RankIdentity) -> bool:
    """Start MPI and check that the launcher and the library agree.

    If they disagree, each process would be an MPI job of its own.

    Returns:
        Whether the caller must finalise MPI.
    """
    if identity.launcher == "openmpi" and MPI.get_vendor()[0] in _MPICH_FAMILY:  # its start would end this process
        raise _another_mpi(identity, "which Open MPI's mpiexec cannot start")
    owned = start_mpi()
    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    if (identity.rank, identity.world_size) == (rank, size):
        return owned
    if identity.launcher in ("torchrun", "local"):
        raise EnvironmentFault(
            f"{identity.launcher} started {identity.world_size} ranks, but MPI sees {size}: start MPI with "
            "`mpiexec -n N ncclbench run ...`, or alone with --nproc N"
        )
    raise _another_mpi(identity, f"which says rank {rank} of {size}")


def _another_mpi(identity: RankIdentity, trouble: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"{identity.launcher}'s mpiexec started {identity.world_size} ranks, but mpi4py has loaded {library()}, "
        f"{trouble}: these would be {identity.world_size} independent jobs; use the mpiexec that came with the library"
    )


class MpiTransport(Transport):
    """One rank of an MPI job.

    Args:
        world: all ranks; it is duplicated, so that messages of its other users stay apart.
        capabilities: what the transport's module declares.
        owned: whether `close` finalises MPI.
        most: the largest count that one call takes; None uses the library's own.
        memory: the GPU that buffers are on; None if they are on the host.
        star: control messages on a separate network; None sends them over MPI.

    Attributes:
        staged: whether GPU buffers go through the host; None if buffers are on the host.
    """

    def __init__(
        self,
        world: MPI.Comm,
        *,
        capabilities: Capabilities = CAPABILITIES,
        owned: bool = False,
        most: int | None = None,
        memory: Memory | None = None,
        star: StarControl | None = None,
    ) -> None:
        """Duplicate `world`, once for data and once for control messages.

        With `star`, `world` itself is used for data: duplicating is a collective, and the first message to an
        unreachable rank ends an MPI job.
        """
        self.capabilities, self.name = capabilities, capabilities.name
        self.rank, self.world_size = world.rank, world.size
        self._owned, self._star = owned, star
        self.data, self._quiet = (world, MPI.COMM_NULL) if star else (world.Dup(), world.Dup())
        self.data.Set_errhandler(MPI.ERRORS_RETURN)
        if not star:
            self._quiet.Set_errhandler(MPI.ERRORS_RETURN)
        self.control: Control = star or MpiControl(self._quiet)
        measured = os.environ.get(_MEASURED_NETWORK) if star else None
        self._listeners = Listeners(self.control, measured) if measured else None
        self.elements = Elements(most or most_count())
        self._comms: dict[tuple[bytes, tuple[int, ...], tuple[int, ...]], MPI.Comm] = {}
        self._memory = memory
        self.device: Device = "cuda" if memory else "cpu"
        on_gpus = self.control.all_gather(np.array([memory is not None]))[:, 0]
        if on_gpus.any() and not on_gpus.all():  # their control messages would not match from here on
            without, having = np.flatnonzero(~on_gpus)[0], np.flatnonzero(on_gpus)[0]
            raise EnvironmentFault(
                f"rank {without} sees no GPU and rank {having} does: show each rank one, or use --device cpu"
            )
        self.ranks_per_gpu = ranks_per_gpu(self.control, memory.identity) if memory else 1
        if memory:  # if one rank must stage, all do, so that all are measured alike
            self.staged = not self.control.all_gather(np.array([self._is_cuda_aware(memory)])).all()

    def _is_cuda_aware(self, memory: Memory) -> bool:
        """Whether MPI takes device pointers, by a transfer; tried only if the library says so, since others crash."""
        if not library_says_cuda():
            return False
        send, recv = (device_bytes(_PROBE_BYTES) for _ in range(2))

        def exchange(out: Array, into: Array) -> None:
            MPI.COMM_SELF.Sendrecv([out, MPI.BYTE], dest=0, recvbuf=[into, MPI.BYTE], source=0)

        return transfer_arrives(memory, send, recv, exchange)

    def compile(self, schedule: Schedule, buffers: Buffers) -> Program:
        """Ready calls on the buffers' memory."""
        if any(isinstance(phase, Concurrent) for phase in schedule.phases):
            _need_threads()
        compiler = _MpiCompiler(self, self._memory, schedule, buffers)
        steps = compiler.steps()
        finish = self._memory.synchronize if self._memory else nothing
        return Program(steps, finish, tuple(dict.fromkeys(compiler.notes)))

    def split(self, layout: bytes, shape: tuple[int, ...], branch: Branch, color: int, key: int) -> MPI.Comm:
        known = (layout, shape, branch)
        if known not in self._comms:
            self._comms[known] = self.data.Split(color if color >= 0 else MPI.UNDEFINED, max(0, key))
            if color >= 0:
                self._comms[known].Set_errhandler(MPI.ERRORS_RETURN)
        return self._comms[known]

    def barrier(self) -> None:
        """Wait for all ranks, apart from the communicators that are measured."""
        if self._star:
            self._star.barrier()
        else:
            self._quiet.Barrier()

    def unreachable(self, ranks: Sequence[int], seconds: float) -> list[int]:
        """Those of `ranks` that do not answer on the measured network; empty if control messages use it as well."""
        return self._listeners.unreachable(ranks, seconds) if self._listeners else []

    @contextmanager
    def translating(self, what: str) -> Iterator[None]:
        """Convert MPI's errors to a `TransportError`."""
        try:
            yield
        except MPI.Exception as error:
            text = str(error).strip() or type(error).__name__
            raise TransportError(f"{what} on rank {self.rank}: {text.splitlines()[0]}") from error

    def describe(self) -> Facts:
        """Versions and the thread level, for the manifest."""
        return {
            "transport": self.name,
            "mpi_standard": ".".join(map(str, MPI.Get_version())),
            "mpi_library": library(),
            "mpi4py": mpi4py.__version__,
            "thread_level": thread_level(),
            "numpy": np.__version__,
            **(self._describe_memory(self._memory) if self._memory else {}),
        }

    def _describe_memory(self, memory: Memory) -> Facts:
        return {"staged": self.staged, "pci_bus_id": memory.pci, "ranks_per_gpu": self.ranks_per_gpu}

    def close(self) -> None:
        """Leave the job."""
        self.elements.free()
        own = (MPI.COMM_NULL, MPI.COMM_NULL) if self._star else (self.data, self._quiet)
        for comm in (*self._comms.values(), *own):
            if comm != MPI.COMM_NULL:
                comm.Free()
        BLOCKS.free_all()
        if self._listeners:
            self._listeners.close()
        if self._star:
            self._star.close()
        self._comms.clear()
        if self._owned:
            MPI.Finalize()


class _MpiCompiler(PhaseCompiler):
    """Calls of MPI on the buffers, or on their copies on the host where GPU buffers are staged.

    Attributes:
        notes: notes for the record on how the schedule is run.
    """

    def __init__(self, transport: MpiTransport, memory: Memory | None, schedule: Schedule, buffers: Buffers) -> None:
        """Compile for the rank of `transport`, on its communicators; `memory` is that of the buffers' GPU."""
        super().__init__(transport.rank, schedule, buffers)
        self._transport, self._memory, self._elements = transport, memory, transport.elements
        self._staging = Staging(memory, schedule, buffers, self.rank) if memory and transport.staged else None
        self._moved = self._staging.twins if self._staging else buffers
        self.notes: list[str] = []

    def collective(self, phase: Collective, branch: Branch) -> Call:
        """One call of the op's function."""
        comm, _, member = self._join(phase, branch)
        return self._where_buffers_are(phase, self._collective_call(phase, member, comm))

    def all_to_all_v(self, phase: AllToAllV, branch: Branch) -> Call:
        """One all-to-all with splits."""
        comm, index, member = self._join(phase, branch)
        call = self._uneven_call(phase, index, member, comm) if member >= 0 else nothing
        return self._where_buffers_are(phase, call)

    def exchange(self, phase: Exchange, branch: Branch) -> Call:
        """Non-blocking sends and receives, and copies for a rank's flows to itself."""
        return self._where_buffers_are(phase, self._exchange_call(phase, branch))

    def _where_buffers_are(self, phase: SimplePhase, call: Call) -> Call:
        """`call` with staging or synchronisation around it for GPU buffers; unchanged on the host."""
        if self._memory is None:
            return call
        if self._staging:
            return self._staging.around(phase, call)
        return after_synchronising(self._memory, call)

    def _join(self, phase: Collective | AllToAllV, branch: Branch) -> tuple[MPI.Comm, int, int]:
        """This rank's communicator in a phase, its group's index, and its index in the group (-1: in no group).

        One split makes the communicators of all groups; every rank of the job calls it.
        """
        where = np.argwhere(phase.groups == self.rank)
        index, member = (int(where[0, 0]), int(where[0, 1])) if len(where) else (-1, -1)
        if not branch and np.array_equal(phase.groups, np.arange(self._transport.world_size)[None]):
            return self._transport.data, index, member
        return self._transport.split(phase.groups.tobytes(), phase.groups.shape, branch, index, member), index, member

    def _collective_call(self, phase: Collective, member: int, comm: MPI.Comm) -> Call:
        dtype, buffers = self.dtype, self._moved
        if phase.op in _NEVER_IN_PLACE and phase.read == phase.write:
            raise Unable(f"MPI has {phase.op} in place only where every shard already lies in its own place")
        if phase.persistent:
            _need_persistent()
        if phase.overlap and phase.op is Op.BROADCAST and phase.read != phase.write:
            raise Unable("MPI broadcasts one buffer: out of place it is a copy too, which cannot be overlapped")
        datatype = self._elements.datatype(dtype, phase.count) if phase.op is not Op.BARRIER else MPI.BYTE
        self.notes += _remarks(phase, dtype, datatype, self._elements.most)
        if (
            self._transport.staged is False
            and phase.op in REDUCING
            and (phase.redop is Redop.AVG or not datatype.is_predefined)
        ):
            raise Unable(f"MPI itself has no {phase.redop} of {dtype.name}, and NumPy cannot compute it on a GPU")
        op = self._elements.op(dtype, phase.redop, datatype) if phase.op in REDUCING else MPI.OP_NULL
        if member < 0:
            return Split(nothing, nothing) if phase.overlap else nothing
        # In place, MPI's count covers the larger of what is read and what is written.
        written = phase.write_count if phase.read != phase.write else max(phase.read_count, phase.write_count)
        send, recv = (
            [buffers[name].view(np.uint8)[: count * dtype.itemsize], datatype]
            for name, count in ((phase.read, phase.read_count), (phase.write, written))
        )
        make = _persistent if phase.persistent else _nonblocking if phase.overlap else partial
        call = _rooted_call(make, phase, member, comm, send, recv, op)
        if phase.redop is Redop.AVG and phase.op in REDUCING and (member == phase.root or phase.op is not Op.REDUCE):
            divide = partial(_divide, buffers[phase.write][: phase.write_count], phase.members)
            return (
                Split(call.start, partial(_run_both, call.wait, divide))
                if isinstance(call, Split)
                else partial(_run_both, call, divide)
            )
        return call

    def _uneven_call(self, phase: AllToAllV, index: int, member: int, comm: MPI.Comm) -> Call:
        row = self._elements.row_of_bytes(phase.row_bytes)
        messages = []
        for name, nbytes in zip((phase.read, phase.write), phase.splits(index, member), strict=True):
            rows = nbytes // phase.row_bytes
            view = self._moved[name].view(np.uint8)[: int(nbytes.sum())]
            messages.append([view, rows.tolist(), (np.cumsum(rows) - rows).tolist(), row])
        return partial(comm.Alltoallv, *messages)

    def _exchange_call(self, phase: Exchange, branch: Branch) -> Call:
        transport, buffers = self._transport, self._moved
        world = np.arange(transport.world_size)
        comm = transport.split(world.tobytes(), world.shape, branch, 0, self.rank) if branch else transport.data
        send, recv = (buffers[name].view(np.uint8) for name in (phase.read, phase.write))
        datatypes = {int(nbytes): self._elements.bytes_datatype(int(nbytes)) for nbytes in np.unique(phase.nbytes)}
        sends: list[Callable[[], MPI.Request]] = []
        receives: list[Callable[[], MPI.Request]] = []
        copies: list[Call] = []
        for k in np.flatnonzero((phase.src == self.rank) | (phase.dst == self.rank)):
            src, dst, nbytes = int(phase.src[k]), int(phase.dst[k]), int(phase.nbytes[k])
            out = send[int(phase.send_offset[k]) :][:nbytes]
            into = recv[int(phase.recv_offset[k]) :][:nbytes]
            if src == dst:
                copies.append(partial(np.copyto, into, out))
            elif src == self.rank:
                sends.append(partial(comm.Isend, [out, datatypes[nbytes]], dst))
            else:
                receives.append(partial(comm.Irecv, [into, datatypes[nbytes]], src))
        # Receives first, so that no message waits in an unexpected-message buffer.
        return partial(_run_flows, receives + sends, copies) if receives or sends or copies else nothing


def _remarks(phase: Collective, dtype: Dtype, datatype: MPI.Datatype, most: int) -> list[str]:
    """Notes for the record on how a collective is run."""
    remarks = []
    if phase.op in REDUCING and phase.redop is Redop.AVG:
        remarks.append("MPI has no average: it is a sum, then a division on each rank that holds it, both timed")
    if phase.op in REDUCING and not datatype.is_predefined:
        remarks.append(f"MPI does not reduce {dtype.name} sent this way: NumPy does, called back by MPI")
    if phase.count > most:
        remarks.append(f"more than {most} elements: sent in rows of {datatype.Get_size() // dtype.itemsize}")
    if phase.op is Op.BROADCAST and phase.read != phase.write:
        remarks.append("MPI broadcasts one buffer: the root copies its own, timed")
    return remarks


def _rooted_call(
    make: Callable[..., Call],
    phase: Collective,
    member: int,
    comm: MPI.Comm,
    send: Message,
    recv: Message,
    op: MPI.Op,
) -> Call:
    root, is_root = phase.root, member == phase.root
    in_place = phase.read == phase.write
    match phase.op:
        case Op.REDUCE:
            source = MPI.IN_PLACE if in_place and is_root else send
            return make(comm.Reduce, source, recv if is_root else None, op=op, root=root)
        case Op.BROADCAST:
            call = make(comm.Bcast, send if is_root else recv, root=root)
            return partial(_run_both, call, partial(np.copyto, recv[0], send[0])) if is_root and not in_place else call
        case Op.GATHER:
            return make(comm.Gather, send, recv if is_root else None, root=root)
        case Op.SCATTER:
            return make(comm.Scatter, send if is_root else None, recv, root=root)
        case _:
            return _symmetric_call(make, phase.op, comm, MPI.IN_PLACE if in_place else send, recv, op)


def _symmetric_call(
    make: Callable[..., Call], what: Op, comm: MPI.Comm, source: Message, recv: Message, op: MPI.Op
) -> Call:
    match what:
        case Op.ALL_REDUCE:
            return make(comm.Allreduce, source, recv, op=op)
        case Op.ALL_GATHER:
            return make(comm.Allgather, source, recv)
        case Op.REDUCE_SCATTER:
            return make(comm.Reduce_scatter_block, source, recv, op=op)
        case Op.ALL_TO_ALL:
            return make(comm.Alltoall, source, recv)
        case Op.BARRIER:
            return make(comm.Barrier)
        case _:
            raise AssertionError(f"{what} has a root")


class _Prepared:
    """A persistent request, freed when its program is garbage-collected."""

    def __init__(self, request: MPI.Prequest) -> None:
        """Own `request`."""
        self._request = request

    def start(self) -> None:
        """Start the request."""
        self._request.Start()

    def wait(self) -> None:
        """Wait until it is complete; it can be started again."""
        self._request.Wait()

    def __del__(self) -> None:
        """Free the request."""
        if not MPI.Is_finalized():
            self._request.Free()


def _persistent(method: Callable[..., object], *args: Message, **keywords: object) -> Split:
    """As `partial`, with MPI-4's persistent form of the method: ``Allreduce_init`` for ``Allreduce``.

    MPI plans the collective once; each launch only starts it and waits for it.
    """
    comm: object = getattr(method, "__self__", None)
    prepared = _Prepared(getattr(comm, f"{method.__name__}_init")(*args, **keywords))
    return Split(prepared.start, prepared.wait)


def _nonblocking(method: Callable[..., object], *args: Message, **keywords: object) -> Split:
    """As `partial`, with the non-blocking form of the method: ``Iallreduce`` for ``Allreduce``."""
    comm: object = getattr(method, "__self__", None)
    begin: Callable[[], MPI.Request] = partial(getattr(comm, f"I{method.__name__.lower()}"), *args, **keywords)
    pending: list[MPI.Request] = []

    def start() -> None:
        pending.append(begin())

    def wait() -> None:
        pending.pop().Wait()

    return Split(start, wait)


def _need_threads() -> None:
    """Refuse concurrent branches unless MPI allows calls from several threads at once."""
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise Unable(f"concurrent branches need MPI_THREAD_MULTIPLE; this MPI grants {thread_level()}")


def _need_persistent() -> None:
    """Refuse persistent collectives if MPI has none; all ranks call it, so that all skip the case or none does."""
    try:
        MPI.COMM_SELF.Barrier_init().Free()
    except NotImplementedError:
        raise Unable(f"{library()} has no persistent collectives, which came with MPI-4") from None


def _run_both(first: Call, second: Call) -> None:
    first()
    second()


def _divide(total: Array, members: int) -> None:
    total[:] = finish_average(total, members)


def _run_flows(posts: list[Callable[[], MPI.Request]], copies: list[Call]) -> None:
    pending = [post() for post in posts]
    for copy in copies:
        copy()
    MPI.Request.Waitall(pending)
