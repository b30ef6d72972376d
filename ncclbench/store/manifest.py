"""The manifest of a run: plan, topology, ranks, software and provenance, frozen, as it stands in ``manifest.json``.

The file is decoded to a `Manifest` once, where it is read. Unknown fields are ignored. A field that is left out if it
is unknown has the default None or `UNSET`; a field that is then written as null has the default factory `null`.
"""

from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType, field

from ncclbench.store.records import SCHEMA, Json, OriginRecord, Ranks, Version, no_entries, null
from ncclbench.topology import TopologyRecord
from ncclbench.topology.placement import RankDetection
from ncclbench.units import Int64

# The most that a plan can declare: 100 starts of each of its modes.
Starts = Annotated[int, msgspec.Meta(ge=1, le=10_000)]


class ModeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One way in which the plan starts processes.

    Attributes:
        name: name of the mode.
        variables: the environment variables that the mode sets.
    """

    name: str
    variables: dict[str, str] = {}


class PlannedCaseRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One case of the plan; of an imported run only its `id` is known.

    Attributes:
        id: unique in the plan.
        pattern: name of the pattern.
        nbytes: requested S.
        dtype: the element type.
        timing: the timing regime.
        params: the pattern's parameters that are not defaults.
        mode: the mode whose process starts measure the case.
        settings: the settings of the measurement.
    """

    id: str | None = None
    pattern: str | None = None
    nbytes: Int64 | None = None
    dtype: str | None = None
    timing: str | None = None
    params: dict[str, Json] | None = None
    mode: str | None = None
    settings: dict[str, Json] | None = None


class PlanRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The plan; a resumed run must have the same plan.

    Attributes:
        name: name of the plan; ``imported`` for an imported run.
        starts: process starts of each mode, 1 to 10,000.
        modes: the modes, if there are any; start k has mode k mod M.
        cases: the cases to measure.
    """

    name: str | None = None
    starts: Starts | UnsetType = UNSET
    modes: list[ModeRecord] = []
    cases: list[PlannedCaseRecord] = field(default_factory=no_entries)


class GpuIdentity(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Identity of a GPU; fields that NVML does not report are left out.

    Attributes:
        name: model of the GPU.
        uuid: NVML's identifier.
        serial: serial number of the board.
        vbios: version of the firmware.
        driver: version of the driver.
    """

    name: str | None = None
    uuid: str | None = None
    serial: str | None = None
    vbios: str | None = None
    driver: str | None = None


class RankRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where one rank ran; an imported run has only what its log states.

    Attributes:
        rank: the rank, in imported runs; in other runs the list is in rank order.
        host: host name.
        boot: id of the running kernel, the same in all containers of a machine; "" if the kernel has none.
        group: nccl-tests' group of the rank.
        pid: process id.
        cores: the cores that the rank may use.
        gpu: PCI address of the GPU; null without a GPU.
        found: detected NIC and NVLink domain of the rank.
        device: identity of the GPU; in an imported run, the number of the device in its process.
        name: the GPU's name in an imported log.
    """

    rank: Int64 | None = None
    host: str | None = None
    boot: str | None = None
    group: Int64 | UnsetType | None = UNSET
    pid: Int64 | UnsetType | None = UNSET
    cores: list[Int64] | None = None
    gpu: str | UnsetType | None = UNSET
    found: RankDetection | None = None
    device: GpuIdentity | Int64 | None = None
    name: str | UnsetType | None = UNSET


class SoftwareRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One set of versions and settings, and the ranks that have it.

    Attributes:
        ranks: the ranks.
        versions: versions of the libraries and the kernel, by name.
        variables: environment variables that influence the measurement.
    """

    ranks: list[Int64] = field(default_factory=no_entries)
    versions: dict[str, Json] | None = None
    variables: dict[str, Json] | None = None


class ProvenanceRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Software and machine of the run, as seen by rank 0.

    In an imported run they are those of the measured machine, as far as the log has them. Only `ncclbench`,
    `git_commit` and `command` are those of the import.

    Attributes:
        ncclbench: version of ncclbench.
        git_commit: commit of its source tree, with ``-dirty`` if files differ; null outside a checkout.
        python: version of Python.
        versions: versions of the relevant distributions.
        platform: operating system and machine.
        cpu: name of the processor; null if the kernel does not report it.
        cores: number of cores.
        launcher: the launcher of the ranks.
        command: the command line.
        variables: the variables that begin with ``NCCL_``, ``UCX_``, ``TORCH_``, ``GLOO_``, ``OMP_NUM_THREADS`` or
            ``CUDA_VISIBLE_DEVICES``; none whose name looks like a secret.
        transport: what the transport reports about itself; on GPUs with `ranks_per_gpu`.
    """

    ncclbench: str | None = None
    git_commit: str | UnsetType | None = UNSET
    python: str | None = None
    versions: dict[str, Json] | None = None
    platform: str | None = None
    cpu: str | UnsetType | None = UNSET
    cores: Int64 | UnsetType | None = UNSET
    launcher: str | None = None
    command: list[str] = []
    variables: dict[str, Json] | None = None
    transport: dict[str, Json] | None = None

    @property
    def ranks_per_gpu(self) -> int:
        """The number of ranks per GPU; more than 1 only if the user asked for it, to try the software."""
        count = (self.transport or {}).get("ranks_per_gpu")
        return count if isinstance(count, int) else 1

    @property
    def staged(self) -> bool | None:
        """Whether GPU buffers go through pinned host memory; None if the transport has no such choice."""
        staged = (self.transport or {}).get("staged")
        return staged if isinstance(staged, bool) else None


class LoggedDevice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of nccl-tests' list of devices.

    Attributes:
        rank: the rank.
        group: nccl-tests' group of the rank.
        pid: process id.
        host: host name.
        device: number of the device in its process.
        gpu: PCI address of the GPU.
        name: the GPU's name.
    """

    rank: Int64
    group: Int64 | UnsetType | None = UNSET
    pid: Int64 | UnsetType | None = UNSET
    host: str | UnsetType | None = UNSET
    device: Int64 | UnsetType | None = UNSET
    gpu: str | UnsetType | None = UNSET
    name: str | UnsetType | None = UNSET


class LoggedTable(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The text around a table in another tool's log; only nccl-tests has most of it.

    Attributes:
        line: first line of the table; null if the log has no lines.
        program: name of the program.
        library: the MPI library.
        groups: number of groups of processes.
        processes: number of processes, per group if there are several groups.
        config: the settings in the log.
        devices: the device of each rank.
        versions: versions of libraries.
        out_of_bounds: nccl-tests' count of wrong values.
        avg_bus_gb_per_s: nccl-tests' average.
        concluded: whether the end of the table is in the log.
        args: the command line of the program.
        end_time: when the program ended.
        json_version: version of nccl-tests' JSON.
    """

    line: Int64 | UnsetType | None = UNSET
    program: str | UnsetType | None = UNSET
    library: str | None = None
    groups: Int64 | UnsetType | None = UNSET
    processes: Int64 | UnsetType | None = UNSET
    config: dict[str, Int64 | str] | None = None
    devices: list[LoggedDevice] | None = None
    versions: dict[str, str] | None = None
    out_of_bounds: Int64 | UnsetType | None = UNSET
    avg_bus_gb_per_s: float | UnsetType | None = UNSET
    concluded: bool | UnsetType = UNSET
    args: list[str] | None = None
    end_time: str | UnsetType | None = UNSET
    json_version: Int64 | None = None


class ImportedSource(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A log that the run was imported from; one entry per file and tool.

    Attributes:
        file: name of the file.
        sha256: hash of its content.
        bytes: size of the file.
        importer: the importer that read it.
        tool: the tool that wrote it.
        version: version of the tool; null if the log does not state it.
        started: start time in the log, often local time.
        cases: number of cases in the file.
        tables: the text around each table.
        warnings: warnings for the user.
        damaged: damaged lines that were skipped.
    """

    file: str
    sha256: str | None = None
    bytes: Int64 | None = None
    importer: str | None = None
    tool: str
    version: str | None = field(default_factory=null)
    started: str | None = field(default_factory=null)
    cases: Int64 | None = None
    tables: list[LoggedTable] = field(default_factory=no_entries)
    warnings: list[str] = field(default_factory=no_entries)
    damaged: list[str] = field(default_factory=no_entries)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The plan, topology, ranks and software of a run; written once.

    Attributes:
        schema: 1.
        synthetic: the run is a synthetic example.
        simulated: the times come from a model.
        plan: the plan.
        transport: name of the transport; null if imported logs differ or do not state it.
        device: ``cpu`` or ``cuda``; null if imported logs differ or do not state it.
        world_size: number of ranks; null if imported logs differ or do not state it.
        topology: the topology of the ranks, with its `sources`; with `wiring` if the NICs are known.
        ranks: each rank's host, process, cores and GPU.
        software: each different set of versions and settings once, with the ranks that have it.
        provenance: software and machine, as seen by rank 0.
        imported: the logs that the run was imported from.
        started: when the run began, in UTC.
        redacted: names were replaced by hashes.
    """

    schema: Version = field(default_factory=lambda: SCHEMA)
    synthetic: bool = False
    simulated: bool = False
    plan: PlanRecord = PlanRecord()
    transport: str | None = field(default_factory=null)
    device: str | None = field(default_factory=null)
    world_size: Ranks | None = field(default_factory=null)
    topology: TopologyRecord | None = None
    ranks: list[RankRecord] = field(default_factory=no_entries)
    software: list[SoftwareRecord] | None = None
    provenance: ProvenanceRecord = ProvenanceRecord()
    imported: list[ImportedSource] = []
    started: str | None = field(default_factory=null)
    redacted: bool = False

    @property
    def gpu_names(self) -> list[str]:
        """The GPU models of the run, sorted."""
        found = [rank.device.name for rank in self.ranks if isinstance(rank.device, GpuIdentity)]
        return sorted({name for name in found if name})

    @property
    def software_views(self) -> list[SoftwareRecord]:
        """The different sets of versions and settings; only rank 0's if no others were recorded."""
        if self.software:
            return self.software
        known = self.provenance
        if known == ProvenanceRecord():
            return []
        return [SoftwareRecord(ranks=[0], versions=known.versions or {}, variables=known.variables or {})]

    @property
    def shares_a_machine(self) -> bool:
        """Whether ranks with different host names ran under one kernel, as in containers or emulated nodes."""
        hosts: dict[str, set[str | None]] = {}
        for rank in self.ranks:
            if rank.boot:
                hosts.setdefault(rank.boot, set()).add(rank.host)
        return any(len(names) > 1 for names in hosts.values())

    def lacks(self, origin: OriginRecord | None) -> str | None:
        """What a record's origin refers to and this manifest lacks, in words; None if nothing is missing."""
        if origin is None:
            return "`$.imported` is null, and the run was imported" if self.imported else None
        if origin.source >= len(self.imported):
            return f"the manifest's `imported` has {len(self.imported)} entries - at `$.imported.source`"
        tables = len(self.imported[origin.source].tables)
        if origin.table is not None and origin.table >= tables:
            return f"that source has {tables} tables in the manifest - at `$.imported.table`"
        return None
