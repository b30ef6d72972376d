"""What a run is and what each of its cases was, as plain facts that rules can test."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncclbench.store.records import Record
from ncclbench.store.run_directory import Run
from ncclbench.store.stamps import share_a_machine

Ints = NDArray[np.int64]
MEASURED = ("ok", "wrong")


@dataclass(frozen=True)
class Place:
    """Where ranks sit, from the manifest; shape (R,) each, and None where it does not say."""

    nodes: Ints | None
    domains: Ints | None
    rails: Ints | None
    node_names: tuple[str, ...]
    world_size: int

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> "Place":
        """What the manifest says; what it says of another number of ranks is not believed."""
        topology = manifest.get("topology")
        topology = topology if isinstance(topology, dict) else {}
        world_size = manifest.get("world_size")
        world_size = world_size if isinstance(world_size, int) else 0

        def column(name: str) -> Ints | None:
            values = topology.get(name)
            whole = isinstance(values, list) and len(values) == world_size and all(type(v) is int for v in values)
            return np.array(values, np.int64) if whole else None

        named = topology.get("node_names")
        names = tuple(str(name) for name in named) if isinstance(named, list) else ()
        return cls(column("nodes"), column("domains"), column("rails"), names, world_size)

    def span(self, ranks: Sequence[int] | Ints, column: Ints | None) -> int | None:
        """How many different nodes (or domains, or rails) `ranks` sit in."""
        if column is None or not 0 < len(ranks) <= self.world_size or max(ranks) >= self.world_size:
            return None
        return len(np.unique(column[np.asarray(ranks, np.int64)]))

    def scopes(self) -> list[dict[str, int | None]]:
        """Sizes of the groups that this run could measure: the world, a node, a domain, a rail."""
        found = []
        members: list[Sequence[int] | Ints] = [range(self.world_size)]
        for column in (self.nodes, self.domains, self.rails):
            if column is not None and self.world_size:
                members.append(np.flatnonzero(column == column[0]))
        for ranks in members:
            found.append(
                {"ranks": len(ranks), "nodes": self.span(ranks, self.nodes), "domains": self.span(ranks, self.domains)}
            )
        return found

    def name_rank(self, rank: int) -> str:
        """A rank with where it sits, such as ``rank 5 (n2, rail 1)``, as far as that is known."""
        node = int(self.nodes[rank]) if self.nodes is not None and rank < self.world_size else len(self.node_names)
        where = [self.node_names[node]] if node < len(self.node_names) else []
        where += [f"rail {self.rails[rank]}"] if self.rails is not None and rank < self.world_size else []
        return f"rank {rank}" + (f" ({', '.join(where)})" if where else "")

    def name_group(self, ranks: Sequence[int]) -> tuple[str, str]:
        """What a group is, and which: ``("rail", "rail 3")``, ``("node", "node n07")``, ``("group", "ranks 0,8")``."""
        for kind, column in (("node", self.nodes), ("domain", self.domains), ("rail", self.rails)):
            if column is not None and self.span(ranks, column) == 1 and len(ranks) > 1:
                place = int(column[ranks[0]])
                name = self.node_names[place] if kind == "node" and place < len(self.node_names) else str(place)
                return kind, f"{kind} {name}"
        shown = ",".join(map(str, ranks[:4])) + (",..." if len(ranks) > 4 else "")
        return "group", f"ranks {shown}"


@dataclass(frozen=True)
class CaseView:
    """One case over all process starts.

    Attributes:
        id: of the case.
        records: its last record in each start, in the order of the starts.
        facts: see `ncclbench.accept.profile.FACTS`.
    """

    id: str
    records: tuple[Record, ...]
    facts: Mapping[str, Any]

    @cached_property
    def timed(self) -> tuple[Record, ...]:
        """Those that were measured."""
        return tuple(r for r in self.records if r.status in MEASURED and r.time_us is not None)


def views_of(run: Run) -> list[CaseView]:
    """Every case of the run, in the order in which they first ended."""
    place = Place.of(run.manifest)
    by_case: dict[str, list[Record]] = {}
    for record in run.records:
        by_case.setdefault(record.case, []).append(record)
    return [
        CaseView(case, tuple(sorted(records, key=lambda r: r.start)), _facts(records, place))
        for case, records in by_case.items()
    ]


def _facts(records: list[Record], place: Place) -> dict[str, Any]:
    record = next((r for r in records if r.time_us is not None), records[0])
    groups: list[Sequence[int]] = [group.ranks for group in record.groups]
    members = record.group_size or record.world_size
    if not groups and members is not None and members == record.world_size:
        groups = [range(members)]
    spans = {
        name: [place.span(ranks, column) for ranks in groups]
        for name, column in (("nodes", place.nodes), ("domains", place.domains))
    }
    return {
        "pattern": record.pattern,
        "timing": record.timing,
        "dtype": record.dtype,
        "bytes": record.bytes,
        "ranks": members,
        "nodes": _largest(spans["nodes"]),
        "domains": _largest(spans["domains"]),
        "group": str(record.params.get("group", "world")),
        "groups": max(1, len(groups)),
        "transport": record.transport,
        "redop": record.redop,
        "world_size": record.world_size,
        "case": record.case,
        "nvls": _nvls(records),
    }


def _nvls(records: Iterable[Record]) -> str:
    """NVLink SHARP, as NCCL's log of every rank and start says.

    ``on``, ``off`` (somebody switched it off), ``unavailable`` (NCCL found none), or ``unknown``, which it also is
    where they differ.
    """
    said = {
        (str(path.get("nvls")), str(path.get("nvls_switched_off")))
        for path in (record.path or {} for record in records if record.time_us is not None)
    }
    state = {("True", "False"): "on", ("False", "True"): "off", ("False", "False"): "unavailable"}
    return state.get(said.pop(), "unknown") if len(said) == 1 else "unknown"


def _largest(spans: Iterable[int | None]) -> int | None:
    known = list(spans)
    return max((span for span in known if span is not None), default=None) if None not in known else None


def gpu_names(manifest: Mapping[str, Any]) -> list[str]:
    """The GPUs of the run, each model once."""
    ranks = manifest.get("ranks")
    found = [
        rank["device"].get("name")
        for rank in (ranks if isinstance(ranks, list) else [])
        if isinstance(rank, dict) and isinstance(rank.get("device"), dict)
    ]
    return sorted({str(name) for name in found if name})


def matches_any(value: str, wildcards: Iterable[str]) -> bool:
    """Whether any of the wildcards matches, without regard to case."""
    return any(fnmatchcase(value.lower(), wildcard.lower()) for wildcard in wildcards)


def software_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The distinct sets of versions and settings, each with its ranks; of rank 0 alone where no more was recorded."""
    software = manifest.get("software")
    if isinstance(software, list) and all(isinstance(view, dict) for view in software) and software:
        return [dict(view) for view in software]
    provenance = manifest.get("provenance")
    if not isinstance(provenance, dict):
        return []
    return [{"ranks": [0], **{key: provenance.get(key) or {} for key in ("versions", "variables")}}]


def shown_ranks(ranks: Sequence[int], most: int = 8) -> str:
    """Ranks for a reader."""
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks[:most])) + more


def unlike(a: Mapping[str, Any], b: Mapping[str, Any], may_differ: Iterable[str]) -> list[str]:
    """In what two runs differ, so that their figures must not be compared; in words, `a` first."""
    differences = []
    for key in ("transport", "device", "world_size"):
        if a.get(key) != b.get(key):
            differences.append(f"{key}: {b.get(key)} against {a.get(key)}")
    places = Place.of(a), Place.of(b)
    for name in ("nodes", "domains", "rails"):
        one, other = (getattr(place, name) for place in places)
        if (one is None) is not (other is None) or (one is not None and not np.array_equal(one, other)):
            differences.append(f"{name} are laid out differently")
    if share_a_machine(a) != share_a_machine(b):
        differences.append("in one of them the nodes are parts of one machine")
    if gpu_names(a) != gpu_names(b):
        differences.append(f"GPUs: {', '.join(gpu_names(b)) or 'none'} against {', '.join(gpu_names(a)) or 'none'}")
    for kind in ("versions", "variables"):
        differences += _unlike_software(a, b, kind, tuple(may_differ))
    return differences


def _unlike_software(a: Mapping[str, Any], b: Mapping[str, Any], kind: str, may_differ: tuple[str, ...]) -> list[str]:
    one, other = (_values(software_of(manifest), kind) for manifest in (a, b))
    return [
        f"{name}: {other.get(name, 'not set')} against {one.get(name, 'not set')}"
        for name in sorted({*one, *other})
        if one.get(name) != other.get(name) and not matches_any(name, may_differ)
    ]


def _values(views: list[dict[str, Any]], kind: str) -> dict[str, str]:
    """For each name the value, or all of them where ranks differ."""
    found: dict[str, set[str]] = {}
    for view in views:
        for name, value in (view.get(kind) or {}).items():
            found.setdefault(name, set()).add(str(value))
    return {name: " and ".join(sorted(values)) for name, values in found.items()}
