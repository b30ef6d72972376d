"""The types that readers rely on inside a run directory, checked once where its files are read.

What a record or a manifest holds as plain data (a ledger, a pattern's facts, a topology) is checked here and stays
plain data: a line of another shape is damaged and is refused as a whole, instead of being half shown. Whatever else
stands beside these keys is nobody's business, and a key that is not there is not missed.
"""

from typing import Annotated, Any

import msgspec

from ncclbench.store.records import Ranks, Whole

Bytes = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
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


class RecordShape(msgspec.Struct, frozen=True, kw_only=True):
    """What is nested in a record."""

    ledger: LedgerShape | None = None
    phases: list[PhaseShape] = []
    facts: list[FactShape] = []
    path: PathShape | None = None


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
