"""One run without rank processes: ranks are threads of this process, or times are computed without ranks.

open the run directory -> case after case -> end
"""

import signal

from ncclbench.buffers.arrays import memory_limits
from ncclbench.config.plugins import load
from ncclbench.errors import Exit
from ncclbench.launch.core_binding import allowed_cores, bind, cores_of
from ncclbench.launch.preparation import PreparedRun
from ncclbench.launch.rank_session import (
    RankEnvironment,
    error_line,
    manifest_of,
    memory_demands,
    rank_environment,
    refuse_without_memory,
)
from ncclbench.launch.recorder import RunRecorder
from ncclbench.launch.signals import handling_signals, outcome_known
from ncclbench.launch.watchdog.attribution import Fault
from ncclbench.launch.watchdog.watchdog import end_process
from ncclbench.measure.executor import Executor, ThreadExecutor
from ncclbench.topology import Topology
from ncclbench.topology.placement import RankDetection, place_detected_ranks, place_ranks, plan_placement
from ncclbench.transports.base import Facts, RankIdentity
from ncclbench.transports.capabilities import Capabilities, Hosting, capabilities_of

# The host of ranks that are threads, in the topology and the manifest.
_HOST = "local"


def run_in_process(prepared: PreparedRun, nproc: int) -> Exit:
    """Run the plan in this process, on `nproc` ranks."""
    recorder = RunRecorder(prepared)

    def interrupted(number: signal.Signals) -> None:
        end_process(recorder.fault(Fault("failed", (), f"interrupted by {number.name}", -1)))

    with handling_signals(interrupted):
        try:
            code = _run(prepared, nproc, recorder)
        except Exception as error:
            if recorder.writer is None or recorder.is_over:  # no directory is open, or the results cannot be printed
                raise
            code = recorder.fault(Fault("failed", (), error_line(error), -1))
        outcome_known.set()
        return code


def _run(prepared: PreparedRun, nproc: int, recorder: RunRecorder) -> Exit:
    capabilities = capabilities_of(prepared.transport)
    topology, executor = _prepare(prepared, nproc, capabilities)
    described = dict(executor.describe())
    ranks = [] if capabilities.hosting is Hosting.NONE else _ranks(prepared, nproc, described)
    device = capabilities.devices[0] if capabilities.devices else None
    finished = recorder.open(manifest_of(prepared, capabilities.hosting.value, device, topology, ranks, described))
    for number, planned in enumerate(prepared.plan.cases):
        if planned.case.id not in finished:
            recorder.begin(number, planned)
            measured = executor.execute(planned.case, topology, planned.settings)
            assert measured is not None, "this process has rank 0"
            recorder.finish(measured)
    return recorder.end()


def _prepare(prepared: PreparedRun, nproc: int, capabilities: Capabilities) -> tuple[Topology, Executor]:
    """Place the ranks and make the executor.

    Raises:
        UsageError: if the topology file does not match, or a case does not fit into this node's memory.
    """
    if capabilities.hosting is Hosting.NONE:
        topology = plan_placement(prepared.topology, nproc) if prepared.topology else Topology.single_node(nproc)
        executor: Executor = load("transports", prepared.transport).open_executor(prepared.transport, nproc)
        return topology, executor
    hosts = [_HOST] * nproc
    topology = (
        place_ranks(prepared.topology, hosts)
        if prepared.topology
        else place_detected_ranks(hosts, [RankDetection()] * nproc)
    )
    refuse_without_memory(prepared.plan, memory_demands(prepared.plan, topology), memory_limits("cpu", None, nproc))
    timeout = max(planned.settings.timeout for planned in prepared.plan.cases)
    on_start = (lambda rank: bind(_identity(rank, nproc))) if prepared.request.bind else (lambda _rank: [])
    return topology, ThreadExecutor(nproc, timeout, on_start, prepared.request.command)


def _ranks(prepared: PreparedRun, nproc: int, described: Facts) -> list[RankEnvironment]:
    """Each rank's environment for the manifest; with ``--bind auto`` its thread is bound to its share of the cores."""
    cores = [cores_of(_identity(rank, nproc)) if prepared.request.bind else allowed_cores() for rank in range(nproc)]
    return [rank_environment(described, _HOST, own, RankDetection()) for own in cores]


def _identity(rank: int, nproc: int) -> RankIdentity:
    launcher = Hosting.THREADS.value
    return RankIdentity(rank=rank, world_size=nproc, local_rank=rank, local_size=nproc, launcher=launcher)
