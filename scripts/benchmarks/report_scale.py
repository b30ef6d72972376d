"""How long a report on a large run takes, and how much memory: 8,192 ranks x 20 cases x 100 iterations by default.

    python scripts/benchmarks/report_scale.py [--ranks 64 1024 8192] [--cases 20] [--iterations 100]

For each number of ranks it stores a run whose durations are drawn at random, then makes its table and its HTML report,
each in a process of its own, and prints wall time, peak memory, size, and time per sample. The targets at 8,192 ranks
(16 million samples) on 2 cores: HTML in 20 s, 2 GiB and 15 MB; table in 5 s. Exit code 1 if one is missed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ncclbench.measure.statistics import skew, summarise
from ncclbench.store.directory import RunWriter
from ncclbench.store.records import PhaseResult, Record

_RAILS = 8
_TARGET_RANKS = 8192
_TARGETS = {"html": (20.0, 2 << 30, 15_000_000), "table": (5.0, 2 << 30, 15_000_000)}


def make_run(path: Path, ranks: int, cases: int, iterations: int) -> None:
    """A run of `cases` cases, with samples of every rank, flows along the rails, and 8 ranks a node."""
    rng = np.random.default_rng(ranks)
    nodes = [rank // _RAILS for rank in range(ranks)]
    manifest = {
        "schema": 1,
        "plan": {"name": "scale", "cases": []},
        "transport": "model",
        "simulated": True,
        "device": "none",
        "world_size": ranks,
        "topology": {
            "nodes": nodes,
            "domains": nodes,
            "rails": [rank % _RAILS for rank in range(ranks)],
            "sites": [0] * ranks,
            "node_names": [f"node-{node:04d}" for node in range(nodes[-1] + 1)],
            "sources": {"node": "made up"},
        },
        "provenance": {"launcher": "none"},
        "started": "2026-01-01T00:00:00Z",
    }
    writer = RunWriter.create(path, manifest)
    for case in range(cases):
        nbytes = 1 << (10 + case)
        median = 20e-6 + nbytes / 40e9
        seconds_RN = median * np.exp(rng.normal(0, 0.03, (ranks, iterations)))
        writer.append(_record(nbytes, ranks, seconds_RN, case == cases - 1), ["total"], seconds_RN[:, :, None])


def _record(
    nbytes: int, ranks: int, seconds_RN: np.ndarray[tuple[int, int], np.dtype[np.float64]], last: bool
) -> Record:
    time_us = summarise(seconds_RN.max(axis=0))
    sent = {
        "sent_bytes": {"self": 0, "node": 0, "domain": 0, "same_rail": nbytes * ranks, "cross_rail": 0, "cross_site": 0}
    }
    source = np.arange(ranks)
    flows = {
        "src": source.tolist(),
        "dst": ((source + _RAILS) % ranks).tolist(),
        "nbytes": [nbytes] * ranks,
        "p50_us": (np.median(seconds_RN, axis=1) * 1e6).tolist(),
    }
    phase = PhaseResult(label="round", ledger=sent, time_us=time_us, flows=flows if last else None)
    rate = nbytes / time_us.p50 / 1e3
    return Record(
        case=f"same_rail/float32/{nbytes}/isolated",
        pattern="same_rail",
        transport="model",
        timing="isolated",
        dtype="float32",
        bytes=nbytes,
        size_bytes=nbytes,
        world_size=ranks,
        status="ok",
        started="2026-01-01T00:00:00Z",
        time_us=time_us,
        skew_us=skew(seconds_RN),
        alg_gb_per_s=rate,
        bus_gb_per_s=rate,
        phases=[phase],
        ledger={**sent, "bottleneck_bytes": nbytes, "bottleneck_gb_per_s": rate},
    )


def report(run: Path, fmt: str) -> tuple[float, int, int]:
    """Wall seconds, peak bytes of memory, and bytes of the document, of a fresh process."""
    out = run.with_suffix(f".{fmt}")
    command = [sys.executable, "-m", "ncclbench", "report", str(run), "--format", fmt, "-o", str(out)]
    begun = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    return seconds, usage.ru_maxrss * 1024, out.stat().st_size


def main() -> int:
    """Print a line for each number of ranks and format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 1024, _TARGET_RANKS])
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--cores", type=int, default=2, help="processors to use, 0 for all")
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    missed = []
    print(f"{'ranks':>6} {'samples':>10} {'format':>6} {'s':>7} {'MiB':>7} {'MB':>7} {'ns/sample':>10}")
    for ranks in options.ranks:
        folder = Path(tempfile.mkdtemp(prefix="ncclbench-scale-"))
        try:
            make_run(folder / "run", ranks, options.cases, options.iterations)
            for fmt, targets in _TARGETS.items():
                found = report(folder / "run", fmt)
                samples = ranks * options.cases * options.iterations
                figures = (
                    f"{found[0]:7.2f} {found[1] / 2**20:7.0f} {found[2] / 1e6:7.2f} {found[0] / samples * 1e9:10.0f}"
                )
                print(f"{ranks:6} {samples:10} {fmt:>6} {figures}", flush=True)
                if ranks == _TARGET_RANKS and any(a > b for a, b in zip(found, targets, strict=True)):
                    missed.append(fmt)
        finally:
            shutil.rmtree(folder)
    if missed:
        print(f"missed at {_TARGET_RANKS} ranks: {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
