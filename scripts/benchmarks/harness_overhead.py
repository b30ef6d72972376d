"""Overhead of ncclbench against a bare loop of the same torch.distributed calls, with gloo on this machine.

    python scripts/benchmarks/harness_overhead.py            # both figures, as Markdown
    python scripts/benchmarks/harness_overhead.py --seconds 5

Two figures:

- *p50*: the median over iterations of the slowest rank, of `run_case` and of two bare loops (barrier, clock, call,
  clock) with a tensor each, all in the same two processes. As greenlets they alternate at every barrier, in random
  order. So all three run on the same machine state, follow each other equally often, and reach and leave their barrier
  by the same steps, which matters (see docs/log.md). ncclbench is compared with both bare loops together. The two bare
  loops are compared with each other, which shows the noise. Buffers are new in every round and processes in every
  start, because the position of memory matters. Intervals are 95%, from a bootstrap over starts and over their rounds.
  The target is 2% or 2 us, whichever is larger.
- *first result*: seconds from starting ``torchrun`` to the first printed result; ncclbench and a bare script alternate.
  The target is 1.3 times.
"""

from __future__ import annotations

import argparse
import datetime
import json
import mmap
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from ncclbench.analysis.summary import Floats

    # The iterations of each round of one start.
    Rounds = list[Floats]

SIZES = [1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24]
RANKS = 2
RESAMPLES = 1000
OURS = 2
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


def bare_loop(data: torch.Tensor, barrier: Callable[[], None], taken: list[float]) -> None:
    """The loop that a user would write, without end; `taken` receives the seconds of each iteration."""
    import torch.distributed as dist

    clock, all_reduce = time.perf_counter, dist.all_reduce
    while True:
        barrier()
        start = clock()
        all_reduce(data)
        end = clock()
        taken.append(end - start)


class Turns:
    """Alternate `run_case` and bare loops at every barrier, in a random order that is the same on all ranks.

    Args:
        barrier: of the transport.
        order: which side is next: the number of a bare loop, or `OURS`.
    """

    def __init__(self, barrier: Callable[[], None], order: Iterator[int]) -> None:
        """Start with one side: the current greenlet is `OURS`."""
        from greenlet import getcurrent

        self.barrier, self.order = barrier, order
        self.parties = {OURS: getcurrent()}

    def barrier_of(self, me: int) -> Callable[[], None]:
        """The barrier of one side: it waits for its turn, then for the other ranks."""
        parties, order, barrier = self.parties, self.order, self.barrier

        def wait() -> None:
            turn = next(order)
            if turn != me:
                parties[turn].switch()
            barrier()

        return wait

    def join(self, me: int, data: torch.Tensor) -> list[float]:
        """Add a bare loop on `data`; returns the list that receives its seconds."""
        from greenlet import greenlet

        taken: list[float] = []
        wait, ours = self.barrier_of(me), self.parties[OURS]

        def run() -> None:
            ours.switch()  # until it is this loop's turn for the first time
            first = iter([self.barrier])
            # A separate code object: the interpreter specializes code while it runs, and a shared copy is warmer.
            own = FunctionType(bare_loop.__code__.replace(), bare_loop.__globals__)
            own(data, lambda: next(first, wait)(), taken)

        self.parties[me] = greenlet(run)
        self.parties[me].switch()
        return taken


def random_order(seed: int) -> Iterator[int]:
    """The next side, at random, so that each follows each equally often."""
    draw = random.Random(seed)
    while True:
        yield draw.choice([0, 1, OURS])


def warm_tensor(nbytes: int) -> torch.Tensor:
    """A tensor that has been reduced a few times, in the kind of memory that ncclbench uses.

    This is NumPy's memory. It uses huge pages from 4 MiB on, where torch does not (3% there). It is page-aligned, as
    OSU's buffers are; below 4 MiB the alignment accounts for 1 to 2%.
    """
    import numpy as np
    import torch
    import torch.distributed as dist

    whole = np.empty(nbytes + mmap.PAGESIZE, np.uint8)
    data = torch.from_numpy(whole[-whole.ctypes.data % mmap.PAGESIZE :][:nbytes].view(np.float32))
    data.fill_(1.0)
    for _ in range(5):
        dist.all_reduce(data)
        data.zero_()
    return data


def rank_main(seconds: float) -> None:
    """One rank: all loops, for every size; rank 0 prints all rounds as JSON."""
    import torch
    import torch.distributed as dist

    from ncclbench.launch.launcher_detection import detect
    from ncclbench.measure.case import run_case
    from ncclbench.plan.plan import Settings
    from ncclbench.schedule import Case
    from ncclbench.topology import Topology
    from ncclbench.transports.gloo import open_transport

    launched = detect(os.environ)
    assert launched is not None, "this part runs under torchrun"
    transport = open_transport("gloo", launched, 60.0)
    topology, barrier = Topology.single_node(transport.world_size), transport.barrier
    order = random_order(1)
    for nbytes in SIZES:
        iterations = 60 if nbytes < 1 << 22 else 20
        case, settings = Case(pattern="all_reduce", nbytes=nbytes), Settings(iterations=iterations, check=False)
        rounds: dict[str, list[list[float]]] = {"ours": [], "bare": [], "bare again": []}
        until, more = time.monotonic() + seconds, torch.ones(1)
        while more.item():
            turns = Turns(barrier, order)
            taken = [turns.join(k, warm_tensor(nbytes)) for k in range(2)]
            transport.barrier = turns.barrier_of(OURS)  # type: ignore[method-assign]
            measured = run_case(case, transport, topology, settings)
            transport.barrier = barrier  # type: ignore[method-assign]
            for side, seconds_taken in zip(["bare", "bare again"], taken, strict=True):
                slower = torch.tensor(seconds_taken, dtype=torch.float64)
                dist.all_reduce(slower, op=dist.ReduceOp.MAX)
                rounds[side].append(slower.tolist())
            if measured and measured.samples:
                rounds["ours"].append(measured.samples.slowest_N.tolist())
            more.fill_(time.monotonic() < until or len(rounds["bare"]) < 3)
            dist.broadcast(more, 0)
        if transport.rank == 0:
            print("ROUNDS " + json.dumps([nbytes, rounds]), flush=True)
    transport.close()


@dataclass(frozen=True)
class Ratio:
    """Ratio of two medians over all iterations of all rounds, with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Text for the table."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio_of(above: list[Rounds], below: list[Rounds]) -> Ratio:
    """The ratio of the medians of two loops, given the iterations of each in the same rounds of the same starts."""
    import numpy as np

    def ratio(chosen: list[tuple[int, int]]) -> float:
        over, under = (np.median(np.concatenate([side[s][r] for s, r in chosen])) for side in (above, below))
        return float(over / under)

    def draw() -> list[tuple[int, int]]:
        starts = rng.integers(len(above), size=len(above))
        return [(s, r) for s in starts for r in rng.integers(len(above[s]), size=len(above[s]))]

    rng = np.random.default_rng(1)
    low, high = np.quantile([ratio(draw()) for _ in range(RESAMPLES)], [0.025, 0.975])
    return Ratio(ratio([(s, r) for s, rounds in enumerate(above) for r in range(len(rounds))]), float(low), float(high))


def torchrun(*arguments: str) -> list[str]:
    """The command that starts `RANKS` ranks."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", *arguments]


def one_start(seconds: float) -> Iterator[tuple[int, dict[str, list[list[float]]]]]:
    """Each size, and the iterations of all rounds of each loop, from new processes."""
    command = torchrun(__file__, "--rank", f"--seconds={seconds}")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for line in done.stdout.splitlines():
        if line.startswith("ROUNDS "):
            nbytes, rounds = json.loads(line[len("ROUNDS ") :])
            yield nbytes, rounds


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
    """Median seconds to the first result: of the bare script, and of ncclbench."""
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
    """Start the ranks, collect the results, print them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="per size and start")
    parser.add_argument("--starts", type=int, default=4, help="number of process starts")
    parser.add_argument("--only-p50", action="store_true", help="skip the time to the first result")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank_main(options.seconds)
        return
    import numpy as np
    import torch

    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    effort = f"{options.starts} starts of {options.seconds:g} s per size"
    print(f"{datetime.date.today()}, {machine}, gloo, {RANKS} ranks, {effort}\n")
    print("| bytes | rounds | bare p50 (us) | ncclbench (us) | ratio | bare / bare | within 2% or 2 us |")
    print("|---:|---:|---:|---:|---:|---:|---|")
    loops: dict[int, dict[str, list[Rounds]]] = {}
    for _ in range(options.starts):
        for nbytes, rounds in one_start(options.seconds):
            for side, taken in rounds.items():
                loops.setdefault(nbytes, {}).setdefault(side, []).append([np.array(times) * 1e6 for times in taken])
    for nbytes, of in loops.items():
        ours, bare, again = (of[side] for side in ("ours", "bare", "bare again"))
        both = [[np.concatenate(pair) for pair in zip(*pairs, strict=True)] for pairs in zip(bare, again, strict=True)]
        p50, bare_p50 = (
            float(np.median(np.concatenate([t for start in side for t in start]))) for side in (ours, both)
        )
        verdict = "yes" if abs(p50 - bare_p50) <= max(2.0, 0.02 * bare_p50) else "no"
        ratios = f"{ratio_of(ours, both)} | {ratio_of(again, bare)}"
        print(f"| {nbytes} | {sum(map(len, ours))} | {bare_p50:.1f} | {p50:.1f} | {ratios} | {verdict} |")
    if options.only_p50:
        return
    bare_seconds, our_seconds = first_results(5)
    print(
        f"\nStart to first result under torchrun, median of 5, alternating: bare {bare_seconds:.2f} s, "
        f"ncclbench {our_seconds:.2f} s, ratio {our_seconds / bare_seconds:.2f} (target 1.3)."
    )


if __name__ == "__main__":
    main()
