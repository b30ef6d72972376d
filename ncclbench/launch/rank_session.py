"""One run on one rank, from the rendezvous to the last record; rank 0 writes the run directory.

rendezvous -> agree on plan and versions -> check memory -> open the run directory -> watch -> case after case -> end
"""

import hashlib
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ncclbench import __version__
from ncclbench.buffers.arrays import ON_GPU, WARM, Rotation, refuse_too_large, room_for_one, rooms_of
from ncclbench.buffers.nccl_mem_alloc import BLOCKS
from ncclbench.config.plugins import load
from ncclbench.errors import EnvironmentFault, Exit, NcclbenchError, TransportError, Unable, UsageError, worst
from ncclbench.launch.core_binding import allowed_cores, bind
from ncclbench.launch.launcher_detection import LOCAL_PARENT
from ncclbench.launch.preparation import PreparedRun
from ncclbench.launch.rank_supervisor import outlive_parent
from ncclbench.launch.recorder import RunRecorder
from ncclbench.launch.rendezvous import with_store
from ncclbench.launch.signals import heeding, settled
from ncclbench.launch.watchdog.attribution import Fault
from ncclbench.launch.watchdog.watchdog import Watchdog, end_process
from ncclbench.measure.buffer_plan import Demand, Held, agreed_room, rotations
from ncclbench.measure.case import build_variants, demand, run_case
from ncclbench.measure.telemetry import Witness
from ncclbench.measure.timing_host import Progress
from ncclbench.plan.plan import Plan, PlannedCase
from ncclbench.store.events import utc_now
from ncclbench.store.manifest import GpuIdentity, Manifest, PlanRecord, RankRecord, SoftwareRecord
from ncclbench.store.provenance import provenance, software
from ncclbench.topology import Topology
from ncclbench.topology.host_detection import boot_id, detect_host, nearest_nics
from ncclbench.topology.network_addresses import LOOPBACK, local_addresses
from ncclbench.topology.placement import RankDetection, place_detected_ranks, place_ranks
from ncclbench.transports.base import Seat, Transport, all_gather_text, broadcast_text

_GIB = float(1 << 30)


def run_rank(
    prepared: PreparedRun, seat: Seat, transport: Transport, recorder: RunRecorder, watch_host: str | None
) -> Exit:
    """Run the plan as one rank of the job.

    Args:
        prepared: what to run; the same on all ranks.
        seat: this rank's place.
        transport: this rank's, joined.
        recorder: rank 0's is written to.
        watch_host: where rank 0 can be reached for the watchdog, as `Watchdog.open` takes it; None
            where ranks share a process.

    Raises:
        UsageError, EnvironmentFault: before the first case; afterwards faults end in the run directory.
    """
    progress = Progress()
    try:
        with transport.translating("start"):
            finished, topology, watchdog, rotating = _prepare(prepared, seat, transport, recorder, progress, watch_host)
    except NcclbenchError:
        transport.close()  # a library's own threads would otherwise end the process with words of their own
        raise
    witness = Witness(transport)
    try:
        for number, planned in enumerate(prepared.plan.cases):
            if planned.case.id not in finished:
                rotation = rotating.get(number, WARM)
                _run_one(number, planned, transport, topology, recorder, progress, watchdog, rotation, witness)
        transport.barrier()
    except Exception as error:
        _give_up(watchdog, error)
        raise
    if watchdog:
        watchdog.close()
    try:
        return recorder.end() if transport.rank == 0 else Exit.GOOD
    finally:
        transport.close()


def _prepare(
    prepared: PreparedRun,
    seat: Seat,
    transport: Transport,
    recorder: RunRecorder,
    progress: Progress,
    watch_host: str | None,
) -> tuple[set[str], Topology, Watchdog | None, dict[int, Rotation]]:
    """Everything before the first case: the cases already finished, where the ranks sit, the watch, and the memory."""
    _cross_check(seat, transport)
    texts = all_gather_text(transport.control, _describe_rank(prepared, seat, transport))
    ranks = [msgspec.json.decode(text, type=RankEnvironment) for text in texts]
    _refuse_disagreement(prepared, transport)
    hosts = [place.host for place in ranks]
    found = [place.found for place in ranks]
    topology = place_ranks(prepared.topology, hosts) if prepared.topology else place_detected_ranks(hosts, found)
    rotating = _plan_memory(prepared, seat, topology, transport)
    finished = _open_run(prepared, seat, topology, ranks, transport, recorder)
    watchdog = _start_watchdog(ranks, transport, recorder, progress, watch_host) if watch_host else None
    return finished, topology, watchdog, rotating


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
    device: dict[str, Any] = {}
    software: dict[str, Any] = {}


def distinct_software(ranks: Sequence[RankEnvironment]) -> list[SoftwareRecord]:
    """Each different set of versions and settings once, with the ranks that have it; one entry where all agree."""
    alike: dict[str, list[int]] = {}
    for rank, place in enumerate(ranks):
        alike.setdefault(_text(place.software), []).append(rank)
    return [SoftwareRecord(ranks=own, **ranks[own[0]].software) for own in alike.values()]


def _rank_record(place: RankEnvironment) -> RankRecord:
    """A place for the manifest; its software stands beside, once for all ranks that share it."""
    return RankRecord(
        host=place.host,
        boot=place.boot,
        pid=place.pid,
        cores=place.cores,
        gpu=place.gpu,
        found=place.found,
        device=msgspec.convert(place.device, GpuIdentity) if place.device else None,
    )


def _describe_rank(prepared: PreparedRun, seat: Seat, transport: Transport) -> str:
    """This rank's `RankEnvironment` as JSON; binds it first, if it is to be bound."""
    described = dict(transport.describe())
    gpu = described.get("pci_bus_id")
    cores = bind(seat, gpu) if prepared.request.bind else allowed_cores()
    host = "local" if seat.launcher == "threads" else socket.gethostname()
    return _text(
        RankEnvironment(
            host=host,
            boot=boot_id(),
            pid=os.getpid(),
            cores=cores,
            gpu=gpu,
            device=described.get("device") or {},
            software=software(described),
            found=RankDetection() if seat.launcher == "threads" else _surroundings(gpu),
        )
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


def _cross_check(seat: Seat, transport: Transport) -> None:
    """What the launcher's variables say must be what the library says, or several jobs are running as one."""
    if (seat.rank, seat.world_size) != (transport.rank, transport.world_size):
        raise EnvironmentFault(
            f"{seat.launcher} says rank {seat.rank} of {seat.world_size}, {transport.name} says rank {transport.rank} "
            f"of {transport.world_size}: start all ranks with one launcher, and its own MPI"
        )


def _run_one(
    number: int,
    planned: PlannedCase,
    transport: Transport,
    topology: Topology,
    recorder: RunRecorder,
    progress: Progress,
    watchdog: Watchdog | None,
    rotation: Rotation,
    witness: Witness,
) -> None:
    if transport.rank == 0:
        recorder.begin(number, planned)
    progress.case = number
    if watchdog:
        watchdog.limit = planned.settings.timeout * (1.0 + planned.case.nbytes / _GIB)
    measured = run_case(
        *(planned.case, transport, topology, planned.settings),
        progress=progress,
        rotation=rotation,
        witness=witness,
        command=recorder.prepared.request.command,
    )
    if measured is not None:
        recorder.finish(measured)


def _give_up(watchdog: Watchdog | None, error: BaseException) -> None:
    """Tell the watchdog, which ends this process; without one, the error goes on to the caller."""
    if watchdog:
        watchdog.fail("transport" if isinstance(error, TransportError) else "raised", _in_a_line(error))


def _in_a_line(error: BaseException) -> str:
    """What went wrong; an error that is not one of ours is named by its type as well."""
    return str(error) if isinstance(error, NcclbenchError) else f"{type(error).__name__}: {error}"


def _refuse_disagreement(prepared: PreparedRun, transport: Transport) -> None:
    """All ranks must run the same plan with the same version; a stale install on one node would go unnoticed."""
    plan = hashlib.sha256(msgspec.json.encode(prepared.plan.as_record())).hexdigest()[:16]
    mine = {"ncclbench": __version__, "plan": plan, "world size": transport.world_size}
    mine["topology file"] = prepared.topology.sha256[:16] if prepared.topology else "none"
    if prepared.plan.process_starts > 1:
        mine["process start"] = "the next that is missing" if prepared.start is None else prepared.start + 1
    views = [msgspec.json.decode(text) for text in all_gather_text(transport.control, _text(mine))]
    for rank, view in enumerate(views):
        for key, value in view.items():
            if value != views[0][key]:
                raise EnvironmentFault(f"rank {rank} has {key} {value}, rank 0 has {views[0][key]}: start all alike")


def _text(data: Any) -> str:
    return msgspec.json.encode(data).decode()


def _plan_memory(prepared: PreparedRun, seat: Seat, topology: Topology, transport: Transport) -> dict[int, Rotation]:
    """Refuse what does not fit; on GPUs, over how many sets of buffers each case rotates, by its number.

    Every rank checks its own GPU and node; the first refusal is everybody's.
    """
    staged, sharing = getattr(transport, "staged", None), getattr(transport, "ranks_per_gpu", 1)
    rooms = rooms_of(transport.device, staged, seat.local_size, sharing)
    message, demands = "", {}
    try:
        demands = _demands(prepared, topology)
        _refuse_too_large(prepared.plan, demands, rooms)
    except UsageError as error:
        message = str(error)
    refusals = [text for text in all_gather_text(transport.control, message) if text]
    if refusals:
        raise UsageError(refusals[0])
    if transport.device == "cpu":
        return {}
    each, held = rotations(list(demands.values()), *agreed_room(transport, room_for_one(rooms)))
    BLOCKS.plan(held.blocks)
    return dict(zip(demands, each, strict=True))


def _demands(prepared: PreparedRun, topology: Topology) -> dict[int, Demand]:
    """What each case that can run here asks of memory, by its number."""
    found = {}
    for number, planned in enumerate(prepared.plan.cases):
        with suppress(Unable):
            found[number] = demand(build_variants(planned.case, topology), planned.settings)
    return found


def _refuse_too_large(plan: Plan, demands: Mapping[int, Demand], rooms: Sequence[tuple[int, int, str]]) -> None:
    """One set of buffers of every case must fit, on GPUs with what the cases before it keep.

    Raises:
        UsageError: naming the first case that does not.
    """
    held = Held()
    for number, one in demands.items():
        held, alone = held.after(one), Held().after(one)
        name = plan.cases[number].case.id
        for ranks, available, where in rooms:
            if where != ON_GPU:
                refuse_too_large(name, one.nbytes, ranks, available, where)
                continue
            kept = ", with what earlier cases keep," if held != alone else ""
            refuse_too_large(name + kept, held.nbytes, ranks, available, where)


def _open_run(
    prepared: PreparedRun,
    seat: Seat,
    topology: Topology,
    ranks: list[RankEnvironment],
    transport: Transport,
    recorder: RunRecorder,
) -> set[str]:
    """Rank 0 opens the run directory; all learn which cases are finished, or why it could not be opened."""
    answer: dict[str, Any] = {}
    command = list(prepared.request.command)
    if transport.rank == 0:
        manifest = Manifest(
            plan=msgspec.convert(prepared.plan.as_record(), PlanRecord),
            transport=prepared.transport,
            device=transport.device,
            world_size=transport.world_size,
            topology=topology.as_record(),
            ranks=[_rank_record(place) for place in ranks],
            software=distinct_software(ranks),
            provenance=provenance(seat.launcher, command, dict(transport.describe())),
            started=utc_now().isoformat(timespec="seconds").replace("+00:00", "Z"),
        )
        try:
            answer = {"finished": sorted(recorder.open(manifest)), "out": str(recorder.out.absolute())}
        except NcclbenchError as error:
            answer = {"error": str(error), "usage": isinstance(error, UsageError)}
    answer = msgspec.json.decode(broadcast_text(transport.control, _text(answer)))
    if "error" in answer:
        raise (UsageError if answer["usage"] else EnvironmentFault)(answer["error"])
    if (
        recorder.writer is None
    ):  # a directory named after the time has another name on every rank; that of rank 0, which writes, is the one
        recorder.out = Path(answer["out"])
    return set(answer["finished"])


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
    trouble = getattr(transport, "trouble", None)
    watchdog = Watchdog(transport.rank, transport.world_size, progress, on_fault, here, parent, trouble)
    watchdog.join(broadcast_text(transport.control, watchdog.open(host) if transport.rank == 0 else ""))
    outlive_parent()
    # Nobody measures before everybody is watched.
    transport.control.all_gather(np.zeros(1, np.int64))
    return watchdog


def join_and_run(prepared: PreparedRun, seat: Seat, timeout: float) -> tuple[Exit, Path]:
    """Join the job that a launcher has started, and run the plan; what it ended in, and rank 0's run directory."""
    module = load("transports", prepared.transport)
    if getattr(module, "NEEDS_STORE", False):
        seat = with_store(seat)
    seat = replace(seat, device=prepared.request.device)
    transport: Transport = module.open_transport(prepared.transport, seat, timeout)
    recorder = RunRecorder(prepared)
    code = run_rank(prepared, seat, transport, recorder, _watch_hosts(seat))
    return code, recorder.out


def _watch_hosts(seat: Seat) -> str:
    """Where rank 0 can be reached, comma-separated, the likeliest first; only rank 0's answer counts."""
    if seat.local_size == seat.world_size:
        return LOOPBACK
    named = [os.environ[name] for name in ("MASTER_ADDR",) if os.environ.get(name)]
    return ",".join(dict.fromkeys(named + local_addresses()))


def play_ranks(prepared: PreparedRun, nproc: int) -> Exit:
    """Run the plan on ranks that are threads of this process."""
    from ncclbench.transports.threads import ThreadTransport, play

    recorder = RunRecorder(prepared)

    def main(transport: ThreadTransport) -> Exit:
        seat = Seat(
            rank=transport.rank, world_size=nproc, local_rank=transport.rank, local_size=nproc, launcher="threads"
        )
        return run_rank(prepared, seat, transport, recorder, None)

    def interrupted(number: signal.Signals) -> None:
        end_process(recorder.fault(Fault("failed", (), f"interrupted by {number.name}", -1)))

    timeout = max(planned.settings.timeout for planned in prepared.plan.cases)
    with heeding(interrupted):
        try:
            code = worst(play(nproc, main, timeout))
        except Exception as error:
            if recorder.writer is None or recorder.is_over:  # nothing is open, or the end could not be shown
                raise
            code = recorder.fault(Fault("failed", (), _in_a_line(error), -1))
        settled.set()
        return code
