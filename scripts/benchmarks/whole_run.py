"""Whole runs of ncclbench against a bare torch.distributed script, alternating.

    python scripts/benchmarks/whole_run.py                       # gloo; with two GPUs also nccl
    python scripts/benchmarks/whole_run.py --also OLD_CHECKOUT   # also an older ncclbench

The other benchmarks time the loop only. Whole runs also have the watchdog, the recorder and the control plane. Each
start is a separate torchrun of two ranks; the order changes from round to round. A result is the median over starts of
each start's p50, where the slowest rank of each iteration counts. The interval is 95%, from a bootstrap over rounds.
"""

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ncclbench.measure.sampling import FEWEST_SAMPLES

ROOT = Path(__file__).parents[2]
SIZES = [8, 1 << 16, 1 << 20]
RANKS = 2
RESAMPLES = 2000
BLOCK = 20
BARE = """
import gc, json, os, sys, time
import torch, torch.distributed as dist
backend, timing, sizes, samples, block = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), *map(int, sys.argv[4:])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
if backend == "nccl":
    torch.cuda.set_device(device)
dist.init_process_group(backend, device_id=device if backend == "nccl" else None)
control = dist.new_group(backend="gloo") if backend == "nccl" else None
wait = torch.cuda.synchronize if backend == "nccl" else (lambda: None)
gc.disable()
for size in sizes:
    data = torch.zeros(size // 4, device=device)
    for _ in range(5):
        dist.all_reduce(data)
    wait()
    launches, seconds = (block if timing == "pipelined" else 1), []
    for _ in range(samples):
        dist.barrier(group=control)
        begun = time.perf_counter()
        for _ in range(launches):
            dist.all_reduce(data)
        wait()
        seconds.append((time.perf_counter() - begun) / launches)
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=control)
    if dist.get_rank() == 0:
        print(json.dumps(slowest.quantile(0.5).item() * 1e6), flush=True)
dist.destroy_process_group()
"""


def torchrun(*arguments: str) -> list[str]:
    """The command of `RANKS` ranks."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), *arguments]


def said_by(command: list[str], environ: dict[str, str], folder: str | None = None) -> list[str]:
    """Run a command in `folder`; returns the lines of its stdout."""
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=folder)
    if done.returncode:
        sys.exit(f"{' '.join(command[-12:])}: {done.stderr[-1000:]}")
    return done.stdout.splitlines()


def bare(transport: str, timing: str, samples: int) -> list[float]:
    """p50 in us for each size, by the bare script."""
    if timing == "pipelined":  # blocks of `samples` launches, and the fewest blocks, as a plan's `iterations`
        samples = FEWEST_SAMPLES
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "bare.py")
        script.write_text(BARE)
        line = torchrun(str(script), transport, timing, json.dumps(SIZES), str(samples), str(BLOCK))
        return [float(one) for one in said_by(line, {**os.environ})]


def ours(root: Path, transport: str, timing: str, samples: int) -> list[float]:
    """p50 in us for each size, by the ncclbench of the checkout `root`."""
    paths = [str(root), str(root / "patterns"), str(root / "reports"), os.environ.get("PYTHONPATH", "")]
    plan = f"""
name = "whole"
[defaults]
bytes = {SIZES}
timing = "{timing}"
iterations = {samples}
max_seconds = 60
cache = "warm"
[[case]]
pattern = "all_reduce"
"""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "whole.toml")
        file.write_text(plan)
        line = torchrun("-m", "ncclbench", "run", "--plan", str(file), "--transport", transport, "--json")
        environ = {**os.environ, "PYTHONPATH": ":".join(paths)}
        # `python -m` prefers the working directory to PYTHONPATH, which may be another checkout.
        where = "import ncclbench; print(ncclbench.__file__)"
        if not Path(said_by([sys.executable, "-c", where], environ, folder)[0]).is_relative_to(root):
            sys.exit(f"python does not take ncclbench from {root}")
        said = said_by([*line, "-o", f"{folder}/run"], environ, folder)
    return [record["time_us"]["p50"] for record in json.loads(said[-1])["records"]]


def gpu_names() -> list[str]:
    """Names of all GPUs, from another process, so that no GPU context remains."""
    asking = "import torch\nfor k in range(torch.cuda.device_count()): print(torch.cuda.get_device_name(k))"
    return said_by([sys.executable, "-c", asking], {**os.environ})


def ratio_in_words(above: list[float], below: list[float], rng: random.Random) -> str:
    """Text of the ratio of the medians of paired starts, with its interval."""

    def ratio(rounds: list[int]) -> float:
        return statistics.median(above[i] for i in rounds) / statistics.median(below[i] for i in rounds)

    every = range(len(above))
    drawn = sorted(ratio(rng.choices(every, k=len(above))) for _ in range(RESAMPLES))
    return f"{ratio([*every]):.3f} [{drawn[RESAMPLES // 40]:.3f}, {drawn[-RESAMPLES // 40]:.3f}]"


def rows(
    transport: str, timing: str, samples: int, starts: int, also: Path | None, rng: random.Random
) -> Iterator[list[str]]:
    """One row of the table for each size."""
    runs: dict[str, Callable[[], list[float]]] = {
        "bare": lambda: bare(transport, timing, samples),
        "ours": lambda: ours(ROOT, transport, timing, samples),
    }
    if also:
        runs["also"] = lambda: ours(also.resolve(), transport, timing, samples)
    told: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(starts):
        for name in rng.sample(sorted(runs), len(runs)):
            told[name].append(runs[name]())
    for k, size in enumerate(SIZES):
        by = {name: [start[k] for start in every] for name, every in told.items()}
        row = [transport, timing, str(size), *(f"{statistics.median(by[name]):.1f}" for name in ("bare", "ours"))]
        row.append(ratio_in_words(by["ours"], by["bare"], rng))
        if also:
            row += [f"{statistics.median(by['also']):.1f}", ratio_in_words(by["also"], by["bare"], rng)]
        yield row


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=8, help="starts of each, alternating (default: 8)")
    parser.add_argument("--also", type=Path, metavar="CHECKOUT", help="also run the ncclbench of this checkout")
    parser.add_argument("--transport", choices=["gloo", "nccl"], help="only this transport")
    asked = parser.parse_args()
    kinds = [("gloo", "isolated", 500), ("gloo", "pipelined", BLOCK)]
    gpus = gpu_names()
    if len(gpus) >= RANKS:
        kinds.append(("nccl", "pipelined", BLOCK))
    kinds = [kind for kind in kinds if asked.transport in (None, kind[0])]
    if not kinds:
        parser.error(f"nccl needs {RANKS} GPUs, and there are {len(gpus)}")
    gpu = f"{len(gpus)} x {gpus[0]}, " if gpus else ""
    print(
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {gpu}{platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, {RANKS} ranks, {asked.starts} starts of each\n"
    )
    columns = ["bare p50 (us)", "ncclbench (us)", "ratio", *(["before (us)", "before / bare"] if asked.also else [])]
    print(f"| transport | timing | bytes | {' | '.join(columns)} |")
    print(f"|---|---|---:{'|---:' * len(columns)}|")
    rng = random.Random(0)
    for kind in kinds:
        for row in rows(*kind, asked.starts, asked.also, rng):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
