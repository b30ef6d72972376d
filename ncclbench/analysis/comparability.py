"""What must be the same on both sides, lest a comparison tell of the difference and not of the change."""

from collections.abc import Mapping
from typing import Any

from ncclbench.analysis.run_sets import Side
from ncclbench.store.run_directory import Run, first_difference
from ncclbench.store.stamps import is_simulated, ranks_per_gpu, share_a_machine

# How long and how precisely a case was measured changes the interval, and not what is measured.
_FREE_SETTINGS = ("timeout", "max_seconds", "precision", "iterations")
_PLACES = ("nodes", "domains", "rails", "sites")
_WIRING = ("nic_gbit_per_s", "leaves", "uplink_gbit_per_s", "domain_gbit_per_s")
# Versions and variables may well be what is being compared: they are shown, and do not forbid.
_SHOWN = ("ncclbench", "git_commit", "versions", "variables")


def differences(base: Side, new: Side) -> list[str]:
    """What forbids to compare the two sides, or the runs of one side with each other: fabric, version, settings."""
    found = []
    reference = base.runs[0]
    for run in (*base.runs[1:], *new.runs):
        for what, view in (("fabric", _fabric), ("record version", _schema), ("settings", _settings)):
            first, other = view(reference), view(run)
            if what == "settings":  # a case that only one of them has is not comparable, and says so by itself
                common = first.keys() & other.keys()
                first, other = ({case: side[case] for case in sorted(common)} for side in (first, other))
            difference = first_difference(first, other, what)
            if difference:
                found.append(f"{run.path}: {difference}")
    return found


def remarks(base: Side, new: Side) -> list[str]:
    """What else differs, and a reader should know: versions and variables."""
    first, other = (
        {name: (side.runs[0].manifest.get("provenance") or {}).get(name) for name in _SHOWN} for side in (base, new)
    )
    found = []
    for name in _SHOWN:
        difference = first_difference(first[name], other[name], name.replace("_", " "))
        found += [difference] if difference else []
    hosts = [(side.runs[0].manifest.get("topology") or {}).get("node_names") for side in (base, new)]
    if hosts[0] != hosts[1]:
        found.append("the host names differ: these may be other machines of the same kind")
    return found


def _fabric(run: Run) -> dict[str, Any]:
    """What the data moved on: ranks and where they sit, how fast the wires are, which processors."""
    manifest = run.manifest
    topology = _mapping(manifest.get("topology"))
    wiring = _mapping(topology.get("wiring"))
    gpus = sorted({str(_mapping(gpu.get("before")).get("name")) for record in run.records for gpu in record.gpus})
    return {
        "transport": manifest.get("transport"),
        "device": manifest.get("device"),
        "simulated": is_simulated(manifest),
        "ranks": manifest.get("world_size"),
        "ranks a GPU": ranks_per_gpu(manifest),
        "nodes of one machine": share_a_machine(manifest),
        **{name: topology.get(name) for name in _PLACES},
        **{name: wiring.get(name) for name in _WIRING},
        "cpu": _mapping(manifest.get("provenance")).get("cpu"),
        "gpus": gpus,
    }


def _schema(run: Run) -> dict[str, Any]:
    return {"manifest": run.manifest.get("schema"), "records": sorted({record.schema for record in run.records})}


def _settings(run: Run) -> dict[str, Any]:
    cases = _mapping(run.manifest.get("plan")).get("cases")
    found: dict[str, Any] = {}
    for case in cases if isinstance(cases, list) else []:
        settings = _mapping(_mapping(case).get("settings"))
        found[str(_mapping(case).get("id"))] = {k: v for k, v in settings.items() if k not in _FREE_SETTINGS}
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
