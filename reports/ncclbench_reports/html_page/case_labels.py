"""Short names of cases for plots: what distinguishes them, and nothing that is the same in all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ncclbench.store.records import Record
from ncclbench.units import format_size
from ncclbench_reports.common.record_rows import RecordRow, params_of
from ncclbench_reports.common.text_format import visible

_LONGEST_TITLE = 60
_MOST_CHARACTERS = 160
# Parameters come first, since they were varied on purpose; these follow only where cases are still equal.
_FURTHER = ("timing", "size", "dtype", "redop", "world_size", "run")


@dataclass(frozen=True)
class Facets:
    """What a case's name can be made of, as text."""

    params: Mapping[str, str]
    further: Mapping[str, str]


def facets_of_record(record: Record) -> Facets:
    """The facets of a record."""
    size = format_size(record.bytes if record.size_bytes is None else record.size_bytes)
    further = {"timing": record.timing, "size": size, "dtype": str(record.dtype or "")}
    return Facets({name: str(value) for name, value in record.params.items()}, further)


def facets_of_row(row: RecordRow, runs: Mapping[str, str]) -> Facets:
    """The facets of a flat row; `runs` has the names of the runs if there are several."""
    further = {name: str(row.value(name) or "") for name in ("timing", "dtype", "redop", "world_size")}
    return Facets(params_of(row), {**further, "size": format_size(row.moved_bytes), "run": runs.get(row.run, "")})


def short_labels(cases: Sequence[Facets]) -> list[str]:
    """One name per case, as different as the cases are.

    A parameter that only some cases have is ``default`` in the others: a case stores what differs from the default.
    """
    keys = dict.fromkeys(key for case in cases for key in case.params)
    varied = [key for key in keys if len({case.params.get(key) for case in cases}) > 1]
    labels = [[f"{key}={case.params.get(key, 'default')}" for key in varied] for case in cases]
    wanted = len({(tuple(sorted(c.params.items())), tuple(sorted(c.further.items()))) for c in cases})
    for key in _FURTHER:
        if len({tuple(label) for label in labels}) == wanted:
            break
        values = [case.further.get(key, "") for case in cases]
        if len(set(values)) > 1:
            labels = [[*label, value] if value else label for label, value in zip(labels, values, strict=True)]
    return [" ".join(label) for label in labels]


def titles(records: Sequence[Record]) -> dict[str, str]:
    """A title per case: its name, or, where that is long, its pattern and what distinguishes it."""
    found: dict[str, str] = {}
    for pattern in dict.fromkeys(record.pattern for record in records):
        unique = {record.case: record for record in records if record.pattern == pattern}
        labels = short_labels([facets_of_record(record) for record in unique.values()])
        for case, label in zip(unique, labels, strict=True):
            short = len(case) <= _LONGEST_TITLE or not label
            found[case] = visible(case if short else f"{pattern} {label}", _MOST_CHARACTERS)
    return found
