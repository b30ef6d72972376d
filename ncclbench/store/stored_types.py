"""The types that readers rely on inside a run directory, checked once where its files are read.

What a record or a manifest holds as plain data (a ledger, a pattern's facts, a topology) is checked here and stays
plain data: a line of another shape is damaged and is refused as a whole, instead of being half shown. Whatever else
stands beside these keys is nobody's business, and a key that is not there is not missed.
"""

from typing import Annotated, Any, Literal

import msgspec

from ncclbench.store.records import Ranks, Whole

Bytes = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Index = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
# As many as a plan can ever have declared (100 starts of each of its modes), and far fewer than take long to count.
Starts = Annotated[int, msgspec.Meta(ge=1, le=10_000)]


class LedgerShape(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of a case or of one of its phases."""

    sent_bytes: dict[str, Bytes] | None = None
    bottleneck_bytes: Bytes | None = None
    bottleneck_gb_per_s: float | None = None


class FlowsShape(msgspec.Struct, frozen=True, kw_only=True):
    """A round of flows: one entry a flow."""

    src: list[Whole] = []
    dst: list[Whole] = []
    nbytes: list[Bytes] = []
    p50_us: list[float | None] = []
    send_p50_us: list[float | None] = []
    recv_p50_us: list[float | None] = []


class PhaseGroupShape(msgspec.Struct, frozen=True, kw_only=True):
    """One group of a variant's collective."""

    ranks: list[Whole]
    p50_us: float | None


class PhaseShape(msgspec.Struct, frozen=True, kw_only=True):
    """What is nested in a phase of a record."""

    ledger: LedgerShape
    flows: FlowsShape | None = None
    groups: list[PhaseGroupShape] | None = None


class FactShape(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of a pattern's facts."""

    bases: dict[str, dict[str, Any]] | None = None


class PathShape(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of a path's proof."""

    proof: str | None = None
    links: list[str] = []
    link_layer: list[str] = []


class OriginShape(msgspec.Struct, frozen=True, kw_only=True):
    """Where an imported figure stands: `source` counts in the manifest's `imported`, `table` in its `tables`."""

    tool: str
    source: Index
    table: Index | None = None
    row: Index | None = None
    placement: Literal["out_of_place", "in_place"] | None = None
    figure: str | None = None
    type: str | None = None
    timestamp: str | None = None
    per_iteration: dict[str, float | None] = {}

    @property
    def is_a_row_of_theirs(self) -> bool:
        """Whether it is half a row of a table that nccl-tests itself has printed."""
        return self.tool == "nccl-tests" and self.figure == "table"

    def __post_init__(self) -> None:
        """A row without its place cannot be put back where it came from.

        Raises:
            ValueError: naming what is missing; msgspec adds where.
        """
        missing = [name for name in ("table", "row", "placement") if getattr(self, name) is None]
        if missing and self.is_a_row_of_theirs:
            raise ValueError(f"Object missing required field `{missing[0]}`")


class RecordShape(msgspec.Struct, frozen=True, kw_only=True):
    """What is nested in a record."""

    ledger: LedgerShape | None = None
    phases: list[PhaseShape] = []
    facts: list[FactShape] = []
    path: PathShape | None = None
    imported: OriginShape | None = None


class SoftwareShape(msgspec.Struct, frozen=True, kw_only=True):
    """Versions and settings, and the ranks that have them."""

    ranks: list[Whole] = []
    versions: dict[str, Any] | None = None
    variables: dict[str, Any] | None = None


class EventShape(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of a line of the event log; every line has a kind."""

    kind: Any
    start: Whole = 0
    ranks: list[Whole] = []
    pids: list[Any] | None = None
    software: list[SoftwareShape] | None = None


class PlanShape(msgspec.Struct, frozen=True, kw_only=True):
    """What is counted of a plan."""

    starts: Starts = 1


class TopologyShape(msgspec.Struct, frozen=True, kw_only=True):
    """What readers rely on in a manifest's `topology`, where it is there."""

    world_size: Whole = 0
    nodes: list[Whole] = []
    domains: list[Whole] = []
    rails: list[Whole] = []
    sites: list[Whole] = []
    node_names: list[str] = []
    sources: dict[str, str] = {}


class ProvenanceShape(msgspec.Struct, frozen=True, kw_only=True):
    """Versions and settings of rank 0."""

    versions: dict[str, Any] | None = None
    variables: dict[str, Any] | None = None


class LoggedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A line of nccl-tests' list of devices."""

    rank: Whole
    group: Whole | None = None
    pid: Whole | None = None
    host: str | None = None
    device: Whole | None = None
    gpu: str | None = None
    name: str | None = None


class LoggedTable(msgspec.Struct, frozen=True, kw_only=True):
    """What stood around a table in another tool's log; most of it only nccl-tests has."""

    program: str | None = None
    config: dict[str, Whole | str] = {}
    devices: list[LoggedDevice] = []
    versions: dict[str, str] = {}
    out_of_bounds: Whole | None = None
    avg_bus_gb_per_s: float | None = None
    concluded: bool = False


class SourceShape(msgspec.Struct, frozen=True, kw_only=True):
    """A log that a run was imported from."""

    file: str
    tool: str
    version: str | None = None
    tables: list[LoggedTable] = []


class ManifestShape(msgspec.Struct, frozen=True, kw_only=True):
    """What readers rely on in a manifest. Null is what an imported log does not say."""

    plan: PlanShape = PlanShape()
    topology: TopologyShape | None = None
    transport: str | None = None
    device: str | None = None
    world_size: Ranks | None = None
    ranks: list[dict[str, Any]] = []
    software: list[SoftwareShape] | None = None
    provenance: ProvenanceShape = ProvenanceShape()
    started: str | None = None
    imported: list[SourceShape] = []

    def lacks(self, origin: OriginShape | None) -> str | None:
        """What a record's origin names and this manifest does not have, in words; None if all is there."""
        if origin is None:
            return "`$.imported` is null, and the run was imported" if self.imported else None
        if origin.source >= len(self.imported):
            return f"the manifest's `imported` has {len(self.imported)} entries - at `$.imported.source`"
        tables = len(self.imported[origin.source].tables)
        if origin.table is not None and origin.table >= tables:
            return f"that source has {tables} tables in the manifest - at `$.imported.table`"
        return None
