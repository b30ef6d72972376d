"""NCCL through CuPy's own bindings: no torch in the data path, a second opinion with little above the library.

Communicators are made from unique ids that travel over the control plane, which is gloo's or MPI's. All-to-alls,
gathers and scatters are grouped sends and receives, as NCCL has them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

try:
    import cupy
    from cupy.cuda import nccl
except ImportError as error:
    from ncclbench.errors import EnvironmentFault

    raise EnvironmentFault(
        f"the cupy_nccl transport needs CuPy for this machine's CUDA, cupy-cuda13x or cupy-cuda12x: {error}"
    ) from error

from ncclbench.buffers.arrays import Buffers, Device
from ncclbench.buffers.nccl_library import NcclLibrary, first_trouble, loaded_nccl
from ncclbench.buffers.nccl_mem_alloc import BLOCKS
from ncclbench.errors import TransportError, Unable
from ncclbench.schedule.dtypes import Dtype, Redop
from ncclbench.schedule.phases import REDUCING, AllToAllV, Collective, Concurrent, Exchange, Local, Op, SimplePhase
from ncclbench.schedule.row_work import RowWork
from ncclbench.schedule.schedule import Schedule
from ncclbench.transports._local import branches_launches, local_call, refuse_what_only_mpi_has, steps_of
from ncclbench.transports.base import Call, Control, Program, Seat, Step, nothing
from ncclbench.transports.cuda.gpu_ownership import claim_gpu, cupy_gpus, ranks_per_gpu
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
# NCCL_UNIQUE_ID_BYTES of nccl.h. CuPy 14 has unique ids as bytes, older ones as a tuple of signed chars.
_ID_BYTES = 128
_IDS_ARE_BYTES = int(cupy.__version__.split(".")[0]) >= 14
_REDOPS = {Redop.SUM: 0, Redop.PROD: 1, Redop.MAX: 2, Redop.MIN: 3, Redop.AVG: 4}


# Control messages meet as torch does.
NEEDS_STORE = True


def open_transport(_name: str, seat: Seat, timeout: float) -> "CupyNcclTransport":
    """Join the job as `seat`.

    Raises:
        EnvironmentFault: if there is no GPU for this rank, or nothing to meet the other ranks over.
    """
    from ncclbench.transports.torch_dist import open_transport as open_torch

    device = claim_gpu(seat, cupy_gpus("--transport gloo"))
    log = NcclLog.switch_on()
    meeting = open_torch("gloo", seat, timeout)
    cupy.cuda.Device(device).use()
    sharing = ranks_per_gpu(meeting.control, gpu_id(device))
    return CupyNcclTransport(seat, meeting, log, sharing)


class CupyNcclTransport:
    """One rank of an NCCL job, without torch in the data path."""

    name = "cupy_nccl"
    device: Device = "cuda"

    def __init__(self, seat: Seat, meeting: Any, log: NcclLog, sharing: int = 1) -> None:
        """Use the transport `meeting`, a CPU one, for control messages and barriers; `sharing` ranks have one GPU."""
        self.ranks_per_gpu = sharing
        self.rank, self.world_size = seat.rank, seat.world_size
        self._meeting = meeting
        self.control: Control = meeting.control
        self._cupy_stream = cupy.cuda.Stream(non_blocking=True)
        self.stream = CudaStream(self._cupy_stream, line_up=self._all_reduce_token)
        self._pci = cupy.cuda.runtime.deviceGetPCIBusId(cupy.cuda.runtime.getDevice())
        self._log = log
        self._communicators: dict[tuple[tuple[int, ...], tuple[int, ...]], Any] = {}
        self.registered = False
        self._branch_streams: dict[tuple[int, ...], Any] = {(): self._cupy_stream}
        self._world = self._communicator(tuple(range(self.world_size)))  # set-up is eager, not inside the first case
        self._token = cupy.zeros(1, np.int32)
        self._library = NcclLibrary.only()

    def _communicator(self, ranks: tuple[int, ...], branch: tuple[int, ...] = ()) -> Any:
        """The communicator of `ranks`, or None on others; all ranks of the job ask in the same order.

        What runs at the same time must not share one, so each branch of a concurrent phase has its own.
        """
        key = ranks, branch
        if key not in self._communicators:
            # An id is a socket that listens and a thread that waits until all members have come: one rank makes it.
            fresh = nccl.get_unique_id() if ranks[0] == self.rank else bytes(_ID_BYTES)
            mine = np.array([b & 0xFF for b in fresh], np.uint8)
            shared = self.control.all_gather(mine)[ranks[0]]
            identity = shared.tobytes() if _IDS_ARE_BYTES else tuple(shared.view(np.int8).tolist())
            member = ranks.index(self.rank) if self.rank in ranks else -1
            made = nccl.NcclCommunicator(len(ranks), identity, member) if member >= 0 else None
            self._communicators[key] = made
        return self._communicators[key]

    def _all_reduce_token(self) -> None:
        token = address(self._token)
        self._world.allReduce(token, token, 1, _DTYPES["int32"], _REDOPS[Redop.SUM], self._cupy_stream.ptr)

    def _stream_of(self, branch: tuple[int, ...]) -> Any:
        """The stream that a branch's phases are launched on; outside branches the transport's own."""
        if branch not in self._branch_streams:
            self._branch_streams[branch] = cupy.cuda.Stream(non_blocking=True)
        return self._branch_streams[branch]

    def compile(self, schedule: Schedule, buffers: Buffers) -> Program:
        """Ready calls on the buffers' addresses."""

        def call(phase: SimplePhase, branch: tuple[int, ...]) -> Call:
            return self._call(phase, schedule.dtype, buffers, branch)

        steps = steps_of(schedule.phases, call, self._branches_step)
        self.registered = register_buffers(self.control, self._addresses(), buffers)
        return Program(steps, finish=self.stream.synchronize)

    def _addresses(self) -> list[int]:
        """Where NCCL has this rank's communicators; of a copy, since the watchdog asks while more are made."""
        return [int(made.comm) for made in list(self._communicators.values()) if made is not None]

    def _branches_step(self, phase: Concurrent, branches: Sequence[Sequence[Call]]) -> Step:
        """Branches on streams of their own, all issued by this one thread.

        NCCL needs communicators that run at the same time to be issued in the same order on all ranks; threads would
        not keep one.
        """
        main, marks = self._cupy_stream, BranchMarks()
        streams = [self._stream_of((b,)) for b in range(len(branches))]

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

    def _call(self, phase: SimplePhase, dtype: Dtype, buffers: Buffers, branch: tuple[int, ...]) -> Call:
        if isinstance(phase, Local | RowWork):
            return local_call(phase, self.rank, buffers)
        if isinstance(phase, Exchange):
            return self._exchange_call(phase, buffers, branch)
        if isinstance(phase, Collective):
            refuse_what_only_mpi_has(phase, "NCCL has")
            refuse_float8_here(phase, dtype)
        found: Call = nothing
        for g, ranks in enumerate(phase.groups.tolist()):
            communicator = self._communicator(tuple(ranks), branch)
            if self.rank in ranks:
                member, stream = ranks.index(self.rank), self._stream_of(branch).ptr
                if isinstance(phase, AllToAllV):
                    found = self._uneven_call(phase, g, member, communicator, stream, buffers)
                else:
                    found = self._collective_call(phase, member, communicator, stream, dtype, buffers)
        return found

    def _collective_call(
        self, phase: Collective, me: int, comm: Any, stream: int, dtype: Dtype, buffers: Buffers
    ) -> Call:
        send, recv = address(buffers[phase.read]), address(buffers[phase.write])
        # What is only moved is bytes to an NCCL that has no floats of 8 bits.
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

    def _uneven_call(self, phase: AllToAllV, group: int, me: int, comm: Any, stream: int, buffers: Buffers) -> Call:
        sent, received = phase.splits(group, me)
        starts, lands = np.cumsum(sent) - sent, np.cumsum(received) - received
        send, recv = address(buffers[phase.read]), address(buffers[phase.write])
        peers = range(phase.groups.shape[1])
        sends = [(send + int(starts[p]), int(sent[p]), p) for p in peers if sent[p]]
        receives = [(recv + int(lands[p]), int(received[p]), p) for p in peers if received[p]]
        return _grouped(comm, stream, sends, receives)

    def _exchange_call(self, phase: Exchange, buffers: Buffers, branch: tuple[int, ...]) -> Call:
        comm = self._communicator(tuple(range(self.world_size)), branch)
        send, recv = address(buffers[phase.read]), address(buffers[phase.write])
        sends = [
            (send + int(phase.send_offset[k]), int(phase.nbytes[k]), int(phase.dst[k]))
            for k in np.flatnonzero(phase.src == self.rank)
        ]
        receives = [
            (recv + int(phase.recv_offset[k]), int(phase.nbytes[k]), int(phase.src[k]))
            for k in np.flatnonzero(phase.dst == self.rank)
        ]
        return _grouped(comm, self._stream_of(branch).ptr, sends, receives)

    def trouble(self) -> str | None:
        """An asynchronous error of NCCL, behind which its kernels would wait for ever."""
        return first_trouble(self._library, self._addresses()) if self._library else None

    def barrier(self) -> None:
        """Wait for all ranks, on the CPU."""
        self._meeting.barrier()

    @contextmanager
    def translating(self, what: str) -> Iterator[None]:
        """Errors of NCCL, CUDA and the control plane become a `TransportError`."""
        try:
            with self._meeting.translating(what):
                yield
        except (nccl.NcclError, cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.memory.OutOfMemoryError) as error:
            raise TransportError(f"{what} on rank {self.rank}: {error}") from error

    def describe(self) -> Mapping[str, Any]:
        """Versions for the manifest."""
        return {
            "transport": self.name,
            "cupy": cupy.__version__,
            "pci_bus_id": self._pci,
            "device": gpu_identity(self._pci),
            "ranks_per_gpu": self.ranks_per_gpu,
            "nccl": nccl_version(),
            "nccl_library": loaded_nccl(),
            "control": dict(self._meeting.describe()),
        }

    def evidence(self) -> Mapping[str, Any]:
        """NCCL's log so far, and the GPU's state."""
        return {"path": self._log.read(), "gpu": gpu_state(self._pci)}

    def close(self) -> None:
        """Give the communicators back, and leave the job."""
        self.stream.synchronize()
        self._log.remove()
        BLOCKS.deregister_all()
        for communicator in self._communicators.values():
            if communicator is not None:
                communicator.destroy()
        BLOCKS.free_all()
        self._meeting.close()


def address(array: Any) -> int:
    """Where a CuPy array lies on the device."""
    return int(array.data.ptr)


def _grouped(
    comm: Any, stream: int, sends: Sequence[tuple[int, int, int]], receives: Sequence[tuple[int, int, int]]
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
    everyone_out = [(send + p * shard, shard, p) for p in peers]
    everyone_in = [(recv + p * shard, shard, p) for p in peers]
    if phase.op is Op.ALL_TO_ALL:
        return everyone_out, everyone_in
    if phase.op is Op.GATHER:
        return [(send, shard, root)], everyone_in if me == root else []
    assert phase.op is Op.SCATTER
    return everyone_out if me == root else [], [(recv, shard, root)]
