"""What a run is and what each of its cases was, as plain facts that rules can test."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

import numpy as np

from ncclbench.store.records import Json, PathRecord, Record
from ncclbench.store.run_directory import Run
from ncclbench.topology import Topology
from ncclbench.topology.rank_names import distinct

MEASURED = ("ok", "wrong")


@dataclass(frozen=True, kw_only=True)
class CaseFacts:
    """What rules can test of a case; `ncclbench.accept.profile.FACTS` says what each is."""

    pattern: str
    timing: str
    dtype: str | None
    bytes: int
    ranks: int | None
    nodes: int | None
    domains: int | None
    group: str
    groups: int
    transport: str
    redop: str | None
    world_size: int | None
    case: str
    nvls: str

    def value(self, name: str) -> str | int | None:
        """The fact called `name`."""
        value: str | int | None = getattr(self, name)
        return value


@dataclass(frozen=True)
class CaseView:
    """One case over all process starts.

    Attributes:
        id: of the case.
        records: its last record in each start, in the order of the starts.
        facts: what rules can test.
    """

    id: str
    records: tuple[Record, ...]
    facts: CaseFacts

    @cached_property
    def timed(self) -> tuple[Record, ...]:
        """Those that were measured."""
        return tuple(r for r in self.records if r.status in MEASURED and r.time_us is not None)


def views_of(run: Run) -> list[CaseView]:
    """Every case of the run, in the order in which they first ended."""
    by_case: dict[str, list[Record]] = {}
    for record in run.records:
        by_case.setdefault(record.case, []).append(record)
    return [
        CaseView(case, tuple(sorted(records, key=lambda r: r.start)), _facts(records, run.topology))
        for case, records in by_case.items()
    ]


def _facts(records: list[Record], topology: Topology | None) -> CaseFacts:
    record = next((r for r in records if r.time_us is not None), records[0])
    groups: list[Sequence[int]] = [group.ranks for group in record.groups]
    members = record.group_size or record.world_size
    if not groups and members is not None and members == record.world_size:
        groups = [range(members)]
    return CaseFacts(
        pattern=record.pattern,
        timing=record.timing,
        dtype=record.dtype,
        bytes=record.bytes,
        ranks=members,
        nodes=_largest(distinct(topology.nodes, ranks) for ranks in groups) if topology else None,
        domains=_largest(distinct(topology.domains, ranks) for ranks in groups) if topology else None,
        group=str(record.params.get("group", "world")),
        groups=max(1, len(groups)),
        transport=record.transport,
        redop=record.redop,
        world_size=record.world_size,
        case=record.case,
        nvls=_nvls(records),
    )


def _nvls(records: Iterable[Record]) -> str:
    """NVLink SHARP, as NCCL's log of every rank and start says.

    ``on``, ``off`` (a setting switched it off), ``unavailable`` (NCCL found none), or ``unknown``, which it also is
    where they differ.
    """
    paths = [record.path or PathRecord() for record in records if record.time_us is not None]
    said = {(str(path.nvls), str(path.nvls_switched_off)) for path in paths}
    state = {("True", "False"): "on", ("False", "True"): "off", ("False", "False"): "unavailable"}
    return state.get(said.pop(), "unknown") if len(said) == 1 else "unknown"


def _largest(spans: Iterable[int | None]) -> int | None:
    known = list(spans)
    return max((span for span in known if span is not None), default=None) if None not in known else None


def scopes(run: Run) -> list[dict[str, int | None]]:
    """Sizes of the groups that this run could measure: the world, a node, a domain, a rail."""
    world_size, topology = run.manifest.world_size or 0, run.topology
    if topology is None:
        return [{"ranks": world_size, "nodes": None, "domains": None}]
    columns = (topology.nodes, topology.domains, topology.rails)
    members = [np.arange(world_size), *(np.flatnonzero(column == column[0]) for column in columns)]
    return [
        {
            "ranks": len(ranks),
            "nodes": distinct(topology.nodes, ranks),
            "domains": distinct(topology.domains, ranks),
        }
        for ranks in members
    ]


def matches_any(value: str, wildcards: Iterable[str]) -> bool:
    """Whether any of the wildcards matches, without regard to case."""
    return any(fnmatchcase(value.lower(), wildcard.lower()) for wildcard in wildcards)


def shown_ranks(ranks: Sequence[int], most: int = 8) -> str:
    """Ranks for a reader."""
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks[:most])) + more


def unlike(base: Run, run: Run, may_differ: Iterable[str]) -> list[str]:
    """In what two runs differ, so that their figures must not be compared; in words, `run` first."""
    a, b = base.manifest, run.manifest
    values = {
        "transport": (a.transport, b.transport),
        "device": (a.device, b.device),
        "world_size": (a.world_size, b.world_size),
    }
    differences = [f"{name}: {other} against {one}" for name, (one, other) in values.items() if one != other]
    places = base.topology, run.topology
    for name in ("nodes", "domains", "rails"):
        one, other = (None if place is None else getattr(place, name).tolist() for place in places)
        differences += [f"{name} are laid out differently"] if one != other else []
    if a.shares_a_machine != b.shares_a_machine:
        differences.append("in one of them the nodes are parts of one machine")
    if a.gpu_names != b.gpu_names:
        differences.append(f"GPUs: {', '.join(b.gpu_names) or 'none'} against {', '.join(a.gpu_names) or 'none'}")
    names = tuple(may_differ)
    one_V, other_V = ([view.versions or {} for view in side.software_views] for side in (a, b))
    one_S, other_S = ([view.variables or {} for view in side.software_views] for side in (a, b))
    return [*differences, *_unlike_software(one_V, other_V, names), *_unlike_software(one_S, other_S, names)]


Settings = list[dict[str, Json]]


def _unlike_software(base: Settings, run: Settings, may_differ: tuple[str, ...]) -> list[str]:
    one, other = _values(base), _values(run)
    return [
        f"{name}: {other.get(name, 'not set')} against {one.get(name, 'not set')}"
        for name in sorted({*one, *other})
        if one.get(name) != other.get(name) and not matches_any(name, may_differ)
    ]


def _values(views: Settings) -> dict[str, str]:
    """For each name the value, or all of them where ranks differ."""
    found: dict[str, set[str]] = {}
    for view in views:
        for name, value in view.items():
            found.setdefault(name, set()).add(str(value))
    return {name: " and ".join(sorted(values)) for name, values in found.items()}
