"""Synthetic run directories: for tests, for the development of checks, and to time the judging of large runs.

The writer is that of real runs. The manifest says that the run is synthetic, so its verdict is stamped ``synthetic``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from ncclbench.analysis.summary import skew, summarise
from ncclbench.schedule.rates import GIGA, bus_factor
from ncclbench.store.manifest import (
    GpuIdentity,
    Manifest,
    PlannedCaseRecord,
    PlanRecord,
    ProvenanceRecord,
    RankRecord,
    SoftwareRecord,
)
from ncclbench.store.records import (
    FlowTimes,
    GpuReading,
    GpuState,
    GroupResult,
    Json,
    LedgerRecord,
    PathRecord,
    PhaseResult,
    Record,
)
from ncclbench.store.run_directory import Run
from ncclbench.store.run_writer import RunWriter
from ncclbench.topology import Topology

Floats = NDArray[np.float64]
H100 = "NVIDIA H100 80GB HBM3"


@dataclass(frozen=True, kw_only=True)
class ExampleCase:
    """One case.

    Attributes:
        pattern: name of the pattern, and op of the bus bandwidth.
        nbytes: S.
        bus_gb_per_s: bus bandwidth of a healthy group.
        group: parameter `group` of the collective.
        timing: the timing regime.
        samples: iterations per start.
        slow: index of a group -> factor on its time.
        noise: relative standard deviation of an iteration's time.
        wrong: number of elements that differ.
        flows: rounds of flows along the rails, as in ``same_rail``, instead of groups; the keys of `slow` are then
            sending ranks.
    """

    pattern: str
    nbytes: int
    bus_gb_per_s: float
    group: str = "world"
    timing: str = "isolated"
    samples: int = 60
    slow: Mapping[int, float] = field(default_factory=dict)
    noise: float = 0.005
    wrong: int = 0
    flows: bool = False

    @property
    def params(self) -> dict[str, Json]:
        """The parameters that are not defaults."""
        if self.flows:
            return {"direction": "apart"}
        return {} if self.group == "world" else {"group": self.group}

    @property
    def id(self) -> str:
        """The id, in the format of real cases."""
        return f"{self.pattern}/float32/{self.nbytes}/{self.timing}" + "".join(
            f"/{name}={value}" for name, value in self.params.items()
        )


@dataclass(frozen=True, kw_only=True)
class Example:
    """A synthetic run.

    Attributes:
        cases: its cases.
        nodes: number of hosts.
        ranks_per_node: ranks per host.
        domain_nodes: hosts in an NVLink domain.
        starts: process starts that the plan declares.
        made: number of starts that were made; None for all.
        gpu: name of the GPUs; None for ranks on CPUs.
        transport: name of the transport.
        links: links of every case in NCCL's log.
        link_layer: link layers of the NICs in NCCL's log.
        nvls: state of NVLink SHARP in NCCL's log: ``on``, ``off``, ``unavailable``, or ``unknown`` for none.
        edit: function that changes a record before it is stored.
        software: versions and settings of each rank that differs from the others.
        seed: seed of the noise.
    """

    cases: Sequence[ExampleCase]
    nodes: int = 8
    ranks_per_node: int = 8
    domain_nodes: int = 1
    starts: int = 3
    made: int | None = None
    gpu: str | None = H100
    transport: str = "nccl"
    links: Sequence[str] = ("NET/IB", "P2P/CUMEM")
    link_layer: Sequence[str] = ()
    nvls: str = "on"
    edit: Callable[[Record], Record] = lambda record: record
    software: Mapping[int, Mapping[str, Mapping[str, Json]]] = field(default_factory=dict)
    seed: int = 0

    @property
    def world_size(self) -> int:
        """The number of ranks, R."""
        return self.nodes * self.ranks_per_node

    @property
    def topology(self) -> Topology:
        """Hosts n0000, n0001, ...; the rail of a rank is its index on its host."""
        hosts = [f"n{rank // self.ranks_per_node:04d}" for rank in range(self.world_size)]
        plain = Topology.from_hosts(hosts)
        return Topology(
            nodes=plain.nodes,
            domains=plain.nodes // self.domain_nodes,
            rails=plain.rails,
            sites=plain.sites,
            node_names=plain.node_names,
            sources={**plain.sources, "domain": "made up"},
        )


def write_example(path: Path, example: Example) -> Path:
    """Write the run directory; returns its path."""
    rng = np.random.default_rng(example.seed)
    manifest = _manifest(example)
    writer = RunWriter.create(path, manifest)
    for start in range(example.starts if example.made is None else example.made):
        pids = [1000 * (start + 1) + rank for rank in range(example.world_size)]
        writer.event("start", start=start, command=["run"], pids=pids, software=manifest.software)
        for case in example.cases:
            writer.event("case", case=case.id, start=start)
            record, seconds_RNK = _measure(example, case, start, rng)
            record = example.edit(record)
            timed = record.time_us is not None
            writer.append(record, ["total"] if timed else None, seconds_RNK if timed else None)
        writer.event("end", start=start, exit_code=0)
    return path


def example_run(example: Example) -> Run:
    """The run in memory, without events and samples: for checks that read only records."""
    rng = np.random.default_rng(example.seed)
    starts = range(example.starts if example.made is None else example.made)
    records = [example.edit(_measure(example, case, k, rng)[0]) for k in starts for case in example.cases]
    return Run(Path("example"), _manifest(example), tuple(records), ())


def _manifest(example: Example) -> Manifest:
    usual: dict[str, dict[str, Json]] = {
        "versions": {"nccl": "2.28.9", "torch": "2.9.0"},
        "variables": {"NCCL_IB_GID_INDEX": "3"},
    }
    others = dict(example.software)
    same = [rank for rank in range(example.world_size) if rank not in others]
    views = [SoftwareRecord(ranks=same, **usual)] if same else []
    for rank, view in others.items():
        mixed = {kind: {**usual[kind], **view.get(kind, {})} for kind in usual}
        views.append(SoftwareRecord(ranks=[rank], **mixed))
    topology = example.topology
    return Manifest(
        synthetic=True,
        plan=PlanRecord(
            name="example",
            starts=example.starts,
            cases=[
                PlannedCaseRecord(id=case.id, pattern=case.pattern, nbytes=case.nbytes, timing=case.timing)
                for case in example.cases
            ],
        ),
        transport=example.transport,
        device="cuda" if example.gpu else "cpu",
        world_size=example.world_size,
        topology=topology.as_record(),
        ranks=[
            RankRecord(
                host=topology.node_names[int(node)],
                pid=1000 + rank,
                cores=[],
                device=GpuIdentity(name=example.gpu, serial="1320023000000") if example.gpu else None,
            )
            for rank, node in enumerate(topology.nodes)
        ],
        software=views,
        provenance=ProvenanceRecord(command=["ncclbench", "run"], launcher="torchrun", variables={}),
        started="2026-01-01T00:00:00Z",
    )


def _measure(example: Example, case: ExampleCase, start: int, rng: np.random.Generator) -> tuple[Record, Floats]:
    """The record of one case in one start, and its samples of shape (R, N, 1)."""
    return (_measure_flows if case.flows else _measure_groups)(example, case, start, rng)


def _measure_flows(example: Example, case: ExampleCase, start: int, rng: np.random.Generator) -> tuple[Record, Floats]:
    """Flows of every rank to its counterpart on up to 7 other nodes, one node per round."""
    world, rails = example.world_size, example.ranks_per_node
    healthy = case.nbytes / (case.bus_gb_per_s * GIGA)
    factors_R = np.array([case.slow.get(rank, 1.0) for rank in range(world)])
    phases, rounds = [], []
    for step in range(1, min(7, example.nodes - 1) + 1):
        flow_RN = healthy * factors_R[:, None] * rng.normal(1.0, case.noise, (world, case.samples))
        rounds.append(flow_RN)
        flows = FlowTimes(
            src=list(range(world)),
            dst=[(rank + step * rails) % world for rank in range(world)],
            nbytes=[case.nbytes] * world,
            p50_us=(np.median(flow_RN, axis=1) * 1e6).tolist(),
        )
        phases.append(PhaseResult(label=f"offset={step}", ledger=LedgerRecord(), flows=flows))
    seconds_RN = np.concatenate(rounds, axis=1)
    summary = summarise(seconds_RN.max(axis=0))
    rate = case.nbytes / (summary.p50 / 1e6) / GIGA
    record = _record(example, case, start, world, seconds_RN, rate)
    return msgspec.structs.replace(record, bus_gb_per_s=rate, phases=phases), seconds_RN[:, :, None]


def _measure_groups(example: Example, case: ExampleCase, start: int, rng: np.random.Generator) -> tuple[Record, Floats]:
    """All groups at the same time; the slowest rank of each group sets its time."""
    groups_GN = example.topology.groups(case.group)
    members = groups_GN.shape[1]
    factor = bus_factor(case.pattern, members)
    healthy = case.nbytes * factor / (case.bus_gb_per_s * GIGA) if factor else 1e-6
    seconds_RN = np.empty((example.world_size, case.samples))
    for index, ranks in enumerate(groups_GN):
        group_N = healthy * case.slow.get(index, 1.0) * rng.normal(1.0, case.noise, case.samples)
        # The slowest rank of an iteration sets its time; the others arrive later, so their durations are shorter.
        seconds_RN[ranks] = group_N * (1.0 - 0.02 * rng.random((members, 1)))
        seconds_RN[ranks[0]] = group_N
    rate = case.nbytes / (summarise(seconds_RN.max(axis=0)).p50 / 1e6) / GIGA
    results = [
        GroupResult(
            ranks=ranks.tolist(),
            time_us=(own := summarise(seconds_RN[ranks].max(axis=0))),
            bus_gb_per_s=case.nbytes / (own.p50 / 1e6) / GIGA * factor,
        )
        for ranks in groups_GN
    ]
    record = _record(example, case, start, members, seconds_RN, rate)
    results = results if len(results) > 1 else []
    return msgspec.structs.replace(record, bus_gb_per_s=rate * factor, groups=results), seconds_RN[:, :, None]


def _record(example: Example, case: ExampleCase, start: int, members: int, seconds_RN: Floats, rate: float) -> Record:
    return Record(
        case=case.id,
        pattern=case.pattern,
        transport=example.transport,
        timing=case.timing,
        dtype="float32",
        bytes=case.nbytes,
        world_size=example.world_size,
        status="wrong" if case.wrong else "ok",
        reason=f"{case.wrong} elements differ" if case.wrong else None,
        started="2026-01-01T00:00:00Z",
        start=start,
        params=case.params,
        wrong=case.wrong,
        wrong_ranks=[0] if case.wrong else [],
        group_size=members,
        time_us=summarise(seconds_RN.max(axis=0)),
        skew_us=skew(seconds_RN),
        alg_gb_per_s=rate,
        path=_path(example) if example.gpu else None,
        gpus=[_gpu(rank) for rank in range(example.world_size)] if example.gpu else [],
    )


def _path(example: Example) -> PathRecord:
    """The path of a healthy rank in NCCL's log."""
    networks = [link.removeprefix("NET/") for link in example.links if link.startswith("NET/")]
    known = example.nvls != "unknown"
    return PathRecord(
        version="2.28.9",
        links=list(example.links),
        gdr=True,
        channels=16,
        nvls=example.nvls == "on" if known else None,
        nvls_switched_off=example.nvls == "off" if known else None,
        network=networks[0] if networks else None,
        link_layer=list(example.link_layer),
    )


def _gpu(rank: int) -> GpuReading:
    state = GpuState(sm_mhz=1980, celsius=45, watts=300.0, throttled=[], errors={"ECC uncorrected errors": 0})
    return GpuReading(rank=rank, before=state, after=state)


def with_warning(record: Record, rank: int, warning: str) -> Record:
    """The record with a warning of one rank's GPU."""
    gpus = [msgspec.structs.replace(gpu, warnings=[warning]) if gpu.rank == rank else gpu for gpu in record.gpus]
    return msgspec.structs.replace(record, gpus=gpus)
