"""The manifest of a run: plan, topology, ranks, software and provenance, frozen, as it stands in ``manifest.json``.

The file becomes a typed `Manifest` once, where it is read. Unknown fields are ignored. A field that is left out when
it is not known has the default None or `UNSET`; one that is written as null has the default factory `null`.
"""

from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType, field

from ncclbench.store.records import SCHEMA, Json, OriginRecord, Ranks, Version, no_entries, null
from ncclbench.topology import TopologyRecord
from ncclbench.topology.placement import RankDetection
from ncclbench.units import Int64

# As many as a plan can declare: 100 starts of each of its modes.
Starts = Annotated[int, msgspec.Meta(ge=1, le=10_000)]


class ModeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One way in which the plan starts processes.

    Attributes:
        name: its name.
        variables: the environment variables that it sets.
    """

    name: str
    variables: dict[str, str] = {}


class PlannedCaseRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One case of the plan; of an imported run only its `id` is known.

    Attributes:
        id: unique in the plan.
        pattern: name of the pattern.
        nbytes: S as asked for.
        dtype: the element type.
        timing: the timing regime.
        params: the pattern's parameters that are not defaults.
        mode: the mode whose process starts measure it.
        settings: how it is measured.
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
    """The plan; a resumed run must have the same.

    Attributes:
        name: its name; ``imported`` of an imported run.
        starts: process starts of each mode, 1 to 10,000.
        modes: its modes, where it has any; start k is of mode k mod M.
        cases: what is to be measured.
    """

    name: str | None = None
    starts: Starts | UnsetType = UNSET
    modes: list[ModeRecord] = []
    cases: list[PlannedCaseRecord] = field(default_factory=no_entries)


class GpuIdentity(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which GPU a rank has; what NVML does not tell is left out.

    Attributes:
        name: its model.
        uuid: NVML's identifier.
        serial: serial number of the board.
        vbios: version of its firmware.
        driver: version of the driver.
    """

    name: str | None = None
    uuid: str | None = None
    serial: str | None = None
    vbios: str | None = None
    driver: str | None = None


class RankRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where one rank ran; an imported run has what its log says.

    Attributes:
        rank: its number, in imported runs; elsewhere the list is in rank order.
        host: its host name.
        boot: id of the running kernel, the same in all containers of a machine; "" where the kernel has none.
        group: nccl-tests' group of the rank.
        pid: its process.
        cores: the cores that it may use.
        gpu: PCI address of its GPU; null without one.
        found: what it found out about its NIC and its NVLink domain.
        device: identity of its GPU; of an imported run the device's number in its process.
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
        versions: of libraries and of the kernel, by name.
        variables: environment variables that change what is measured.
    """

    ranks: list[Int64] = field(default_factory=no_entries)
    versions: dict[str, Json] | None = None
    variables: dict[str, Json] | None = None


class ProvenanceRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the run was made with, as rank 0 saw it.

    Of an imported run: of the machine that was measured, as far as the log has it; only `ncclbench`, `git_commit` and
    `command` are of the import.

    Attributes:
        ncclbench: version of ncclbench.
        git_commit: of its source tree, with ``-dirty`` where files differ; null outside a checkout.
        python: version of Python.
        versions: of the distributions that matter.
        platform: operating system and machine.
        cpu: name of the processor; null where the kernel does not tell.
        cores: number of cores.
        launcher: what started the ranks.
        command: the command line.
        variables: the variables that begin with ``NCCL_``, ``UCX_``, ``TORCH_``, ``GLOO_``, ``OMP_NUM_THREADS`` or
            ``CUDA_VISIBLE_DEVICES``; none whose name looks like a secret.
        transport: what the transport says of itself; on GPUs with `ranks_per_gpu`.
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
        """How many ranks shared a GPU; more than one only where that was asked for, to try the software."""
        count = (self.transport or {}).get("ranks_per_gpu")
        return count if isinstance(count, int) else 1

    @property
    def staged(self) -> bool | None:
        """Whether GPU buffers go through pinned host memory; None of a transport that has no such choice."""
        staged = (self.transport or {}).get("staged")
        return staged if isinstance(staged, bool) else None


class LoggedDevice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of nccl-tests' list of devices.

    Attributes:
        rank: its number.
        group: nccl-tests' group of the rank.
        pid: its process.
        host: its host name.
        device: the device's number in its process.
        gpu: PCI address of its GPU.
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
    """What stood around a table in another tool's log; most of it only nccl-tests has.

    Attributes:
        line: where the table begins; null where the log has no lines.
        program: what was run.
        library: the MPI library.
        groups: how many groups of processes there were.
        processes: how many processes, each group's where there are several.
        config: the settings that the log has.
        devices: each rank's device.
        versions: of libraries.
        out_of_bounds: nccl-tests' count of wrong values.
        avg_bus_gb_per_s: nccl-tests' average.
        concluded: whether the table has its end.
        args: the command line of the program.
        end_time: when it ended.
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
        file: its name.
        sha256: of its content.
        bytes: its size.
        importer: the importer that read it.
        tool: the tool that wrote it.
        version: of the tool; null where the log does not say.
        started: as the log has it, often local time.
        cases: how many cases it has.
        tables: what stood around each table.
        warnings: what a user must know.
        damaged: lines that were left out.
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
    """What was to be run, where, and with what; written once.

    Attributes:
        schema: 1.
        synthetic: the run was made up, as an example.
        simulated: the times come from a model.
        plan: the plan.
        transport: name of the transport; null where imported logs differ or do not say.
        device: ``cpu`` or ``cuda``; null where imported logs differ or do not say.
        world_size: number of ranks; null where imported logs differ or do not say.
        topology: where every rank sits, and in `sources` how that is known; `wiring` where NICs are known.
        ranks: each rank's host, process, cores and GPU.
        software: each different set of versions and settings once, with the ranks that have it.
        provenance: what the run was made with.
        imported: the logs that it was imported from.
        started: when it began, in UTC.
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
        """The GPUs of the run, each model once."""
        found = [rank.device.name for rank in self.ranks if isinstance(rank.device, GpuIdentity)]
        return sorted({name for name in found if name})

    @property
    def software_views(self) -> list[SoftwareRecord]:
        """The different sets of versions and settings; of rank 0 alone where no more was recorded."""
        if self.software:
            return self.software
        known = self.provenance
        if known == ProvenanceRecord():
            return []
        return [SoftwareRecord(ranks=[0], versions=known.versions or {}, variables=known.variables or {})]

    @property
    def shares_a_machine(self) -> bool:
        """Whether ranks of unlike host names ran under one kernel: containers, or nodes that are only played."""
        hosts: dict[str, set[str | None]] = {}
        for rank in self.ranks:
            if rank.boot:
                hosts.setdefault(rank.boot, set()).add(rank.host)
        return any(len(names) > 1 for names in hosts.values())

    def lacks(self, origin: OriginRecord | None) -> str | None:
        """What a record's origin names and this manifest does not have, in words; None if all is there."""
        if origin is None:
            return "`$.imported` is null, and the run was imported" if self.imported else None
        if origin.source >= len(self.imported):
            return f"the manifest's `imported` has {len(self.imported)} entries - at `$.imported.source`"
        tables = len(self.imported[origin.source].tables)
        if origin.table is not None and origin.table >= tables:
            return f"that source has {tables} tables in the manifest - at `$.imported.table`"
        return None
