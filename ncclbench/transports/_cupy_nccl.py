"""NCCL through CuPy's own bindings: a second implementation without torch in the data path and with little overhead.

The unique ids of communicators are exchanged as control messages, by gloo or MPI. All-to-alls, gathers and scatters are
grouped sends and receives, as NCCL defines them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np

try:
    import cupy
    from cupy.cuda import nccl
except ImportError as error:
    from ncclbench.errors import EnvironmentFault

    raise EnvironmentFault(
        f"the cupy_nccl transport needs CuPy for this machine's CUDA, cupy-cuda13x or cupy-cuda12x: {error}"
    ) from error

from ncclbench.buffers.arrays import Buffers, device_address
from ncclbench.buffers.kinds import Device
from ncclbench.buffers.nccl_library import NcclLibrary, first_trouble, loaded_nccl
from ncclbench.buffers.nccl_mem_alloc import BLOCKS
from ncclbench.errors import TransportError, Unable
from ncclbench.schedule.dtypes import Redop
from ncclbench.schedule.phases import REDUCING, AllToAllV, Collective, Concurrent, Exchange, Op
from ncclbench.schedule.schedule import Schedule
from ncclbench.transports._compiler import Branch, PhaseCompiler, refuse_mpi_only
from ncclbench.transports.base import Call, Control, Evidence, Facts, Program, RankIdentity, Step, Transport, nothing
from ncclbench.transports.capabilities import Capabilities
from ncclbench.transports.cuda.cupy_protocols import Communicator, CupyStream
from ncclbench.transports.cuda.gpu_ownership import choose_gpu, cupy_gpus, ranks_per_gpu
from ncclbench.transports.cuda.nccl_limits import branches_launches
from ncclbench.transports.cuda.nccl_log import NcclLog
from ncclbench.transports.cuda.nvml import gpu_identity, gpu_state
from ncclbench.transports.cuda.registration import register_buffers
from ncclbench.transports.cuda.stream import BranchMarks, CudaStream, gpu_id, nccl_version, refuse_float8_here

# ncclDataType_t and ncclRedOp_t of nccl.h; CuPy names only some of them.
_DTYPES = {
    **{"int8": 0, "uint8": 1, "int32": 2, "uint32": 3, "int64": 4, "uint64": 5},
    **{"float16": 6, "float32": 7, "float64": 8, "bfloat16": 9, "float8_e4m3fn": 10, "float8_e5m2": 11},
}
_BYTES = 1
# NCCL_UNIQUE_ID_BYTES of nccl.h. A unique id is bytes in CuPy 14, and a tuple of signed chars before.
_ID_BYTES = 128
_IDS_ARE_BYTES = int(cupy.__version__.split(".")[0]) >= 14
_REDOPS = {Redop.SUM: 0, Redop.PROD: 1, Redop.MAX: 2, Redop.MIN: 3, Redop.AVG: 4}


def open_transport(capabilities: Capabilities, identity: RankIdentity, timeout: float) -> "CupyNcclTransport":
    """Join the job as `identity`.

    Raises:
        EnvironmentFault: if there is no GPU for this rank, or no rendezvous with the other ranks.
    """
    from ncclbench.transports.gloo import open_transport as open_gloo

    device = choose_gpu(identity, cupy_gpus("--transport gloo"))
    log = NcclLog.switch_on()
    on_cpus = open_gloo("gloo", identity, timeout)
    cupy.cuda.Device(device).use()
    sharing = ranks_per_gpu(on_cpus.control, gpu_id(device))
    return CupyNcclTransport(capabilities, identity, on_cpus, log, sharing)


class CupyNcclTransport(Transport):
    """One rank of an NCCL job, without torch in the data path."""

    device: Device = "cuda"
    stream: CudaStream

    def __init__(
        self, capabilities: Capabilities, identity: RankIdentity, on_cpus: Transport, log: NcclLog, sharing: int = 1
    ) -> None:
        """Use the transport `on_cpus` for control messages and barriers; `sharing` ranks share each GPU."""
        self.capabilities, self.name = capabilities, capabilities.name
        self.ranks_per_gpu = sharing
        self.rank, self.world_size = identity.rank, identity.world_size
        self._on_cpus = on_cpus
        self.control: Control = on_cpus.control
        self._cupy_stream: CupyStream = cupy.cuda.Stream(non_blocking=True)
        self.stream = CudaStream(self._cupy_stream, device_barrier=self._all_reduce_token)
        self._pci = cupy.cuda.runtime.deviceGetPCIBusId(cupy.cuda.runtime.getDevice())
        self._log = log
        self._communicators: dict[tuple[tuple[int, ...], Branch], Communicator | None] = {}
        self._branch_streams: dict[Branch, CupyStream] = {(): self._cupy_stream}
        world = self.communicator(tuple(range(self.world_size)))  # connect now, not in the first case
        assert world is not None, "this rank is in the world"
        self._world = world
        self._token = cupy.zeros(1, np.int32)
        self._library = NcclLibrary.only()

    def communicator(self, ranks: tuple[int, ...], branch: Branch = ()) -> Communicator | None:
        """The communicator of `ranks`; None on other ranks. All ranks of the job call this in the same order.

        Branches of a concurrent phase run at the same time, so each has its own communicator.
        """
        key = ranks, branch
        if key not in self._communicators:
            # An id opens a listening socket and a thread that waits for all members, so only one rank makes it.
            fresh = nccl.get_unique_id() if ranks[0] == self.rank else bytes(_ID_BYTES)
            mine = np.array([b & 0xFF for b in fresh], np.uint8)
            shared = self.control.all_gather(mine)[ranks[0]]
            unique_id = shared.tobytes() if _IDS_ARE_BYTES else tuple(shared.view(np.int8).tolist())
            member = ranks.index(self.rank) if self.rank in ranks else -1
            made = nccl.NcclCommunicator(len(ranks), unique_id, member) if member >= 0 else None
            self._communicators[key] = made
        return self._communicators[key]

    def _all_reduce_token(self) -> None:
        token = device_address(self._token)
        self._world.allReduce(token, token, 1, _DTYPES["int32"], _REDOPS[Redop.SUM], self._cupy_stream.ptr)

    def stream_of(self, branch: Branch) -> CupyStream:
        """The stream of a branch; outside branches the transport's own."""
        if branch not in self._branch_streams:
            self._branch_streams[branch] = cupy.cuda.Stream(non_blocking=True)
        return self._branch_streams[branch]

    def compile(self, schedule: Schedule, buffers: Buffers) -> Program:
        """Ready calls on the buffers' addresses."""
        steps = _CupyCompiler(self, schedule, buffers).steps()
        self.registered = register_buffers(self.control, self._addresses(), buffers)
        return Program(steps, finish=self.stream.synchronize)

    def _addresses(self) -> list[int]:
        """NCCL's pointers to this rank's communicators; from a copy, since the watchdog calls this from its thread."""
        return [int(made.comm) for made in list(self._communicators.values()) if made is not None]

    def branches_step(self, phase: Concurrent, branches: Sequence[Sequence[Call]]) -> Step:
        """One stream per branch; this thread issues all of them.

        NCCL needs the calls of concurrent communicators in the same order on all ranks. Threads would not keep it.
        """
        main, marks = self._cupy_stream, BranchMarks()
        streams = [self.stream_of((b,)) for b in range(len(branches))]

        def run() -> None:
            begun, ended = marks.begin(main), []
            for stream, calls in zip(streams, branches, strict=True):
                stream.wait_event(begun)
                stream.use()
                for call in calls:
                    call()
                ended.append(marks.end(stream))
            main.use()
            for end in ended:
                main.wait_event(end)

        launches = branches_launches(phase)
        return Step(phase.label, run, phase.names, marks.last if phase.names else None, launches)

    def trouble(self) -> str | None:
        """An asynchronous error of NCCL, after which its kernels never end."""
        return first_trouble(self._library, self._addresses()) if self._library else None

    def barrier(self) -> None:
        """Wait for all ranks, on the CPU."""
        self._on_cpus.barrier()

    @contextmanager
    def translating(self, what: str) -> Iterator[None]:
        """Convert errors of NCCL, CUDA and the control transport to a `TransportError`."""
        try:
            with self._on_cpus.translating(what):
                yield
        except (nccl.NcclError, cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.memory.OutOfMemoryError) as error:
            raise TransportError(f"{what} on rank {self.rank}: {error}") from error

    def describe(self) -> Facts:
        """Versions for the manifest."""
        return {
            "transport": self.name,
            "cupy": cupy.__version__,
            "pci_bus_id": self._pci,
            "device": gpu_identity(self._pci),
            "ranks_per_gpu": self.ranks_per_gpu,
            "nccl": nccl_version(),
            "nccl_library": loaded_nccl(),
            "control": dict(self._on_cpus.describe()),
        }

    def evidence(self) -> Evidence:
        """NCCL's log so far, and the GPU's state."""
        return Evidence(path=self._log.read(), gpu=gpu_state(self._pci))

    def close(self) -> None:
        """Destroy the communicators and leave the job."""
        self.stream.synchronize()
        self._log.remove()
        BLOCKS.deregister_all()
        for communicator in self._communicators.values():
            if communicator is not None:
                communicator.destroy()
        BLOCKS.free_all()
        self._on_cpus.close()


class _CupyCompiler(PhaseCompiler):
    """Calls of NCCL on the buffers' addresses."""

    def __init__(self, transport: CupyNcclTransport, schedule: Schedule, buffers: Buffers) -> None:
        """Compile for the rank of `transport`, on its communicators and streams."""
        super().__init__(transport.rank, schedule, buffers)
        self._transport = transport

    def collective(self, phase: Collective, branch: Branch) -> Call:
        """One call of the op's function, or a group of sends and receives where NCCL has none."""
        refuse_mpi_only(phase, "NCCL has")
        refuse_float8_here(phase, self.dtype)
        _, member, comm = self._join(phase, branch)
        if comm is None:
            return nothing
        return self._collective_call(phase, member, comm, self._transport.stream_of(branch).ptr)

    def all_to_all_v(self, phase: AllToAllV, branch: Branch) -> Call:
        """One group of sends and receives."""
        group, member, comm = self._join(phase, branch)
        if comm is None:
            return nothing
        return self._uneven_call(phase, group, member, comm, self._transport.stream_of(branch).ptr)

    def concurrent(self, phase: Concurrent, branches: Sequence[Sequence[Call]]) -> Step:
        """One stream per branch."""
        return self._transport.branches_step(phase, branches)

    def _join(self, phase: Collective | AllToAllV, branch: Branch) -> tuple[int, int, Communicator | None]:
        """This rank's group in a phase, its index there, and the communicator; (-1, -1, None) outside all groups."""
        found: tuple[int, int, Communicator | None] = -1, -1, None
        for g, ranks in enumerate(phase.groups.tolist()):
            communicator = self._transport.communicator(tuple(ranks), branch)
            if self.rank in ranks:
                found = g, ranks.index(self.rank), communicator
        return found

    def _collective_call(self, phase: Collective, me: int, comm: Communicator, stream: int) -> Call:
        dtype, buffers = self.dtype, self.buffers
        send, recv = device_address(buffers[phase.read]), device_address(buffers[phase.write])
        # 8-bit elements that are only moved are sent as bytes, since older versions of NCCL have no 8-bit floats.
        moved = dtype.itemsize == 1 and phase.op not in REDUCING
        kind, redop, count = _BYTES if moved else _DTYPES[dtype.name], _REDOPS[phase.redop], phase.count
        match phase.op:
            case Op.ALL_REDUCE:
                return partial(comm.allReduce, send, recv, count, kind, redop, stream)
            case Op.REDUCE_SCATTER:
                return partial(comm.reduceScatter, send, recv, count, kind, redop, stream)
            case Op.ALL_GATHER:
                return partial(comm.allGather, send, recv, count, kind, stream)
            case Op.BROADCAST:
                return partial(comm.broadcast, send, recv, count, kind, phase.root, stream)
            case Op.REDUCE:
                return partial(comm.reduce, send, recv, count, kind, redop, phase.root, stream)
            case Op.BARRIER:
                raise Unable("NCCL has no barrier")
            case _:
                return _grouped(comm, stream, *_shard_messages(phase, me, send, recv, count * dtype.itemsize))

    def _uneven_call(self, phase: AllToAllV, group: int, me: int, comm: Communicator, stream: int) -> Call:
        buffers = self.buffers
        sent, received = phase.splits(group, me)
        starts, lands = np.cumsum(sent) - sent, np.cumsum(received) - received
        send, recv = device_address(buffers[phase.read]), device_address(buffers[phase.write])
        peers = range(phase.groups.shape[1])
        sends = [(send + int(starts[p]), int(sent[p]), p) for p in peers if sent[p]]
        receives = [(recv + int(lands[p]), int(received[p]), p) for p in peers if received[p]]
        return _grouped(comm, stream, sends, receives)

    def exchange(self, phase: Exchange, branch: Branch) -> Call:
        """One group of sends and receives."""
        transport, buffers = self._transport, self.buffers
        comm = transport.communicator(tuple(range(transport.world_size)), branch)
        assert comm is not None, "this rank is in the world"
        send, recv = device_address(buffers[phase.read]), device_address(buffers[phase.write])
        sends = [
            (send + int(phase.send_offset[k]), int(phase.nbytes[k]), int(phase.dst[k]))
            for k in np.flatnonzero(phase.src == self.rank)
        ]
        receives = [
            (recv + int(phase.recv_offset[k]), int(phase.nbytes[k]), int(phase.src[k]))
            for k in np.flatnonzero(phase.dst == self.rank)
        ]
        return _grouped(comm, transport.stream_of(branch).ptr, sends, receives)


def _grouped(
    comm: Communicator, stream: int, sends: Sequence[tuple[int, int, int]], receives: Sequence[tuple[int, int, int]]
) -> Call:
    """One group of sends and receives, each an address, a number of bytes and a peer."""
    if not sends and not receives:
        return nothing

    def launch() -> None:
        nccl.groupStart()
        for address, nbytes, peer in sends:
            comm.send(address, nbytes, _BYTES, peer, stream)
        for address, nbytes, peer in receives:
            comm.recv(address, nbytes, _BYTES, peer, stream)
        nccl.groupEnd()

    return launch


def _shard_messages(
    phase: Collective, me: int, send: int, recv: int, shard: int
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """Sends and receives of an op that moves shards between pairs: all_to_all, gather, scatter."""
    peers, root = range(phase.members), phase.root
    sends_to_all = [(send + p * shard, shard, p) for p in peers]
    receives_from_all = [(recv + p * shard, shard, p) for p in peers]
    if phase.op is Op.ALL_TO_ALL:
        return sends_to_all, receives_from_all
    if phase.op is Op.GATHER:
        return [(send, shard, root)], receives_from_all if me == root else []
    assert phase.op is Op.SCATTER
    return sends_to_all if me == root else [], [(recv, shard, root)]
