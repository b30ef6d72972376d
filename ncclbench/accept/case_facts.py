"""The facts of each case of a run that rules of a profile can test."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

import numpy as np

from ncclbench.store.records import PathRecord, Record
from ncclbench.store.run_directory import Run
from ncclbench.topology import Topology
from ncclbench.topology.rank_names import distinct

MEASURED = ("ok", "wrong")


@dataclass(frozen=True, kw_only=True)
class CaseFacts:
    """The facts of a case that rules can test; `ncclbench.accept.profile.FACTS` lists the same names."""

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
        id: id of the case.
        records: the last record of each start, in the order of the starts.
        facts: the facts that rules can test.
    """

    id: str
    records: tuple[Record, ...]
    facts: CaseFacts

    @cached_property
    def timed(self) -> tuple[Record, ...]:
        """The records that were measured and have a time."""
        return tuple(r for r in self.records if r.status in MEASURED and r.time_us is not None)


def views_of(run: Run) -> list[CaseView]:
    """All cases of the run, in the order in which they first ended."""
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
    """The state of NVLink SHARP, from NCCL's logs of all ranks and starts.

    ``on``, ``off`` (a setting switched it off), ``unavailable`` (NCCL found none) or ``unknown``. It is ``unknown``
    too where the logs differ.
    """
    paths = [record.path or PathRecord() for record in records if record.time_us is not None]
    said = {(str(path.nvls), str(path.nvls_switched_off)) for path in paths}
    state = {("True", "False"): "on", ("False", "True"): "off", ("False", "False"): "unavailable"}
    return state.get(said.pop(), "unknown") if len(said) == 1 else "unknown"


def _largest(spans: Iterable[int | None]) -> int | None:
    known = list(spans)
    return max((span for span in known if span is not None), default=None) if None not in known else None


def scopes(run: Run) -> list[dict[str, int | None]]:
    """The sizes of the groups that this run could measure: the world, a node, a domain and a rail."""
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
    """Whether any of the wildcards matches; upper and lower case are the same."""
    return any(fnmatchcase(value.lower(), wildcard.lower()) for wildcard in wildcards)


def shown_ranks(ranks: Sequence[int], most: int = 8) -> str:
    """The ranks as text for a message; after `most` of them, only how many more there are."""
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks[:most])) + more
