"""Run directories of six ranks on three nodes with two rails, with all that a report can show.

This includes flows, phases, samples, a verdict and hostile names.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ncclbench.analysis.summary import skew, summarise
from ncclbench.store.manifest import Manifest
from ncclbench.store.records import FlowTimes, GroupResult, LedgerRecord, PhaseResult, Record, Subtotal
from ncclbench.store.run_writer import RunWriter
from tests.helpers.stored import like, manifest

NODES, RAILS = 3, 2
WORLD = NODES * RAILS
SLOW_RANK = 3  # n1, rail 1: its sending is half as fast
HOSTILE = "<script>alert('owned')</script>\"'&\u202egnp.exe" + "x" * 300
CASE = "all_reduce/float32/1024/isolated"  # the only planned one: what else was measured is more than was asked for
LINKS = ("self", "node", "domain", "same_rail", "cross_rail", "cross_site")


def cluster_manifest(hosts: tuple[str, ...] = ("n0", "n1", "n2"), **fields: Any) -> Manifest:
    """The manifest of the run, with its topology and wiring."""
    ranks = range(WORLD)
    chosen: dict[str, Any] = {
        "plan": {"name": "made", "starts": 1, "cases": [{"id": CASE, "settings": {"warmup": 5}}]},
        "transport": "gloo",
        "device": "cpu",
        "world_size": WORLD,
        "topology": {
            "world_size": WORLD,
            "nodes": [rank // RAILS for rank in ranks],
            "domains": [rank // RAILS for rank in ranks],
            "rails": [rank % RAILS for rank in ranks],
            "sites": [0] * WORLD,
            "node_names": list(hosts),
            "sources": {"node": "host name of each rank", "rail": "the topology file"},
            "wiring": {
                "devices": [f"rail{rank % RAILS}" for rank in ranks],
                "nic_gbit_per_s": [100.0] * WORLD,
                "leaves": [rank % RAILS for rank in ranks],
                "leaf_names": ["leaf0", "leaf1"],
                "uplink_gbit_per_s": [100.0] * 2,
                "domain_gbit_per_s": [None] * WORLD,
            },
        },
        "provenance": {
            "ncclbench": "0.1",
            "launcher": "local",
            "command": ["ncclbench", "run"],
            "versions": {"torch": "2.13.0"},
            "variables": {"NCCL_DEBUG": "INFO"},
        },
        "started": "2026-01-01T00:00:00Z",
    }
    return manifest(**chosen | fields)


def seconds_of(median: float, iterations: int, seed: int, slow: float = 1.0, ranks: int = WORLD) -> Any:
    """Durations of all ranks with 2% noise, shape (R, N); those of `SLOW_RANK` are longer by `slow`."""
    rng = np.random.default_rng(seed)
    values_RN = median * np.exp(rng.normal(0, 0.02, (ranks, iterations)))
    values_RN[SLOW_RANK % ranks] *= slow
    return values_RN


def collective(
    nbytes: int, timing: str = "isolated", *, scale: float = 1.0, iterations: int = 40, **fields: Any
) -> tuple[Record, Any]:
    """A record of an all_reduce with its samples."""
    median = scale * (20e-6 + nbytes / 5e9)
    seconds_RN = seconds_of(median, iterations, nbytes % 9973)
    time_us = summarise(seconds_RN.max(axis=0))
    rate = nbytes / time_us.p50 / 1e3
    chosen: dict[str, Any] = {
        "case": f"all_reduce/float32/{nbytes}/{timing}",
        "pattern": "all_reduce",
        "transport": "gloo",
        "timing": timing,
        "dtype": "float32",
        "bytes": nbytes,
        "world_size": WORLD,
        "status": "ok",
        "started": "2026-01-01T00:00:00Z",
        "wrong": 0,
        "warmup": 5,
        "stopped": "precision",
        "size_bytes": nbytes,
        "count": nbytes // 4,
        "redop": "sum",
        "group_size": WORLD,
        "time_us": time_us,
        "skew_us": skew(seconds_RN),
        "alg_gb_per_s": rate,
        "bus_gb_per_s": rate * 2 * (WORLD - 1) / WORLD,
        "phases": [PhaseResult(label="all_reduce", ledger=ledger(nbytes), time_us=time_us)],
        "ledger": ledger(nbytes),
    }
    return Record(**{**chosen, **fields}), seconds_RN


def ledger(nbytes: int) -> LedgerRecord:
    """Bytes by link class."""
    sent = dict.fromkeys(LINKS, 0) | {"node": 3 * nbytes, "same_rail": 4 * nbytes, "cross_rail": nbytes}
    return LedgerRecord(sent_bytes=sent, bottleneck_bytes=2 * nbytes, bottleneck_gb_per_s=1.5, basis="pairs")


def flows(nbytes: int = 1 << 20) -> Record:
    """Every pair once; what `SLOW_RANK` sends takes twice as long, and one flow never ended."""
    pairs = [(a, b) for a in range(WORLD) for b in range(WORLD) if a // RAILS != b // RAILS]
    us = [100.0 * (2.0 if a == SLOW_RANK else 1.0) + (a + b) / 10 for a, b in pairs]
    stored: list[float | None] = [*us[:-1], None]
    base, seconds_RN = collective(nbytes)
    del seconds_RN
    phase = PhaseResult(
        label="round_0",
        ledger=ledger(nbytes),
        time_us=base.time_us,
        bound_us=80.0,
        flows=FlowTimes(
            src=[a for a, _ in pairs], dst=[b for _, b in pairs], nbytes=[nbytes] * len(pairs), p50_us=stored
        ),
    )
    return like(
        base, case=f"cross_rail/float32/{nbytes}/isolated", pattern="cross_rail", phases=[phase], bus_gb_per_s=None
    )


def moe(params: dict[str, Any], scale: float) -> tuple[Record, list[str], Any]:
    """A dispatch of four phases, with samples of each."""
    labels = ["total", "counts", "dispatch", "expert", "combine"]
    shares = np.array([1.0, 0.05, 0.45, 0.1, 0.4])
    base, total_RN = collective(1 << 22, scale=scale)
    seconds_RNK = total_RN[:, :, None] * shares
    phases = [
        PhaseResult(label=label, ledger=ledger(k << 20), time_us=summarise(seconds_RNK[:, :, k].max(axis=0)))
        for k, label in enumerate(labels)
        if k
    ]
    name = "/".join(f"{key}={value}" for key, value in params.items())
    record = like(
        base,
        case=f"moe_dispatch/bfloat16/4194304/isolated/{name}",
        pattern="moe_dispatch",
        params=params,
        phases=phases,
        bus_gb_per_s=None,
        subtotals={
            "comm_only": Subtotal(
                labels=["dispatch", "combine"], time_us=summarise(seconds_RNK[:, :, [2, 4]].sum(axis=2).max(axis=0))
            )
        },
        ratios={"skew_penalty": 1.25},
    )
    return record, labels, seconds_RNK


FLOOR = {"metric": "bus_gb_per_s", "limit": 2.0, "basis": "measured"}


def _check(
    check: str, subject: str, word: str, reason: str, action: str | None = None, *evidence: dict[str, Any]
) -> dict[str, Any]:
    return {
        "check": check,
        "subject": subject,
        "verdict": word,
        "reason": reason,
        "action": action,
        "evidence": list(evidence),
    }


def verdict(word: str = "FAIL") -> dict[str, Any]:
    """A verdict with one check of each outcome."""
    return {
        "schema": 1,
        "verdict": word,
        "reasons": ["n1 rail 1 sends at half the rate of the others"],
        "profile": {"name": "lab", "sha256": "ab" * 32},
        "stamps": ["cpu only", "redacted"],
        "starts": {"declared": 3, "present": 3},
        "checks": [
            _check(
                "floor", "all_reduce/float32/1048576/isolated", "PASS", "above it", None, FLOOR, {"bus_gb_per_s": 7.3}
            ),
            _check("fleet", "n1 rail 1", "FAIL", "50% below its peers", "CHECK_CABLE", {"send": 0.5, "peers": 4}),
            _check("path", "n0", "INCONCLUSIVE", "unverified"),
            _check("gpu", "n0", "NOT_RUN", "no GPUs"),
        ],
    }


def small_run(path: Path, *, scale: float = 1.0, **fields: Any) -> Path:
    """Three sizes in two regimes, with samples; a skipped case."""
    writer = RunWriter.create(path, cluster_manifest(**fields))
    for timing in ("isolated", "pipelined"):
        for nbytes in (1 << 10, 1 << 15, 1 << 20):
            record, seconds_RN = collective(nbytes, timing, scale=scale)
            writer.append(record, ["total"], seconds_RN[:, :, None])
    skipped, _ = collective(
        1 << 20,
        "graph",
        status="skipped",
        reason="no CUDA graphs on the host",
        time_us=None,
        skew_us=None,
        alg_gb_per_s=None,
        bus_gb_per_s=None,
        ledger=None,
        phases=[],
        wrong=None,
    )
    writer.append(skipped)
    writer.event("end", exit_code=0)
    return path


def rich_run(path: Path, hosts: tuple[str, ...] = ("n0", "n1", "n2"), word: str | None = "FAIL") -> Path:
    """All that a report can show."""
    writer = RunWriter.create(path, cluster_manifest(hosts))
    for timing in ("isolated", "pipelined"):
        for nbytes in (1 << 10, 1 << 15, 1 << 20):
            record, seconds_RN = collective(nbytes, timing, notes=["ungated: it must synchronise with the host"])
            writer.append(record, ["total"], seconds_RN[:, :, None])
    writer.append(flows())
    for variant, scale in (("flat", 1.3), ("hierarchical", 1.1), ("control", 1.0)):
        moe_record, labels, seconds_RNK = moe({"variant": variant}, scale)
        writer.append(moe_record, labels, seconds_RNK)
    hostile, _ = collective(
        64,
        case=f"all_reduce/float32/64/isolated/{HOSTILE}",
        status="failed",
        reason=HOSTILE,
        time_us=None,
        skew_us=None,
        phases=[],
        ledger=None,
        alg_gb_per_s=None,
        bus_gb_per_s=None,
    )
    writer.append(hostile)
    grouped, _ = collective(1 << 12, params={"group": "2"}, case="all_reduce/float32/4096/isolated/group=2")
    assert grouped.time_us is not None
    groups = [GroupResult(ranks=[0, 1], time_us=grouped.time_us, bus_gb_per_s=1.25)]
    writer.append(like(grouped, groups=groups))
    writer.event("end", exit_code=0)
    if word is not None:
        (path / "verdict.json").write_text(json.dumps(verdict(word)))
    return path
