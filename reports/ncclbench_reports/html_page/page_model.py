"""What a page consists of: cards of runs, and sections of figures and tables; text and plain data only."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ncclbench_reports.html_page.figures import Figure
from ncclbench_reports.html_page.tables import DataTable


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with the figures and tables below it."""

    id: str
    title: str
    intro: str = ""
    figures: Sequence[Figure] = field(default_factory=list)
    tables: Sequence[DataTable] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RunCard:
    """A run at the head of the page: its verdict, the reasons, and what it was measured on."""

    name: str
    path: str
    verdict: str
    headline: str
    reasons: Sequence[str]
    profile: str
    starts: str
    actions: Sequence[str]
    facts: Sequence[tuple[str, str]]
    warnings: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Page:
    """All of a report."""

    title: str
    stamps: Sequence[str]
    cards: Sequence[RunCard]
    sections: Sequence[Section]
    times: str = "Times are medians"

    @property
    def figures(self) -> list[Figure]:
        """Those of all sections."""
        return [figure for section in self.sections for figure in section.figures]

    @property
    def tables(self) -> list[DataTable]:
        """Those of all sections."""
        return [table for section in self.sections for table in section.tables]
