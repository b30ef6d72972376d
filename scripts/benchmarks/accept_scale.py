#!/usr/bin/env python3
"""Time and memory of judging a large run: 8,192 ranks x 20 cases x 100 iterations by default.

    scripts/benchmarks/accept_scale.py [--nodes 1024] [--cases 20] [--samples 100] [--keep DIR]

`ncclbench.accept.example_runs` writes the run: every rank has samples and a GPU's state in every case. ``ncclbench
accept RUN`` and ``ncclbench verify`` run in separate processes. Printed are seconds and peak memory.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ncclbench.accept.example_runs import Example, ExampleCase, write_example

G = 1 << 30


def main() -> None:
    """Write the run, judge it, verify it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--nodes", type=int, default=1024, help="of 8 ranks")
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--starts", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="write the run here and keep it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = (given.keep or Path(folder)) / "run"
        began = time.perf_counter()
        write_example(path, example(given.nodes, given.cases, given.samples, given.starts))
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        print(
            f"made {given.nodes * 8} ranks x {given.cases} cases x {given.samples} iterations x {given.starts} starts"
        )
        print(f"  {size / 1e6:.0f} MB on disk, in {time.perf_counter() - began:.1f} s")
        measure("accept", "accept", str(path), "--profile", "h100-hgx-ib")
        measure("verify", "verify", str(path))


def example(nodes: int, cases: int, samples: int, starts: int) -> Example:
    """Collectives of growing size, alternating over rails, nodes and the world."""
    groups = ("rail", "node", "world")
    planned = tuple(
        ExampleCase(pattern="all_reduce", nbytes=G + 1024 * k, bus_gb_per_s=45.0, group=groups[k % 3], samples=samples)
        for k in range(cases)
    )
    return Example(cases=planned, nodes=nodes, starts=starts)


def measure(name: str, *arguments: str) -> None:
    """Run one command; print its time and peak memory."""
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "ncclbench", *arguments], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    first = child.stdout.readline().strip()
    child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    cpu = usage.ru_utime + usage.ru_stime
    gib = usage.ru_maxrss / 2**20
    print(f"{name}: {seconds:.1f} s ({cpu:.1f} s of CPU), {gib:.2f} GiB, exit {child.returncode}: {first}")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
