"""Time and memory of a report on a large run: 8,192 ranks x 20 cases x 100 iterations by default.

    python scripts/benchmarks/report_scale.py [--ranks 64 512 2048 8192] [--cases 20] [--iterations 100]

For each number of ranks it stores a run with random durations. It then makes the table and the HTML report, each in a
separate process, and prints wall and processor time, peak memory, and size. The targets at 8,192 ranks (16 million
samples) on 2 cores: HTML in 20 s, 2 GiB and 15 MB; table in 5 s.

A report has a fixed cost before its first sample: the interpreter, pandas, plotly.js, the template. So time per sample
falls with the size of a run for any code. The cost of an *additional* sample must be constant. Processor time is
fitted as ``fixed + marginal x samples``. The marginal cost of the upper half of the sizes must be at most 1.5 times
that of the lower half. A step that sorts all samples of all cases, or compares each rank with each other rank, would
exceed this. The exit code is 1 if that or a target is missed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from ncclbench.analysis.summary import skew, summarise
from ncclbench.store.manifest import Manifest
from ncclbench.store.records import FlowTimes, LedgerRecord, PhaseResult, Record
from ncclbench.store.run_writer import RunWriter

_RAILS = 8
_TARGET_RANKS = 8192
_TARGETS = {"html": (20.0, 2 << 30, 15_000_000), "table": (5.0, 2 << 30, 15_000_000)}
# Largest ratio of the cost of an additional sample, upper half of the sizes over lower half.
_GROWTH = 1.5
# Seconds per sample that are within the noise.
_FLAT = 30e-9


def make_run(path: Path, ranks: int, cases: int, iterations: int) -> None:
    """Store a run of `cases` cases, with samples of every rank, flows along the rails, and 8 ranks per node."""
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
    writer = RunWriter.create(path, msgspec.convert(manifest, Manifest))
    for case in range(cases):
        nbytes = 1 << (10 + case)
        median = 20e-6 + nbytes / 40e9
        seconds_RN = median * np.exp(rng.normal(0, 0.03, (ranks, iterations)))
        writer.append(_record(nbytes, ranks, seconds_RN, case == cases - 1), ["total"], seconds_RN[:, :, None])


def _record(
    nbytes: int, ranks: int, seconds_RN: np.ndarray[tuple[int, int], np.dtype[np.float64]], last: bool
) -> Record:
    time_us = summarise(seconds_RN.max(axis=0))
    sent = {"self": 0, "node": 0, "domain": 0, "same_rail": nbytes * ranks, "cross_rail": 0, "cross_site": 0}
    source = np.arange(ranks)
    flows = FlowTimes(
        src=source.tolist(),
        dst=((source + _RAILS) % ranks).tolist(),
        nbytes=[nbytes] * ranks,
        p50_us=(np.median(seconds_RN, axis=1) * 1e6).tolist(),
    )
    phase = PhaseResult(
        label="round", ledger=LedgerRecord(sent_bytes=sent), time_us=time_us, flows=flows if last else None
    )
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
        ledger=LedgerRecord(sent_bytes=sent, bottleneck_bytes=nbytes, bottleneck_gb_per_s=rate),
    )


@dataclass(frozen=True)
class Cost:
    """Cost of one report: wall and processor seconds, peak bytes of memory, bytes of the document."""

    wall: float
    processor: float
    memory: int
    size: int


def report(run: Path, fmt: str) -> Cost:
    """Make a report in a new process; returns its cost."""
    out = run.with_suffix(f".{fmt}")
    command = [sys.executable, "-m", "ncclbench", "report", str(run), "--format", fmt, "-o", str(out)]
    begun = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, out.stat().st_size)


def fixed_and_marginal(seconds: Mapping[int, float]) -> tuple[float, float]:
    """Seconds before the first sample, and seconds per sample: least squares over samples -> seconds."""
    marginal, fixed = np.polyfit(list(seconds), list(seconds.values()), 1)
    return float(fixed), float(marginal)


def marginal_halves(seconds: Mapping[int, float]) -> tuple[float, float]:
    """Seconds per sample over the lower and the upper half of the sizes; equal where the cost is linear."""
    sizes = sorted(seconds)
    middle = len(sizes) // 2
    lower, upper = (fixed_and_marginal({n: seconds[n] for n in part}) for part in (sizes[: middle + 1], sizes[middle:]))
    return lower[1], upper[1]


def measure(ranks: int, cases: int, iterations: int, rounds: int) -> dict[str, list[Cost]]:
    """Make each format `rounds` times, alternating."""
    folder = Path(tempfile.mkdtemp(prefix="ncclbench-scale-"))
    found: dict[str, list[Cost]] = {fmt: [] for fmt in _TARGETS}
    try:
        make_run(folder / "run", ranks, cases, iterations)
        for _ in range(rounds):
            for fmt, costs in found.items():
                costs.append(report(folder / "run", fmt))
    finally:
        shutil.rmtree(folder)
    return found


def missed_targets(fmt: str, ranks: int, costs: Sequence[Cost]) -> list[str]:
    """Targets that the median round at 8,192 ranks misses."""
    if ranks != _TARGET_RANKS:
        return []
    found = (float(np.median([c.wall for c in costs])), max(c.memory for c in costs), max(c.size for c in costs))
    names = zip(("seconds", "memory", "size"), found, _TARGETS[fmt], strict=True)
    return [f"{fmt}: {name} {value:.4g}, target {target:.4g}" for name, value, target in names if value > target]


def main() -> int:
    """Print a line for each number of ranks and format, then the cost of an additional sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 512, 2048, _TARGET_RANKS])
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3, help="reports of each kind; the least processor time counts")
    parser.add_argument("--cores", type=int, default=2, help="processors to use, 0 for all")
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    missed: list[str] = []
    seconds: dict[str, dict[int, float]] = {fmt: {} for fmt in _TARGETS}
    print(
        f"{'ranks':>6} {'samples':>10} {'format':>6} {'wall s':>7} {'cpu s':>7} {'MiB':>6} {'MB':>6} {'ns/sample':>10}"
    )
    for ranks in options.ranks:
        samples = ranks * options.cases * options.iterations
        for fmt, costs in measure(ranks, options.cases, options.iterations, options.rounds).items():
            wall, memory = float(np.median([c.wall for c in costs])), max(c.memory for c in costs)
            seconds[fmt][samples] = min(c.processor for c in costs)
            figures = f"{wall:7.2f} {seconds[fmt][samples]:7.2f} {memory / 2**20:6.0f} {costs[0].size / 1e6:6.2f}"
            print(
                f"{ranks:6} {samples:10} {fmt:>6} {figures} {seconds[fmt][samples] / samples * 1e9:10.0f}", flush=True
            )
            missed += missed_targets(fmt, ranks, costs)
    for fmt, found in seconds.items() if len(options.ranks) > 2 else ():
        fixed, marginal = fixed_and_marginal(found)
        lower, upper = marginal_halves(found)
        halves = f"{lower * 1e9:.0f} ns over the lower half of the sizes, {upper * 1e9:.0f} over the upper"
        print(f"{fmt}: {fixed:.2f} s fixed, then {marginal * 1e9:.0f} ns per sample: {halves}")
        missed += (
            [f"{fmt}: an additional sample costs more in large runs: {halves}"]
            if upper > _GROWTH * lower + _FLAT
            else []
        )
    for what in missed:
        print(f"missed: {what}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
