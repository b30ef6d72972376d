"""Properties of a run: its topology, whether it is simulated, and its stamps."""

from pathlib import Path
from typing import Any

import pytest

from ncclbench.store.run_directory import Run, Stamp
from ncclbench.topology import Topology
from tests.helpers.cluster_runs import collective
from tests.helpers.stored import known, like, manifest

MEASURED: dict[str, Any] = {"transport": "nccl", "device": "cuda", "world_size": 2}


def run_of(fields: dict[str, Any], transports: list[str] | None = None) -> Run:
    records = [like(collective(64)[0], transport=name) for name in transports or ["nccl"]]
    return Run(Path("run"), manifest(**{**MEASURED, **fields}), tuple(records), ())


@pytest.mark.parametrize(
    ("fields", "transports", "simulated"),
    [
        ({}, ["nccl"], False),
        ({"transport": "model"}, ["nccl"], True),
        ({"simulated": True}, ["nccl"], True),
        ({"transport": None}, ["nccl", "model"], True),
        ({"transport": None}, ["nccl", "mpi"], False),
    ],
)
def test_run_is_simulated_by_manifest_transport_or_record(
    fields: dict[str, Any], transports: list[str], simulated: bool
) -> None:
    run = run_of(fields, transports)
    assert run.is_simulated is simulated
    assert (Stamp.SIMULATED in run.stamps) is simulated


@pytest.mark.parametrize(
    ("fields", "stamps"),
    [
        ({}, []),
        ({"device": "cpu"}, [Stamp.CPU_ONLY]),
        ({"device": "cpu", "transport": "model"}, [Stamp.SIMULATED]),
        ({"provenance": {"transport": {"ranks_per_gpu": 2}}}, [Stamp.SHARED_GPUS]),
        ({"ranks": [{"host": "a", "boot": "x"}, {"host": "b", "boot": "x"}]}, [Stamp.ONE_MACHINE]),
        ({"ranks": [{"host": "a", "boot": "x"}, {"host": "b", "boot": "y"}]}, []),
        ({"ranks": [{"host": "a", "boot": ""}, {"host": "b", "boot": ""}]}, []),
        ({"synthetic": True, "redacted": True}, [Stamp.SYNTHETIC, Stamp.REDACTED]),
    ],
)
def test_stamps_of_a_run(fields: dict[str, Any], stamps: list[Stamp]) -> None:
    assert list(run_of(fields).stamps) == stamps


def test_topology_of_another_number_of_ranks_is_ignored() -> None:
    stored = {"nodes": [0, 0], "domains": [0, 0], "rails": [0, 1]}
    assert known(run_of({"topology": stored}).topology).rails.tolist() == [0, 1]
    assert isinstance(run_of({"topology": stored}).topology, Topology)
    for other in ({**stored, "world_size": 3}, {**stored, "nodes": [0]}, {}, {"node_names": ["a"]}):
        assert run_of({"topology": other}).topology is None
    assert run_of({"topology": stored, "world_size": 4}).topology is None
    assert run_of({}).topology is None
