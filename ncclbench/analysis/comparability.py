"""What must be equal on both sides of a comparison, and which differences are only shown."""

from msgspec import UNSET

from ncclbench.analysis.run_sets import Side
from ncclbench.store.records import Json
from ncclbench.store.run_directory import Run, first_difference
from ncclbench.topology import TopologyRecord, WiringRecord

# These settings change the width of the interval, but not the measured quantity.
_FREE_SETTINGS = ("timeout", "max_seconds", "precision", "iterations")
# Versions and variables may be the subject of the comparison: their differences are shown and allowed.
_SHOWN = ("ncclbench", "git_commit", "versions", "variables")


def differences(base: Side, new: Side) -> list[str]:
    """The differences in fabric, record version and settings that forbid a comparison, between any two runs."""
    found = []
    reference = base.runs[0]
    for run in (*base.runs[1:], *new.runs):
        for what, view in (("fabric", _fabric), ("record version", _schema), ("settings", _settings)):
            first, other = view(reference), view(run)
            if what == "settings":  # a case that one run lacks is reported as not comparable elsewhere
                common = first.keys() & other.keys()
                first, other = ({case: side[case] for case in sorted(common)} for side in (first, other))
            difference = first_difference(first, other, what)
            if difference:
                found.append(f"{run.path}: {difference}")
    return found


def remarks(base: Side, new: Side) -> list[str]:
    """Allowed differences that a reader should know: versions, variables and host names."""
    manifests = [side.runs[0].manifest for side in (base, new)]
    found = []
    for name in _SHOWN:
        first, other = (_stated(getattr(manifest.provenance, name)) for manifest in manifests)
        difference = first_difference(first, other, name.replace("_", " "))
        found += [difference] if difference else []
    hosts = [manifest.topology.node_names if manifest.topology else [] for manifest in manifests]
    if hosts[0] != hosts[1]:
        found.append("the host names differ: these may be other machines of the same kind")
    return found


def _stated(value: Json) -> Json:
    return None if value is UNSET else value


def _fabric(run: Run) -> dict[str, Json]:
    """The fabric of a run: ranks and their topology, link rates, and processors."""
    manifest = run.manifest
    topology = manifest.topology or TopologyRecord()
    wiring = topology.wiring or WiringRecord()
    states = [gpu.before for record in run.records for gpu in record.gpus if gpu.before is not None]
    return {
        "transport": manifest.transport,
        "device": manifest.device,
        "simulated": run.is_simulated,
        "ranks": manifest.world_size,
        "ranks per GPU": manifest.provenance.ranks_per_gpu,
        "nodes of one machine": manifest.shares_a_machine,
        "nodes": topology.nodes or None,
        "domains": topology.domains or None,
        "rails": topology.rails or None,
        "sites": topology.sites or None,
        "nic_gbit_per_s": wiring.nic_gbit_per_s or None,
        "leaves": wiring.leaves or None,
        "uplink_gbit_per_s": wiring.uplink_gbit_per_s or None,
        "domain_gbit_per_s": wiring.domain_gbit_per_s or None,
        "cpu": manifest.provenance.cpu or None,
        "gpus": sorted({*manifest.gpu_names, *(state.name for state in states if state.name)}),
    }


def _schema(run: Run) -> dict[str, Json]:
    return {"manifest": run.manifest.schema, "records": sorted({record.schema for record in run.records})}


def _settings(run: Run) -> dict[str, Json]:
    return {
        str(case.id): {name: value for name, value in (case.settings or {}).items() if name not in _FREE_SETTINGS}
        for case in run.manifest.plan.cases
    }
