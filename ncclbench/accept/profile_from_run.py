"""Make a profile from a golden run: its medians with a tolerance that is wider than the run's own spread.

A smaller tolerance would fail the machine that the profile was made from.
"""

import datetime
import statistics
from collections.abc import Iterable, Mapping

from ncclbench.accept.case_facts import CaseView, views_of
from ncclbench.accept.profile import SCHEMA, Limits, parse_profile
from ncclbench.errors import UsageError
from ncclbench.store.records import Json, LedgerRecord, PathRecord, Record, Summary
from ncclbench.store.run_directory import Run
from ncclbench.units import counted

# The smallest tolerance, and the ratio of the tolerance to the run's own spread.
LEAST_TOLERANCE = 0.03
WIDENING = 1.5
_MOST_TOLERANCE = 0.95
_LOADED = ("nccl", "torch", "cupy", "mpi")


def make_profile(run: Run, name: str) -> str:
    """The text of a profile that `run` passes.

    Raises:
        UsageError: if the run measured no case, or a case is not ok.
    """
    views = [view for view in views_of(run) if view.timed]
    if not views:
        raise UsageError(f"{run.path} has measured nothing: no profile can be made of it")
    wrong = [view.id for view in views for record in view.records if record.status != "ok" or _timeless(record)]
    if wrong:
        raise UsageError(f"{run.path} is no golden run: {wrong[0]} is not ok, or has a time of zero")
    limits = _limits(views)
    enough = min(len(view.timed) for view in views) >= limits["min_starts"]
    lines = [
        f"# Made from {run.path.name}; see the source of each figure",
        *_pairs({"schema": SCHEMA, "name": name, "title": f"as {run.path.name}", "plan": run.manifest.plan.name or ""}),
        *_table("fabric", _fabric(run)),
        *_table("limits", limits),
        *_path(views),
        *_table("wanted.versions", _versions(run)),
    ]
    for view in views:
        lines += _floor(view, run, enough)
    text = "\n".join(lines) + "\n"
    parse_profile(text, f"the profile made of {run.path}")  # the written profile must be valid
    return text


def _timeless(record: Record) -> bool:
    """Whether a time is zero, so that a tolerance cannot be a share of it."""
    times = [record.time_us, *(group.time_us for group in record.groups)]
    ends = [end for time in times if time is not None for end in (time.p50, time.p50_hi, time.max)]
    return any(end is not None and end <= 0 for end in ends)


def _fabric(run: Run) -> dict[str, Json]:
    device = "cpu" if run.manifest.device == "cpu" else "cuda"
    names = run.manifest.gpu_names
    if device == "cuda" and not names:
        raise UsageError(f"{run.path} does not say which GPUs it had: a profile would fit any")
    return {"device": device, "transports": [str(run.manifest.transport)], **({"gpu": names} if names else {})}


def _versions(run: Run) -> dict[str, Json]:
    views = run.manifest.software_views
    versions = (views[0].versions or {}) if views else {}
    return {name: str(versions[name]) for name in _LOADED if versions.get(name)}


def _limits(views: list[CaseView]) -> dict[str, float]:
    """The default limits, widened where the golden run itself exceeds them."""
    usual = Limits()
    summaries = [record.time_us for view in views for record in view.timed if record.time_us is not None]
    widths = [_width(summary) for summary in summaries]
    tails = [summary.p95 / summary.p50 for summary in summaries if summary.p95 is not None]
    spreads = [_spread(view) for view in views]
    shares = [r.skew_us.p50 / r.time_us.p50 for view in views for r in view.timed if r.skew_us and r.time_us]
    return {
        "min_starts": usual.min_starts,
        "median_width": _wider(usual.median_width, widths),
        "p95_over_p50": _wider(usual.p95_over_p50, tails),
        "start_spread": _wider(usual.start_spread, spreads),
        "skew_share": _wider(usual.skew_share, shares),
    }


def _wider(usual: float, seen: Iterable[float]) -> float:
    return round(max([usual, *(WIDENING * value for value in seen)]), 4)


def _width(summary: Summary) -> float:
    if summary.p50_lo is None or summary.p50_hi is None:
        return 0.0
    return (summary.p50_hi - summary.p50_lo) / 2 / summary.p50


def _spread(view: CaseView) -> float:
    medians = [record.time_us.p50 for record in view.timed if record.time_us is not None]
    return (max(medians) - min(medians)) / statistics.median(medians)


def _path(views: list[CaseView]) -> list[str]:
    links = {link for view in views for record in view.timed for link in (record.path or PathRecord()).links}
    if not links:
        return []
    return _table("path", {"allowed": sorted(links), "across_nodes": [x for x in sorted(links) if x.startswith("NET")]})


def _floor(view: CaseView, run: Run, enough: bool) -> list[str]:
    facts = {name: view.facts.value(name) for name in ("pattern", "case", "ranks", "nodes", "domains")}
    where = {name: value for name, value in facts.items() if value is not None}
    where["case"] = _literal(view.facts.case)
    figures = [_rate(record) for record in view.timed]
    rates = [rate for rate, _ in figures if rate is not None]
    times = [r.time_us.p50 for r in view.timed if r.time_us is not None]
    worst = max(_spread_of(record, times) for record in view.timed)
    tolerance = min(_MOST_TOLERANCE, max(LEAST_TOLERANCE, WIDENING * worst))
    if len(rates) == len(figures):
        metric = {"metric": figures[0][1], "at_least": statistics.median(rates)}
    else:
        metric = {"metric": "time_us.p50", "at_most": statistics.median(times)}
    starts = f"median of {counted(len(view.timed), 'process start')}"
    return [
        "",
        "[[floor]]",
        f"where = {{ {', '.join(_pairs(where))} }}",
        *_pairs(
            {
                **metric,
                "tolerance": round(tolerance, 4),
                "basis": "measured" if enough else "assumed",
                "source": f"{run.path.name}, {starts}" + ("" if enough else ", too few to rely on"),
                "date": str(run.manifest.started or datetime.datetime.now(datetime.UTC).date().isoformat())[:10],
            }
        ),
    ]


def _literal(text: str) -> str:
    """A case's id as a test, with its wildcards escaped."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)


def _rate(record: Record) -> tuple[float | None, str]:
    groups = [g.bus_gb_per_s for g in record.groups if g.bus_gb_per_s is not None]
    if groups or record.bus_gb_per_s is not None:
        return (min(groups) if groups else record.bus_gb_per_s), "bus_gb_per_s"
    return (record.ledger or LedgerRecord()).bottleneck_gb_per_s, "bottleneck_gb_per_s"


def _spread_of(record: Record, times: list[float]) -> float:
    """The distance of the slow end of this start's interval from the median of the starts, as a share of the rate."""
    assert record.time_us is not None
    slowest = record.time_us.p50_hi if record.time_us.p50_hi is not None else record.time_us.max
    slowest = max([slowest, *(group.time_us.p50_hi or group.time_us.max for group in record.groups)])
    return max(0.0, 1.0 - statistics.median(times) / slowest)


def _table(name: str, values: Mapping[str, Json]) -> list[str]:
    return ["", f"[{name}]", *_pairs(values)] if values else []


def _pairs(values: Mapping[str, Json]) -> list[str]:
    return [f"{name} = {_toml(value)}" for name, value in values.items()]


def _toml(value: Json) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        escaped = "".join(
            f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c for c in value.replace("\\", "\\\\")
        )
        return '"' + escaped.replace('"', '\\"') + '"'
    return repr(value)
