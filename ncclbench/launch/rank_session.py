"""One run on one rank, from the rendezvous to the last record; rank 0 writes the run directory.

rendezvous -> compare plan and versions -> check memory -> open the run directory -> start the watchdog -> cases -> end
"""

import hashlib
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from ncclbench import __version__
from ncclbench.buffers.arrays import ON_GPU, MemoryLimit, Rotation, budget_of_one_rank, memory_limits, refuse_too_large
from ncclbench.buffers.kinds import Device
from ncclbench.buffers.nccl_mem_alloc import BLOCKS
from ncclbench.config.plugins import load
from ncclbench.errors import EnvironmentFault, Exit, NcclbenchError, TransportError, Unable, UsageError
from ncclbench.launch.core_binding import allowed_cores, bind
from ncclbench.launch.launcher_detection import LOCAL_PARENT
from ncclbench.launch.preparation import PreparedRun
from ncclbench.launch.rank_supervisor import outlive_parent
from ncclbench.launch.recorder import RunRecorder
from ncclbench.launch.rendezvous import with_store
from ncclbench.launch.watchdog.attribution import Fault
from ncclbench.launch.watchdog.watchdog import Watchdog
from ncclbench.measure.buffer_plan import HeldMemory, MemoryDemand, agreed_budget, rotations
from ncclbench.measure.case import memory_demand
from ncclbench.measure.executor import RankExecutor
from ncclbench.measure.timing_host import Progress
from ncclbench.plan.plan import Plan, PlannedCase
from ncclbench.schedule.pattern import build_variants
from ncclbench.store.events import utc_now
from ncclbench.store.manifest import GpuIdentity, Manifest, RankRecord, SoftwareRecord
from ncclbench.store.provenance import provenance, software
from ncclbench.topology import Topology
from ncclbench.topology.host_detection import boot_id, detect_host, nearest_nics
from ncclbench.topology.network_addresses import LOOPBACK, local_addresses
from ncclbench.topology.placement import RankDetection, place_detected_ranks, place_ranks
from ncclbench.transports.base import Facts, RankIdentity, Transport, all_gather_text, broadcast_text
from ncclbench.transports.capabilities import capabilities_of

_GIB = float(1 << 30)


def run_rank(
    prepared: PreparedRun, identity: RankIdentity, transport: Transport, recorder: RunRecorder, watch_host: str
) -> Exit:
    """Run the plan as one rank of the job.

    Args:
        prepared: what to run; the same on all ranks.
        identity: this rank in its job.
        transport: this rank's transport, connected to the other ranks.
        recorder: writes the run directory on rank 0.
        watch_host: the addresses of rank 0 for the watchdog, in the format of `Watchdog.open`.

    Raises:
        UsageError, EnvironmentFault: before the first case; later faults are stored in the run directory.
    """
    progress = Progress()
    try:
        with transport.translating("start"):
            finished, topology, watchdog, rotations = _prepare(
                prepared, identity, transport, recorder, progress, watch_host
            )
    except NcclbenchError:
        transport.close()  # otherwise a library's threads end the process with their own error
        raise
    executor = RankExecutor(transport, progress, rotations, prepared.request.command)
    try:
        for number, planned in enumerate(prepared.plan.cases):
            if planned.case.id not in finished:
                _run_one(number, planned, executor, topology, recorder, watchdog)
        transport.barrier()
    except Exception as error:
        _report_failure(watchdog, error)
        raise
    watchdog.close()
    try:
        return recorder.end() if transport.rank == 0 else Exit.GOOD
    finally:
        transport.close()


def _prepare(
    prepared: PreparedRun,
    identity: RankIdentity,
    transport: Transport,
    recorder: RunRecorder,
    progress: Progress,
    watch_host: str,
) -> tuple[set[str], Topology, Watchdog, dict[str, Rotation]]:
    """Do everything before the first case; return the finished cases, topology, watchdog and buffer rotations."""
    _check_identity(identity, transport)
    texts = all_gather_text(transport.control, _describe_rank(prepared, identity, transport))
    ranks = [msgspec.json.decode(text, type=RankEnvironment) for text in texts]
    refuse_disagreement(prepared, transport)
    hosts = [rank.host for rank in ranks]
    detected = [rank.found for rank in ranks]
    topology = place_ranks(prepared.topology, hosts) if prepared.topology else place_detected_ranks(hosts, detected)
    rotations = plan_memory(prepared, identity, topology, transport)
    finished = _open_run(prepared, identity, topology, ranks, transport, recorder)
    watchdog = _start_watchdog(ranks, transport, recorder, progress, watch_host)
    return finished, topology, watchdog, rotations


class RankEnvironment(msgspec.Struct, frozen=True, kw_only=True):
    """Where one rank runs; the message that each rank sends to all others.

    Attributes:
        host: its host name.
        boot: boot id of the kernel, equal in all containers of a machine; "" if the kernel has none.
        pid: its process id.
        cores: the cores that it may use.
        gpu: PCI address of its GPU; None without one.
        found: its NIC and NVLink domain, as far as it detected them.
        device: identity of its GPU.
        software: its versions and variables, without `ranks`.
    """

    host: str
    boot: str = ""
    pid: int
    cores: list[int]
    gpu: str | None = None
    found: RankDetection = RankDetection()
    device: GpuIdentity = GpuIdentity()
    software: SoftwareRecord = SoftwareRecord()


def distinct_software(ranks: Sequence[RankEnvironment]) -> list[SoftwareRecord]:
    """Each different set of versions and variables once, with its ranks; one entry if all ranks agree."""
    equal: dict[str, list[int]] = {}
    for number, rank in enumerate(ranks):
        equal.setdefault(_text(rank.software), []).append(number)
    return [msgspec.structs.replace(ranks[numbers[0]].software, ranks=numbers) for numbers in equal.values()]


def _rank_record(rank: RankEnvironment) -> RankRecord:
    """The rank's record without its software, which the manifest stores once for all ranks that share it."""
    return RankRecord(
        host=rank.host,
        boot=rank.boot,
        pid=rank.pid,
        cores=rank.cores,
        gpu=rank.gpu,
        found=rank.found,
        device=rank.device if rank.device != GpuIdentity() else None,
    )


def _describe_rank(prepared: PreparedRun, identity: RankIdentity, transport: Transport) -> str:
    """This rank's `RankEnvironment` as JSON; with ``--bind auto`` the rank is bound first."""
    described = dict(transport.describe())
    gpu = msgspec.convert(described.get("pci_bus_id"), str | None)
    cores = bind(identity, gpu) if prepared.request.bind else allowed_cores()
    return _text(rank_environment(described, socket.gethostname(), cores, detect_rank(gpu)))


def rank_environment(described: Facts, host: str, cores: list[int], found: RankDetection) -> RankEnvironment:
    """The environment of a rank of this process; `described` is what `Transport.describe` returns."""
    device = msgspec.convert(described.get("device") or {}, GpuIdentity)
    return RankEnvironment(
        host=host,
        boot=boot_id(),
        pid=os.getpid(),
        cores=cores,
        gpu=msgspec.convert(described.get("pci_bus_id"), str | None),
        device=device,
        software=software(described, device),
        found=found,
    )


def detect_rank(gpu: str | None) -> RankDetection:
    """Detect the NIC and the NVLink domain of this rank's GPU; without a GPU, the interface that gloo uses."""
    host = detect_host()
    if not gpu:
        ethernet = {port.device: port for port in host.ports if port.kind == "Ethernet"}
        own = ethernet.get(os.environ.get("GLOO_SOCKET_IFNAME", ""))
        return RankDetection(nic=own.device, gbit_per_s=own.gbit_per_s) if own else RankDetection()
    if gpu.lower() not in host.gpus:
        return RankDetection()
    index = host.gpus.index(gpu.lower())
    nic, domain = nearest_nics(host)[index], host.domains[index]
    rates = {port.device: port.gbit_per_s for port in host.ports}
    return RankDetection(
        nic=nic, gbit_per_s=rates.get(nic), domain=f"{domain.cluster}/{domain.clique}" if domain else ""
    )


def _check_identity(identity: RankIdentity, transport: Transport) -> None:
    """Refuse a rank that the launcher and the library number differently: then several jobs run as one."""
    if (identity.rank, identity.world_size) != (transport.rank, transport.world_size):
        raise EnvironmentFault(
            f"{identity.launcher} says rank {identity.rank} of {identity.world_size}, {transport.name} says rank "
            f"{transport.rank} of {transport.world_size}: start all ranks with one launcher, and with its own MPI"
        )


def _run_one(
    number: int,
    planned: PlannedCase,
    executor: RankExecutor,
    topology: Topology,
    recorder: RunRecorder,
    watchdog: Watchdog,
) -> None:
    if executor.transport.rank == 0:
        recorder.begin(number, planned)
    executor.progress.case = number
    watchdog.limit = planned.settings.timeout * (1.0 + planned.case.nbytes / _GIB)
    measured = executor.execute(planned.case, topology, planned.settings)
    if measured is not None:
        recorder.finish(measured)


def _report_failure(watchdog: Watchdog, error: BaseException) -> None:
    """Report `error` to the watchdog, which ends this process."""
    watchdog.fail("transport" if isinstance(error, TransportError) else "raised", error_line(error))


def error_line(error: BaseException) -> str:
    """The message of an error; an error of another library begins with its type."""
    return str(error) if isinstance(error, NcclbenchError) else f"{type(error).__name__}: {error}"


class _RankInputs(msgspec.Struct, frozen=True, kw_only=True):
    """What must be equal on all ranks; the message about a difference shows the field's name."""

    ncclbench: str
    plan: str
    world_size: int
    topology_file: str
    process_start: str | None = None


def refuse_disagreement(prepared: PreparedRun, transport: Transport) -> None:
    """Refuse ranks with different plans or versions; otherwise a stale installation on one node goes unnoticed."""
    mine = _RankInputs(
        ncclbench=__version__,
        plan=hashlib.sha256(msgspec.json.encode(prepared.plan.as_record())).hexdigest()[:16],
        world_size=transport.world_size,
        topology_file=prepared.topology.sha256[:16] if prepared.topology else "none",
    )
    if prepared.plan.process_starts > 1:
        start = "the next that is missing" if prepared.start is None else str(prepared.start + 1)
        mine = msgspec.structs.replace(mine, process_start=start)
    texts = all_gather_text(transport.control, _text(mine))
    views = [msgspec.structs.asdict(msgspec.json.decode(text, type=_RankInputs)) for text in texts]
    for rank, view in enumerate(views):
        for name, value in view.items():
            if value != views[0][name]:
                what = name.replace("_", " ")
                raise EnvironmentFault(f"rank {rank} has {what} {value}, rank 0 has {views[0][name]}: start all alike")


def _text(data: msgspec.Struct) -> str:
    return msgspec.json.encode(data).decode()


def plan_memory(
    prepared: PreparedRun, identity: RankIdentity, topology: Topology, transport: Transport
) -> dict[str, Rotation]:
    """Refuse a plan that does not fit into memory; on GPUs, return each case's buffer rotation by its id.

    Every rank checks its own GPU and node. If any rank refuses, all ranks raise the first refusal.
    """
    limits = memory_limits(transport.device, transport.staged, identity.local_size, transport.ranks_per_gpu)
    message, demands = "", {}
    try:
        demands = memory_demands(prepared.plan, topology)
        refuse_without_memory(prepared.plan, demands, limits)
    except UsageError as error:
        message = str(error)
    refusals = [text for text in all_gather_text(transport.control, message) if text]
    if refusals:
        raise UsageError(refusals[0])
    if transport.device == "cpu":
        return {}
    each, held = rotations(list(demands.values()), *agreed_budget(transport, budget_of_one_rank(limits)))
    BLOCKS.plan(held.blocks)
    cases = prepared.plan.cases
    return {cases[number].case.id: rotation for number, rotation in zip(demands, each, strict=True)}


def memory_demands(plan: Plan, topology: Topology) -> dict[int, MemoryDemand]:
    """The memory demand of each case that can run here, by its number."""
    demands = {}
    for number, planned in enumerate(plan.cases):
        with suppress(Unable):
            demands[number] = memory_demand(build_variants(planned.case, topology), planned.settings)
    return demands


def refuse_without_memory(plan: Plan, demands: Mapping[int, MemoryDemand], limits: Sequence[MemoryLimit]) -> None:
    """Refuse a plan if one set of buffers of a case does not fit; on GPUs, beside what earlier cases keep.

    Raises:
        UsageError: naming the first case that does not fit.
    """
    held = HeldMemory()
    for number, one in demands.items():
        held, alone = held.after(one), HeldMemory().after(one)
        name = plan.cases[number].case.id
        for ranks, available, where in limits:
            if where != ON_GPU:
                refuse_too_large(name, one.nbytes, ranks, available, where)
                continue
            kept = ", with what earlier cases keep," if held != alone else ""
            refuse_too_large(name + kept, held.nbytes, ranks, available, where)


def manifest_of(
    prepared: PreparedRun,
    launcher: str,
    device: Device | None,
    topology: Topology,
    ranks: list[RankEnvironment],
    described: Facts,
) -> Manifest:
    """The manifest that rank 0 stores; `described` is what `Transport.describe` returns."""
    return Manifest(
        plan=prepared.plan.as_record(),
        transport=prepared.transport,
        simulated=capabilities_of(prepared.transport).simulated,
        device=device,
        world_size=topology.world_size,
        topology=topology.as_record(),
        ranks=[_rank_record(rank) for rank in ranks],
        software=distinct_software(ranks),
        provenance=provenance(launcher, list(prepared.request.command), dict(described)),
        started=utc_now().isoformat(timespec="seconds").replace("+00:00", "Z"),
    )


class _OpenedRun(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0 sends to the other ranks about the run directory.

    Attributes:
        finished: the cases that are not measured again.
        out: the run directory; "" if it could not be opened.
        error: why it could not be opened.
        usage: whether `error` is a usage error.
    """

    finished: list[str] = []
    out: str = ""
    error: str | None = None
    usage: bool = False


def _open_run(
    prepared: PreparedRun,
    identity: RankIdentity,
    topology: Topology,
    ranks: list[RankEnvironment],
    transport: Transport,
    recorder: RunRecorder,
) -> set[str]:
    """Open the run directory on rank 0; on all ranks return the finished cases, or raise why it cannot be opened."""
    answer = _OpenedRun()
    if transport.rank == 0:
        described = dict(transport.describe())
        manifest = manifest_of(prepared, identity.launcher, transport.device, topology, ranks, described)
        try:
            answer = _OpenedRun(finished=sorted(recorder.open(manifest)), out=str(recorder.out.absolute()))
        except NcclbenchError as error:
            answer = _OpenedRun(error=str(error), usage=isinstance(error, UsageError))
    answer = msgspec.json.decode(broadcast_text(transport.control, _text(answer)), type=_OpenedRun)
    if answer.error is not None:
        raise (UsageError if answer.usage else EnvironmentFault)(answer.error)
    if recorder.writer is None:  # a default name contains the time, which differs between ranks
        recorder.out = Path(answer.out)
    return set(answer.finished)


def _start_watchdog(
    ranks: list[RankEnvironment], transport: Transport, recorder: RunRecorder, progress: Progress, host: str
) -> Watchdog:
    def on_fault(fault: Fault) -> Exit:
        if transport.rank != 0:
            recorder.take_over(fault.case)
        return recorder.fault(fault)

    here = {number: rank.pid for number, rank in enumerate(ranks) if rank.host == socket.gethostname()}
    # The parent's process id at the start, because a process has a new parent after its own has died.
    parent = int(os.environ.get(LOCAL_PARENT) or os.getppid())
    watchdog = Watchdog(transport.rank, transport.world_size, progress, on_fault, here, parent, transport.trouble)
    watchdog.join(broadcast_text(transport.control, watchdog.open(host) if transport.rank == 0 else ""))
    outlive_parent()
    # No rank measures before all watchdogs have joined.
    transport.control.all_gather(np.zeros(1, np.int64))
    return watchdog


def join_and_run(prepared: PreparedRun, identity: RankIdentity, timeout: float) -> tuple[Exit, Path]:
    """Join the job that a launcher has started, and run the plan.

    Returns:
        The exit code, and the run directory of rank 0.
    """
    module = load("transports", prepared.transport)
    if capabilities_of(prepared.transport).needs_store:
        identity = with_store(identity)
    identity = replace(identity, device=prepared.request.device)
    transport = module.open_transport(prepared.transport, identity, timeout)
    if not isinstance(transport, Transport):
        base = f"{Transport.__module__}.{Transport.__name__}"
        raise UsageError(f"transport {prepared.transport!r}: its class must inherit from `{base}`")
    recorder = RunRecorder(prepared)
    code = run_rank(prepared, identity, transport, recorder, _watch_hosts(identity))
    return code, recorder.out


def _watch_hosts(identity: RankIdentity) -> str:
    """The addresses of this host, comma-separated, the likeliest first; only those of rank 0 are used."""
    if identity.local_size == identity.world_size:
        return LOOPBACK
    named = [os.environ[name] for name in ("MASTER_ADDR",) if os.environ.get(name)]
    return ",".join(dict.fromkeys(named + local_addresses()))
