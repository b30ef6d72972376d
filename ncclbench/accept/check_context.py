"""The input of a check: the run, the rules, a baseline, and the figures of a case with their intervals."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import msgspec
import numpy as np

from ncclbench.accept.case_facts import CaseView, matches_any, views_of
from ncclbench.accept.conditions import read_test
from ncclbench.accept.impossible_samples import Floats, read_total
from ncclbench.accept.profile import RATES, FloorRule, Rules
from ncclbench.analysis.intervals import quantile_interval
from ncclbench.store.records import Json, LedgerRecord, PathRecord, Record, Summary
from ncclbench.store.run_directory import Run
from ncclbench.store.samples import samples_file
from ncclbench.topology.rank_names import group_name


@dataclass(frozen=True)
class Estimate:
    """A figure of one record with its 95% interval; `low` and `high` are None where it has no interval.

    Attributes:
        value: the figure, in the unit of its metric.
        low: lower end of the interval.
        high: upper end of the interval.
        part: the slowest group, whose figure this is, where several groups ran side by side.
    """

    value: float
    low: float | None
    high: float | None
    part: str | None = None


@dataclass(frozen=True)
class CheckContext:
    """A run, and what it is judged by. Every check receives this object.

    Attributes:
        run: the run to judge.
        rules: the rules of the profile.
        baseline: the run to compare with, or None.
        forced: compare with the baseline although it is not comparable.
    """

    run: Run
    rules: Rules
    baseline: Run | None = None
    forced: bool = False

    @cached_property
    def cases(self) -> list[CaseView]:
        """All cases of the run, each over all starts."""
        return views_of(self.run)

    @cached_property
    def fabric_mismatch(self) -> list[str]:
        """Why the profile is not for this run; empty if it is. On a mismatch, no figure of the profile is used."""
        fabric, manifest = self.rules.profile.fabric, self.run.manifest
        device = "cpu" if manifest.device == "cpu" else "cuda"
        if device != fabric.device:
            return [f"the profile is for {fabric.device}, the run was on {device}"]
        found = []
        if manifest.transport not in fabric.transports:
            found.append(f"the profile is for {' or '.join(fabric.transports)}, the run used {manifest.transport}")
        others = [name for name in manifest.gpu_names if not matches_any(name, fabric.gpu)]
        if fabric.gpu and others:
            found.append(f"the profile is for {' or '.join(fabric.gpu)}, the run has {', '.join(others)}")
        spoken = {layer for record in self.run.records for layer in (record.path or PathRecord()).link_layer}
        strange = sorted(layer for layer in spoken if not matches_any(layer, fabric.link_layer))
        if fabric.link_layer and strange:
            found.append(f"the profile is for {' or '.join(fabric.link_layer)}, NICs speak {', '.join(strange)}")
        return found + self._other_domains()

    def _other_domains(self) -> list[str]:
        """Domains of another size than the profile's; the hint names a domain that was only assumed to be a host."""
        wanted, topology = self.rules.profile.fabric.domain_ranks, self.run.topology
        if wanted is None or topology is None:
            return []
        test = read_test(wanted, "fabric.domain_ranks")
        sizes = sorted({int(n) for n in np.unique(topology.domains, return_counts=True)[1]})
        if all(test.holds(size) for size in sizes):
            return []
        source = topology.sources.get("domain", "")
        hint = f" ({source}; a topology file tells)" if source.startswith("assumed") else ""
        return [f"the profile is for domains of {test.text} ranks, the run has {sizes}{hint}"]

    @cached_property
    def nvls(self) -> frozenset[str]:
        """The states of NVLink SHARP over the measured cases; see `CaseFacts.nvls`."""
        return frozenset(view.facts.nvls for view in self.cases if view.timed) or frozenset({"unknown"})

    def floors_for(self, view: CaseView) -> list[int]:
        """The indices of the profile's floors that select this case."""
        rules = enumerate(self.rules.floors)
        return [k for k, rule in rules if all(test.holds(view.facts.value(name)) for name, test in rule.tests.items())]

    def exemption(self, view: CaseView) -> str | None:
        """Why the speed of this case is not judged; None if it is judged or the profile has no rule for it."""
        if self.floors_for(view):
            return None
        for exempt, tests in self.rules.exempt:
            if all(test.holds(view.facts.value(name)) for name, test in tests.items()):
                return f"speed not judged: {exempt.reason}"
        return None

    def samples(self, record: Record) -> Floats:
        """The durations of a record's iterations in seconds, shape (R, N).

        Raises:
            UsageError: if they cannot be read.
        """
        return _read_cached(str(samples_file(self.run, record.samples or "")))

    def estimate(self, record: Record, rule: FloorRule) -> Estimate | None:
        """The figure that `rule` judges; None if the record has no such figure."""
        metric = rule.floor.metric
        if metric == "time_us.p99":
            return self._p99(record)
        if metric in RATES:
            return self._rate(record, metric, rule.floor.phase)
        summary = _summary(record, rule.floor.phase)
        if summary is None:
            return None
        if metric == "time_us.p95":
            return None if summary.p95 is None else Estimate(summary.p95, None, None)
        return Estimate(summary.p50, summary.p50_lo, summary.p50_hi)

    def _rate(self, record: Record, metric: str, phase: str | None) -> Estimate | None:
        """A rate; its interval follows from the median time's, since the rate is inversely proportional to it."""
        if metric == "bus_gb_per_s" and phase is None and record.groups:
            slowest = min(record.groups, key=lambda g: g.bus_gb_per_s if g.bus_gb_per_s is not None else np.inf)
            return _scaled(slowest.bus_gb_per_s, slowest.time_us, group_name(self.run.topology, slowest.ranks)[1])
        ledger = record.ledger or LedgerRecord()
        if phase is not None:
            ledger = next((p.ledger for p in record.phases if p.label == phase), LedgerRecord())
        value = ledger.bottleneck_gb_per_s if metric == "bottleneck_gb_per_s" else getattr(record, metric)
        return _scaled(value, _summary(record, phase))

    def _p99(self, record: Record) -> Estimate | None:
        if record.time_us is None or record.time_us.p99 is None or not record.samples:
            return None
        slowest_us = np.sort(self.samples(record).max(axis=0)) * 1e6
        ends = quantile_interval(len(slowest_us), 0.99)
        low, high = (float(slowest_us[ends[0]]), float(slowest_us[ends[1]])) if ends else (None, None)
        return Estimate(record.time_us.p99, low, high)

    def skipped_by_mismatch(self) -> str:
        """The reason that a check gives if it skips the run because the profile is for another fabric."""
        return "not judged: " + "; ".join(self.fabric_mismatch)


@lru_cache(maxsize=2)
def _read_cached(path: str) -> Floats:
    return read_total(Path(path))


def _summary(record: Record, phase: str | None) -> Summary | None:
    if phase is None:
        return record.time_us
    return next((p.time_us for p in record.phases if p.label == phase), None)


def _scaled(value: float | None, time_us: Summary | None, part: str | None = None) -> Estimate | None:
    if value is None or time_us is None or not time_us.p50 > 0:
        return None
    if not time_us.p50_lo or not time_us.p50_hi:
        return Estimate(value, None, None, part)
    return Estimate(value, value * time_us.p50 / time_us.p50_hi, value * time_us.p50 / time_us.p50_lo, part)


def row(record: Record, **more: object) -> dict[str, Json]:
    """A row of evidence: the case, start, samples and figures of a record, and further fields."""
    summary = record.time_us
    base: dict[str, object] = {"case": record.case, "start": record.start, "samples": record.samples}
    if summary is not None:
        base |= {"n": summary.n, "p50_us": summary.p50, "p50_lo_us": summary.p50_lo, "p50_hi_us": summary.p50_hi}
    if record.bus_gb_per_s is not None:
        base["bus_gb_per_s"] = record.bus_gb_per_s
    return {name: msgspec.to_builtins(value) for name, value in {**base, **more}.items()}
