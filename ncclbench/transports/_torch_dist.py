"""torch.distributed: gloo on CPUs, NCCL on GPUs, one implementation.

Differences between torch versions are handled here: 2.13 deprecates ``reduce_scatter_tensor`` and
``all_gather_into_tensor`` for ``*_single`` names.
"""

import datetime
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from ncclbench.buffers.arrays import Buffers
from ncclbench.buffers.kinds import Device
from ncclbench.buffers.nccl_library import NcclLibrary, first_trouble, loaded_nccl
from ncclbench.buffers.nccl_mem_alloc import BLOCKS
from ncclbench.errors import EnvironmentFault, TransportError, Unable
from ncclbench.schedule.dtypes import Array, Redop
from ncclbench.schedule.phases import REDUCING, AllToAllV, Collective, Concurrent, Exchange, Op
from ncclbench.schedule.schedule import Schedule
from ncclbench.transports._compiler import Branch, PhaseCompiler, refuse_mpi_only
from ncclbench.transports._tcp_probe import Listeners
from ncclbench.transports.base import (
    CONTROL_NETWORK,
    Call,
    Evidence,
    Facts,
    Program,
    RankIdentity,
    Step,
    Transport,
    nothing,
)
from ncclbench.transports.capabilities import Capabilities
from ncclbench.transports.cuda.gpu_ownership import choose_gpu, cupy_gpus, ranks_per_gpu, refuse_shared
from ncclbench.transports.cuda.nccl_limits import branches_launches
from ncclbench.transports.cuda.nccl_log import NcclLog
from ncclbench.transports.cuda.nvml import gpu_identity, gpu_state
from ncclbench.transports.cuda.registration import register_buffers

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_GLOO_NETWORK = "GLOO_SOCKET_IFNAME"

# Types that some of torch's backends lack, and the type that carries them where they are only moved.
_MOVED_AS = {"float8_e4m3fn": "uint8", "float8_e5m2": "uint8", "uint32": "int32", "uint64": "int64"}
_NEVER_REDUCED = ("uint32", "uint64")

_REDOPS = {
    Redop.SUM: dist.ReduceOp.SUM,
    Redop.PROD: dist.ReduceOp.PRODUCT,
    Redop.MIN: dist.ReduceOp.MIN,
    Redop.MAX: dist.ReduceOp.MAX,
    Redop.AVG: dist.ReduceOp.AVG,
}


def open_transport(capabilities: Capabilities, identity: RankIdentity, timeout: float) -> "TorchTransport":
    """Join the job as `identity` with the backend that `capabilities` names, ``gloo`` or ``nccl``.

    Raises:
        EnvironmentFault: if the backend is not in this torch, there is no GPU for this rank, or the rendezvous fails.
    """
    name, limit = capabilities.name, datetime.timedelta(seconds=timeout)
    if os.environ.get(CONTROL_NETWORK):
        # Connect at first use: a link that is down must not prevent the measurement of the others.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    available = dist.is_nccl_available() if name == "nccl" else dist.is_gloo_available()
    if not available:
        raise EnvironmentFault(f"this torch ({torch.__version__}) was built without {name}; use --transport gloo")
    device, log = (_choose_gpu(identity), NcclLog.switch_on()) if name == "nccl" else (None, None)
    try:
        store = _open_store(identity, limit)
        if device is not None:
            from ncclbench.transports.cuda.stream import gpu_id

            # torchrun's store is kept when torchrun restarts the ranks.
            shared = PrefixStore(f"gpus/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            refuse_shared(shared, identity.rank, identity.world_size, gpu_id(device.index))
        dist.init_process_group(
            name, store=store, rank=identity.rank, world_size=identity.world_size, timeout=limit, device_id=device
        )
        return TorchTransport(capabilities, log)
    except (RuntimeError, ValueError) as error:
        raise TransportError(f"rank {identity.rank} could not join the {name} job: {first_line(error)}") from error


def _open_store(identity: RankIdentity, limit: datetime.timedelta) -> Store:
    """The store that all ranks share."""
    if identity.address is None:  # torchrun has a store, and names its address in variables
        store: Store
        store, _, _ = next(rendezvous("env://", identity.rank, identity.world_size, timeout=limit))
        store.set_timeout(limit)
        return store
    host, port = identity.address
    return TCPStore(
        host,
        port,
        identity.world_size,
        is_master=identity.rank == 0,
        timeout=limit,
        master_listen_fd=identity.listen_fd,
    )


def _choose_gpu(identity: RankIdentity) -> torch.device:
    """This rank's GPU, made current for torch and for CuPy."""
    cupy_gpus("--transport gloo")
    # The watchdog names the rank that failed. torch's own would end this process with SIGABRT before that.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    index = choose_gpu(identity, torch.cuda.device_count())
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


class _TorchGraphs:
    """CUDA graphs by torch, whose process groups have their own rules for capture."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        """Capture on `stream`."""
        self._stream = stream

    def __call__(self, launches: Sequence[Call]) -> Call:
        """One call that replays `launches`."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            for launch in launches:
                launch()
        return graph.replay


class TorchControl:
    """Control messages over their own gloo group, for every backend."""

    def __init__(self, group: dist.ProcessGroup | None, rank: int, world_size: int) -> None:
        """Use `group`, a process group that holds all ranks."""
        self.group, self._rank, self._world_size = group, rank, world_size

    def gather(self, array: Array) -> Array | None:
        """All ranks' arrays, on rank 0."""
        own = torch.from_numpy(np.ascontiguousarray(array))
        gathered = [torch.empty_like(own) for _ in range(self._world_size)] if self._rank == 0 else None
        dist.gather(own, gathered, dst=0, group=self.group)
        return torch.stack(gathered).numpy() if gathered else None

    def all_gather(self, array: Array) -> Array:
        """All ranks' arrays, on every rank."""
        own = torch.from_numpy(np.array(array))
        gathered = [torch.empty_like(own) for _ in range(self._world_size)]
        dist.all_gather(gathered, own, group=self.group)
        stacked: Array = torch.stack(gathered).numpy()
        return stacked

    def broadcast(self, array: Array) -> Array:
        """Rank 0's array, on every rank."""
        own = torch.from_numpy(np.array(array))
        dist.broadcast(own, src=0, group=self.group)
        return np.asarray(own.numpy())


def _control_group() -> tuple[dist.ProcessGroup | None, bool]:
    """A gloo group for control messages, and whether it uses a separate network.

    gloo reads ``GLOO_SOCKET_IFNAME`` whenever a group is made. ``NCCLBENCH_CONTROL_IFNAME`` names another interface for
    this group. Control messages then do not queue behind measured ones, and do not fail with their link.
    """
    network = os.environ.get(CONTROL_NETWORK)
    if not network:
        return dist.new_group(backend="gloo"), False
    measured = os.environ.get(_GLOO_NETWORK)
    os.environ[_GLOO_NETWORK] = network
    try:
        return dist.new_group(backend="gloo"), True
    finally:
        if measured is None:
            del os.environ[_GLOO_NETWORK]
        else:
            os.environ[_GLOO_NETWORK] = measured


class TorchTransport(Transport):
    """One rank of a torch.distributed job."""

    def __init__(self, capabilities: Capabilities, log: NcclLog | None) -> None:
        """Wrap the default process group, and make a gloo group for control messages."""
        self.capabilities = capabilities
        self.name = name = capabilities.name
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device: Device = "cuda" if name == "nccl" else "cpu"
        control_group, apart = _control_group()
        self._start_group: dist.ProcessGroup | None = control_group if apart or name == "nccl" else None
        self._messages = TorchControl(control_group, self.rank, self.world_size)
        self.control = self._messages
        # Without a separate control network, a dead link ends the job anyway.
        measured = os.environ.get(_GLOO_NETWORK) if apart and name == "gloo" else None
        self._listeners = Listeners(self.control, measured) if measured else None
        self._groups: dict[tuple[tuple[int, ...], tuple[int, ...]], dist.ProcessGroup] = {}
        self._library: NcclLibrary | None = None
        self._communicators: list[int] = []
        if log is not None:
            self._open_device(log)

    def _open_device(self, log: NcclLog) -> None:
        """Use one stream for everything that is timed, in CuPy and in torch."""
        import cupy

        from ncclbench.transports.cuda.stream import CudaStream, gpu_id

        device = torch.cuda.current_device()
        cupy.cuda.Device(device).use()
        self.ranks_per_gpu = ranks_per_gpu(self.control, gpu_id(device))
        own = cupy.cuda.Stream(non_blocking=True)
        external = torch.cuda.ExternalStream(own.ptr)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(external)
        token = torch.zeros(1, device=torch.device("cuda", device))
        self.stream = CudaStream(own, _TorchGraphs(external), partial(dist.all_reduce, token))
        self._library = NcclLibrary.only()
        self._log, self._pci = log, cupy.cuda.runtime.deviceGetPCIBusId(device)

    def compile(self, schedule: Schedule, buffers: Buffers) -> Program:
        """Ready calls on tensors that share the buffers' memory."""
        steps = _TorchCompiler(self, schedule, buffers).steps()
        if self.stream is None:
            return Program(steps)
        self._communicators = self._addresses()
        self.registered = register_buffers(self.control, self._communicators, buffers)
        return Program(steps, finish=self.stream.synchronize)

    def _addresses(self) -> list[int]:
        """NCCL's pointers to this rank's communicators: those that exist, if this version of torch has them."""
        found = []
        for group in (dist.group.WORLD, *self._groups.values()):
            backend = group._get_backend(torch.device("cuda")) if isinstance(group, dist.ProcessGroup) else None
            pointer: Callable[[], int] | None = getattr(backend, "_comm_ptr", None)
            found.append(int(pointer()) if pointer is not None else 0)
        return [address for address in found if address]

    def trouble(self) -> str | None:
        """An asynchronous error of NCCL, after which its kernels never end."""
        return first_trouble(self._library, self._communicators) if self._library else None

    def group(self, ranks: tuple[int, ...], branch: Branch) -> dist.ProcessGroup | None:
        """The process group of `ranks`, made when first needed; all ranks of the job call this in the same order.

        The world is None, as in the calls that users write: torch looks up a named group at every call.
        """
        if ranks == tuple(range(self.world_size)) and not branch:
            return None
        if (ranks, branch) not in self._groups:
            self._groups[ranks, branch] = dist.new_group(list(ranks), backend=self.name)
        return self._groups[ranks, branch]

    def barrier(self) -> None:
        """Wait for all ranks, on the CPU.

        With gloo the barrier uses the measured group itself. Each gloo group has its own worker threads. After a
        barrier on another group these would still sleep when the first call arrives (20 us at 1 KiB).

        With a separate control network the barrier goes there. On the measured network, its last messages would queue
        behind the data of ranks that have already passed it.
        """
        dist.barrier(group=self._start_group)

    def unreachable(self, ranks: Sequence[int], seconds: float) -> list[int]:
        """Those of `ranks` that do not answer on the measured network; empty if control messages use it as well."""
        return self._listeners.unreachable(ranks, seconds) if self._listeners else []

    @contextmanager
    def translating(self, what: str) -> Iterator[None]:
        """Convert torch's RuntimeErrors to a `TransportError`."""
        try:
            yield
        except RuntimeError as error:
            raise TransportError(f"{what} on rank {self.rank}: {first_line(error)}") from error

    def describe(self) -> Facts:
        """Versions for the manifest."""
        versions = {"transport": self.name, "torch": str(torch.__version__), "numpy": np.__version__}
        if self.stream is None:
            return versions
        # The loaded version is the one in the log; torch.cuda.nccl.version() is the one that torch was built with.
        logged = self._log.read()
        return {
            **versions,
            "pci_bus_id": self._pci,
            "device": gpu_identity(self._pci),
            "ranks_per_gpu": self.ranks_per_gpu,
            "nccl": logged.version if logged else None,
            "nccl_library": loaded_nccl(),
        }

    def evidence(self) -> Evidence:
        """NCCL's log so far, and the GPU's state; nothing for gloo."""
        if self.stream is None:
            return Evidence()
        return Evidence(path=self._log.read(), gpu=gpu_state(self._pci))

    def close(self) -> None:
        """Leave the job and drop all references to groups.

        A group that still has a reference when the interpreter ends has threads that were not joined. The C++ library
        then ends the process with SIGABRT, after a good run.
        """
        if self.stream is not None:
            self.stream.synchronize()
            self._log.remove()
            BLOCKS.deregister_all()
        if self._listeners is not None:
            self._listeners.close()
        dist.destroy_process_group()
        BLOCKS.free_all()
        self._groups.clear()
        self._start_group = self._messages.group = None
        gc.collect()


class _TorchCompiler(PhaseCompiler):
    """Calls of torch.distributed on tensors that share the buffers' memory."""

    def __init__(self, transport: TorchTransport, schedule: Schedule, buffers: Buffers) -> None:
        """Compile for the rank of `transport`, on its process groups."""
        super().__init__(transport.rank, schedule, buffers)
        self._transport = transport

    def collective(self, phase: Collective, branch: Branch) -> Call:
        """One call of the op's function."""
        group, index, member = self._join(phase, branch)
        self._refuse_impossible(phase)
        return self._collective_call(phase, index, member, group) if member >= 0 else nothing

    def all_to_all_v(self, phase: AllToAllV, branch: Branch) -> Call:
        """One all-to-all with splits."""
        group, index, member = self._join(phase, branch)
        return self._uneven_call(phase, index, member, group) if member >= 0 else nothing

    def concurrent(self, phase: Concurrent, branches: Sequence[Sequence[Call]]) -> Step:
        """One thread per branch on the host, one stream per branch on a GPU."""
        on_host = self._transport.stream is None
        return super().concurrent(phase, branches) if on_host else device_branches(phase, branches)

    def _refuse_impossible(self, phase: Collective) -> None:
        dtype, name = self.dtype, self._transport.name
        if phase.op in (Op.ALL_REDUCE, Op.BROADCAST, Op.REDUCE) and phase.read != phase.write:
            raise Unable(f"torch.distributed has {phase.op} in place only")
        refuse_mpi_only(phase, "torch.distributed has")
        if phase.op not in REDUCING:
            return
        if dtype.name in _NEVER_REDUCED or (name == "gloo" and dtype.name in _MOVED_AS):
            raise Unable(f"{'gloo' if name == 'gloo' else 'torch.distributed'} has no reductions of {dtype.name}")
        if name == "nccl":
            from ncclbench.transports.cuda.stream import refuse_float8_here

            refuse_float8_here(phase, dtype)
        elif phase.redop is Redop.AVG and not dtype.is_float:
            raise Unable(f"gloo has no avg of {dtype.name}")

    def _join(self, phase: Collective | AllToAllV, branch: Branch) -> tuple[dist.ProcessGroup | None, int, int]:
        """This rank's process group in a phase, the group's index, and this rank's index in it (-1: in none)."""
        mine, index, member = None, -1, -1
        for g, ranks in enumerate(phase.groups.tolist()):
            group = self._transport.group(tuple(sorted(ranks)), branch)
            if ranks != sorted(ranks):
                raise Unable("torch.distributed orders the ranks of a group; this schedule has another order")
            if self.rank in ranks:
                mine, index, member = group, g, ranks.index(self.rank)
        return mine, index, member

    def _collective_call(self, phase: Collective, index: int, member: int, group: dist.ProcessGroup | None) -> Call:
        dtype, buffers = self.dtype, self.buffers
        name = dtype.name if phase.op in REDUCING else _MOVED_AS.get(dtype.name, dtype.name)
        send = tensor_of(buffers[phase.read], name)[: phase.read_count]
        recv = tensor_of(buffers[phase.write], name)[: phase.write_count]
        redop = _REDOPS[phase.redop]
        match phase.op:
            case Op.ALL_REDUCE:
                # torch's defaults are left out, as users write the call: keywords cost time before anything is sent.
                if redop is dist.ReduceOp.SUM and group is None:
                    return partial(dist.all_reduce, recv)
                return partial(dist.all_reduce, recv, op=redop, group=group)
            case Op.ALL_GATHER:
                return partial(_all_gather, recv, send, group=group)
            case Op.REDUCE_SCATTER:
                return partial(_reduce_scatter, recv, send, op=redop, group=group)
            case Op.ALL_TO_ALL:
                return partial(dist.all_to_all_single, recv, send, group=group)
            case Op.BARRIER:
                return partial(dist.barrier, group=group)
            case _:
                return _rooted_call(
                    phase, int(phase.groups[index, phase.root]), member == phase.root, group, send, recv
                )

    def _uneven_call(self, phase: AllToAllV, index: int, member: int, group: dist.ProcessGroup | None) -> Call:
        buffers = self.buffers
        sent, received = (split // phase.row_bytes for split in phase.splits(index, member))
        send = tensor_of(buffers[phase.read])[: int(sent.sum()) * phase.row_bytes]
        recv = tensor_of(buffers[phase.write])[: int(received.sum()) * phase.row_bytes]
        return partial(
            dist.all_to_all_single,
            recv.view(-1, phase.row_bytes),
            send.view(-1, phase.row_bytes),
            received.tolist(),
            sent.tolist(),
            group=group,
        )

    def exchange(self, phase: Exchange, branch: Branch) -> Call:
        """One batch of sends and receives, and copies of a rank's flows to itself."""
        buffers = self.buffers
        group = self._transport.group(tuple(range(self._transport.world_size)), branch)
        send, recv = (tensor_of(buffers[name]) for name in (phase.read, phase.write))
        remote: list[dist.P2POp] = []
        copies: list[Call] = []
        for k in np.flatnonzero((phase.src == self.rank) | (phase.dst == self.rank)):
            src, dst, nbytes = int(phase.src[k]), int(phase.dst[k]), int(phase.nbytes[k])
            out = send[int(phase.send_offset[k]) :][:nbytes]
            into = recv[int(phase.recv_offset[k]) :][:nbytes]
            if src == dst:
                copies.append(partial(into.copy_, out))
            elif src == self.rank:
                remote.append(dist.P2POp(dist.isend, out, dst, group))
            else:
                remote.append(dist.P2POp(dist.irecv, into, src, group))
        if not remote and not copies:
            return nothing
        return partial(_run_flows, remote, copies)


def device_branches(phase: Concurrent, branches: Sequence[Sequence[Call]]) -> Step:
    """One stream per branch; this thread issues all of them.

    NCCL needs the calls of concurrent communicators in the same order on all ranks. Threads would not keep it.
    """
    import cupy

    from ncclbench.transports.cuda.stream import BranchMarks

    streams = [torch.cuda.Stream() for _ in branches]  # type: ignore[no-untyped-call]
    views = [cupy.cuda.ExternalStream(stream.cuda_stream) for stream in streams]
    marks = BranchMarks()

    def run() -> None:
        own = cupy.cuda.get_current_stream()
        begun, ended = marks.begin(own), []
        for stream, view, calls in zip(streams, views, branches, strict=True):
            view.wait_event(begun)
            view.use()
            with torch.cuda.stream(stream):
                for call in calls:
                    call()
            ended.append(marks.end(view))
        own.use()
        for end in ended:
            own.wait_event(end)

    launches = branches_launches(phase)
    return Step(phase.label, run, phase.names, marks.last if phase.names else None, launches)


def _rooted_call(
    phase: Collective, root: int, is_root: bool, group: dist.ProcessGroup | None, send: torch.Tensor, recv: torch.Tensor
) -> Call:
    match phase.op:
        case Op.REDUCE:
            return partial(dist.reduce, recv, dst=root, op=_REDOPS[phase.redop], group=group)
        case Op.BROADCAST:
            return partial(dist.broadcast, recv, src=root, group=group)
        case Op.GATHER:
            return partial(dist.gather, send, _shards(recv, phase) if is_root else None, dst=root, group=group)
        case Op.SCATTER:
            return partial(dist.scatter, recv, _shards(send, phase) if is_root else None, src=root, group=group)
        case _:
            raise AssertionError(f"{phase.op} has no root")


def _shards(tensor: torch.Tensor, phase: Collective) -> list[torch.Tensor]:
    return list(tensor.view(phase.members, phase.count))


def _run_flows(remote: list[dist.P2POp], copies: list[Call]) -> None:
    pending = dist.batch_isend_irecv(remote) if remote else []
    for copy in copies:
        copy()
    for work in pending:
        work.wait()


def tensor_of(array: Array, dtype: str = "uint8") -> torch.Tensor:
    """A tensor that shares the memory of a NumPy or CuPy array; `dtype` is torch's name."""
    raw = array.view(np.uint8)
    flat = torch.from_numpy(raw) if isinstance(raw, np.ndarray) else torch.from_dlpack(raw)
    return flat if dtype == "uint8" else flat.view(getattr(torch, dtype))


def first_line(error: BaseException) -> str:
    """The first line of another library's error; torch's messages contain whole stacks."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
