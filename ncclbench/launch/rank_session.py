"""One run on one rank, from the rendezvous to the last record; rank 0 writes the run directory.

rendezvous -> agree on plan and versions -> check memory -> open the run directory -> watch -> case after case -> end
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
        identity: this rank's place.
        transport: this rank's, joined.
        recorder: rank 0's is written to.
        watch_host: where rank 0 can be reached for the watchdog, as `Watchdog.open` takes it.

    Raises:
        UsageError, EnvironmentFault: before the first case; afterwards faults end in the run directory.
    """
    progress = Progress()
    try:
        with transport.translating("start"):
            finished, topology, watchdog, rotations = _prepare(
                prepared, identity, transport, recorder, progress, watch_host
            )
    except NcclbenchError:
        transport.close()  # a library's own threads would otherwise end the process with words of their own
        raise
    executor = RankExecutor(transport, progress, rotations, prepared.request.command)
    try:
        for number, planned in enumerate(prepared.plan.cases):
            if planned.case.id not in finished:
                _run_one(number, planned, executor, topology, recorder, watchdog)
        transport.barrier()
    except Exception as error:
        _give_up(watchdog, error)
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
    """Everything before the first case: the cases already finished, where the ranks sit, the watch, and the memory."""
    _cross_check(identity, transport)
    texts = all_gather_text(transport.control, _describe_rank(prepared, identity, transport))
    ranks = [msgspec.json.decode(text, type=RankEnvironment) for text in texts]
    _refuse_disagreement(prepared, transport)
    hosts = [place.host for place in ranks]
    found = [place.found for place in ranks]
    topology = place_ranks(prepared.topology, hosts) if prepared.topology else place_detected_ranks(hosts, found)
    rotations = _plan_memory(prepared, identity, topology, transport)
    finished = _open_run(prepared, identity, topology, ranks, transport, recorder)
    watchdog = _start_watchdog(ranks, transport, recorder, progress, watch_host)
    return finished, topology, watchdog, rotations


class RankEnvironment(msgspec.Struct, frozen=True, kw_only=True):
    """Where a rank runs, for the manifest: host, process, cores, its GPU's PCI address, and what it found around it.

    `boot` is the running kernel's own id, the same in all containers of a machine; "" where the kernel has none.
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
    """Each different set of versions and settings once, with the ranks that have it; one entry where all agree."""
    alike: dict[str, list[int]] = {}
    for rank, place in enumerate(ranks):
        alike.setdefault(_text(place.software), []).append(rank)
    return [msgspec.structs.replace(ranks[own[0]].software, ranks=own) for own in alike.values()]


def _rank_record(place: RankEnvironment) -> RankRecord:
    """A place for the manifest; its software stands beside, once for all ranks that share it."""
    return RankRecord(
        host=place.host,
        boot=place.boot,
        pid=place.pid,
        cores=place.cores,
        gpu=place.gpu,
        found=place.found,
        device=place.device if place.device != GpuIdentity() else None,
    )


def _describe_rank(prepared: PreparedRun, identity: RankIdentity, transport: Transport) -> str:
    """This rank's `RankEnvironment` as JSON; binds it first, if it is to be bound."""
    described = dict(transport.describe())
    gpu = described.get("pci_bus_id")
    cores = bind(identity, gpu) if prepared.request.bind else allowed_cores()
    return _text(rank_environment(described, socket.gethostname(), cores, _surroundings(gpu)))


def rank_environment(described: Facts, host: str, cores: list[int], found: RankDetection) -> RankEnvironment:
    """Where a rank of this process runs; `described` is what its transport says of itself."""
    device = msgspec.convert(described.get("device") or {}, GpuIdentity)
    return RankEnvironment(
        host=host,
        boot=boot_id(),
        pid=os.getpid(),
        cores=cores,
        gpu=described.get("pci_bus_id"),
        device=device,
        software=software(described, device),
        found=found,
    )


def _surroundings(gpu: str | None) -> RankDetection:
    """The NIC and the NVLink domain of this rank's GPU; without a GPU the interface that gloo was told to use."""
    host = detect_host()
    if not gpu:
        told = {port.device: port for port in host.ports if port.kind == "Ethernet"}
        own = told.get(os.environ.get("GLOO_SOCKET_IFNAME", ""))
        return RankDetection(nic=own.device, gbit_per_s=own.gbit_per_s) if own else RankDetection()
    if gpu.lower() not in host.gpus:
        return RankDetection()
    index = host.gpus.index(gpu.lower())
    nic, domain = nearest_nics(host)[index], host.domains[index]
    rates = {port.device: port.gbit_per_s for port in host.ports}
    return RankDetection(
        nic=nic, gbit_per_s=rates.get(nic), domain=f"{domain.cluster}/{domain.clique}" if domain else ""
    )


def _cross_check(identity: RankIdentity, transport: Transport) -> None:
    """What the launcher's variables say must be what the library says, or several jobs are running as one."""
    if (identity.rank, identity.world_size) != (transport.rank, transport.world_size):
        raise EnvironmentFault(
            f"{identity.launcher} says rank {identity.rank} of {identity.world_size}, {transport.name} says rank "
            f"{transport.rank} of {transport.world_size}: start all ranks with one launcher, and its own MPI"
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


def _give_up(watchdog: Watchdog, error: BaseException) -> None:
    """Tell the watchdog, which ends this process."""
    watchdog.fail("transport" if isinstance(error, TransportError) else "raised", in_a_line(error))


def in_a_line(error: BaseException) -> str:
    """What went wrong; an error that is not one of ours is named by its type as well."""
    return str(error) if isinstance(error, NcclbenchError) else f"{type(error).__name__}: {error}"


class _RankInputs(msgspec.Struct, frozen=True, kw_only=True):
    """What must be the same on all ranks; a field's name is its name in the message about a difference."""

    ncclbench: str
    plan: str
    world_size: int
    topology_file: str
    process_start: str | None = None


def _refuse_disagreement(prepared: PreparedRun, transport: Transport) -> None:
    """All ranks must run the same plan with the same version; a stale install on one node would go unnoticed."""
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


def _plan_memory(
    prepared: PreparedRun, identity: RankIdentity, topology: Topology, transport: Transport
) -> dict[str, Rotation]:
    """Refuse what does not fit; on GPUs, over how many sets of buffers each case rotates, by its id.

    Every rank checks its own GPU and node; the first refusal is everybody's.
    """
    limits = memory_limits(transport.device, transport.staged, identity.local_size, transport.ranks_per_gpu)
    message, demands = "", {}
    try:
        demands = demands_of(prepared.plan, topology)
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


def demands_of(plan: Plan, topology: Topology) -> dict[int, MemoryDemand]:
    """What each case that can run here asks of memory, by its number."""
    found = {}
    for number, planned in enumerate(plan.cases):
        with suppress(Unable):
            found[number] = memory_demand(build_variants(planned.case, topology), planned.settings)
    return found


def refuse_without_memory(plan: Plan, demands: Mapping[int, MemoryDemand], limits: Sequence[MemoryLimit]) -> None:
    """One set of buffers of every case must fit, on GPUs with what the cases before it keep.

    Raises:
        UsageError: naming the first case that does not.
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
    """The manifest that rank 0 stores; `described` is what the transport says of itself."""
    return Manifest(
        plan=prepared.plan.as_record(),
        transport=prepared.transport,
        simulated=capabilities_of(prepared.transport).simulated,
        device=device,
        world_size=topology.world_size,
        topology=topology.as_record(),
        ranks=[_rank_record(place) for place in ranks],
        software=distinct_software(ranks),
        provenance=provenance(launcher, list(prepared.request.command), dict(described)),
        started=utc_now().isoformat(timespec="seconds").replace("+00:00", "Z"),
    )


class _OpenedRun(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0 tells the other ranks of the run directory.

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
    """Rank 0 opens the run directory; all learn which cases are finished, or why it could not be opened."""
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
    if recorder.writer is None:  # a directory named after the time has another name on each rank
        recorder.out = Path(answer.out)
    return set(answer.finished)


def _start_watchdog(
    ranks: list[RankEnvironment], transport: Transport, recorder: RunRecorder, progress: Progress, host: str
) -> Watchdog:
    def on_fault(fault: Fault) -> Exit:
        if transport.rank != 0:
            recorder.take_over(fault.case)
        return recorder.fault(fault)

    here = {rank: place.pid for rank, place in enumerate(ranks) if place.host == socket.gethostname()}
    # The parent's number as it was at the start: one that died meanwhile must not be taken for another.
    parent = int(os.environ.get(LOCAL_PARENT) or os.getppid())
    watchdog = Watchdog(transport.rank, transport.world_size, progress, on_fault, here, parent, transport.trouble)
    watchdog.join(broadcast_text(transport.control, watchdog.open(host) if transport.rank == 0 else ""))
    outlive_parent()
    # Nobody measures before everybody is watched.
    transport.control.all_gather(np.zeros(1, np.int64))
    return watchdog


def join_and_run(prepared: PreparedRun, identity: RankIdentity, timeout: float) -> tuple[Exit, Path]:
    """Join the job that a launcher has started, and run the plan; what it ended in, and rank 0's run directory."""
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
    """Where rank 0 can be reached, comma-separated, the likeliest first; only rank 0's answer counts."""
    if identity.local_size == identity.world_size:
        return LOOPBACK
    named = [os.environ[name] for name in ("MASTER_ADDR",) if os.environ.get(name)]
    return ",".join(dict.fromkeys(named + local_addresses()))
