"""What the harness costs: ncclbench against a bare loop of the same torch.distributed calls, gloo on this machine.

    python scripts/benchmarks/harness_overhead.py            # both figures, as Markdown
    python scripts/benchmarks/harness_overhead.py --rounds 9

Two figures:

- *p50*: the median over iterations of the slowest rank, by `run_case` and by a bare loop (barrier, clock, call, clock)
  in the same two processes, in turns that rotate, so that drift of the machine hits all alike; the bare loop stands
  twice, which shows what a difference means here. The target is 2% or 2 us, whichever is larger.
- *first result*: seconds from starting ``torchrun`` to the first printed figure, ncclbench and a bare script in turns.
  The target is 1.3 times.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = [1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24]
RANKS = 2
BARE_SCRIPT = """
import time, statistics, torch, torch.distributed as dist
dist.init_process_group("gloo")
data, seconds = torch.ones(256), []
for _ in range(5):
    dist.all_reduce(data)
for _ in range(20):
    data.fill_(1.0)
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(data)
    seconds.append(time.perf_counter() - start)
if dist.get_rank() == 0:
    print("p50", statistics.median(seconds) * 1e6, flush=True)
dist.destroy_process_group()
"""


def bare_slowest(nbytes: int, iterations: int) -> list[float]:
    """Seconds of the slower rank in each iteration, by the least code that measures it."""
    import torch
    import torch.distributed as dist

    data, taken = torch.ones(nbytes // 4), []
    for _ in range(5):
        dist.all_reduce(data)
    data.fill_(1.0)
    for _ in range(iterations):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(data)
        end = time.perf_counter()
        taken.append(end - start)
    seconds = torch.tensor(taken, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    slowest: list[float] = seconds.tolist()
    return slowest


def rank_main(rounds: int) -> None:
    """One rank: both loops in turns, for every size; rank 0 prints the figures as JSON."""
    from ncclbench.launch.detect import detect
    from ncclbench.measure.case import run_case
    from ncclbench.plan import Settings
    from ncclbench.schedule import Case
    from ncclbench.topology import Topology
    from ncclbench.transports.torch_dist import open_transport

    seat = detect(os.environ)
    assert seat is not None, "this part runs under torchrun"
    transport = open_transport("gloo", seat, 60.0)
    topology = Topology.single_node(transport.world_size)
    rows = []
    for nbytes in SIZES:
        iterations = 100 if nbytes < 1 << 20 else 20
        settings = Settings(iterations=iterations, check=False)
        pooled: dict[str, list[float]] = {"bare": [], "ours": [], "bare again": []}
        order = list(pooled)
        for _ in range(rounds):
            order.append(order.pop(0))
            for who in order:
                if who != "ours":
                    pooled[who] += bare_slowest(nbytes, iterations)
                    continue
                measured = run_case(Case(pattern="all_reduce", nbytes=nbytes), transport, topology, settings)
                if measured is not None and measured.samples is not None:
                    pooled[who] += measured.samples.slowest_N.tolist()
        rows.append((nbytes, *(statistics.median(times) * 1e6 if times else 0.0 for times in pooled.values())))
    if transport.rank == 0:
        print("ROWS " + json.dumps(rows), flush=True)
    transport.close()


def torchrun(*arguments: str) -> list[str]:
    """The command that starts `RANKS` ranks."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", *arguments]


def seconds_to(sign: str, command: list[str]) -> float:
    """Seconds from starting `command` to the first line that contains `sign`."""
    began = time.perf_counter()
    seconds = float("nan")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if sign in line and seconds != seconds:
                seconds = time.perf_counter() - began
    return seconds


def first_results(rounds: int) -> tuple[float, float]:
    """Median seconds to the first figure: of the bare script, and of ncclbench."""
    bare, ours = [], []
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "bare.py")
        script.write_text(BARE_SCRIPT)
        for k in range(rounds):
            bare.append(seconds_to("p50", torchrun(str(script))))
            run = f"run all_reduce -b 1K -e 1K -n 20 --transport gloo -o {folder}/{k}".split()
            ours.append(seconds_to("p50", torchrun("-m", "ncclbench", *run)))
    return statistics.median(bare), statistics.median(ours)


def main() -> None:
    """Start the ranks, collect the figures, print them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--only-p50", action="store_true", help="leave out the start to the first result")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank_main(options.rounds)
        return
    done = subprocess.run(
        torchrun(__file__, "--rank", f"--rounds={options.rounds}"), capture_output=True, text=True, check=True
    )
    rows = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("ROWS "))[5:])
    import torch

    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(
        f"{datetime.date.today()}, {machine}, torch {torch.__version__}, gloo, {RANKS} ranks, {options.rounds} rounds"
    )
    print("\n| bytes | bare p50 (us) | ncclbench (us) | ratio | the bare loop again / bare | within 2% or 2 us |")
    print("|---:|---:|---:|---:|---:|---|")
    for nbytes, bare, ours, again in rows:
        within = abs(ours - bare) <= max(2.0, 0.02 * bare)
        verdict = "yes" if within else "no"
        print(f"| {nbytes} | {bare:.1f} | {ours:.1f} | {ours / bare:.3f} | {again / bare:.3f} | {verdict} |")
    if options.only_p50:
        return
    bare_seconds, our_seconds = first_results(5)
    print(
        f"\nStart to first result under torchrun, median of 5 in turns: bare {bare_seconds:.2f} s, "
        f"ncclbench {our_seconds:.2f} s, ratio {our_seconds / bare_seconds:.2f} (target 1.3)."
    )


if __name__ == "__main__":
    main()
