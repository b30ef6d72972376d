"""Overhead of ncclbench on MPI: its median against a bare mpi4py loop, alternating in one job of 2 ranks.

    mpiexec -n 2 python scripts/benchmarks/mpi_overhead.py > table.md

Both do the same: barrier, clock, call, clock; the slowest rank counts. ncclbench's side is `run_case`, as in every run.
A size is measured in rounds. Each side is first in every second round, so a drift of the machine affects both. The
compared medians are those over all rounds. The target is a p50 within 3% or 0.3 us.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from ncclbench.measure.case import run_case
from ncclbench.measure.timing_host import quiet_gc
from ncclbench.plan.plan import Settings
from ncclbench.schedule import Case
from ncclbench.topology import Topology
from ncclbench.transports._mpi_library import MPI, library, start_mpi
from ncclbench.transports._mpi_transport import MpiTransport

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
WITHIN_PERCENT, WITHIN_US = 3.0, 0.3


def bare_call(pattern: str, nbytes: int, comm: MPI.Intracomm) -> Callable[[], None]:
    """The call as written by hand, on new buffers, because ncclbench uses new ones each time too."""
    send = np.full(nbytes // 4, 3, np.float32)
    if pattern == "all_reduce":
        return partial(comm.Allreduce, MPI.IN_PLACE, send)
    return partial(comm.Alltoall, send, np.empty_like(send))


def bare_loop(call: Callable[[], None], comm: MPI.Intracomm, iterations: int) -> Floats:
    """Seconds of the slowest rank, shape (iterations,)."""
    clock, barrier = time.perf_counter, comm.Barrier
    seconds = np.empty(iterations)
    with quiet_gc():
        for i in range(iterations):
            barrier()
            start = clock()
            call()
            seconds[i] = clock() - start
    slowest = np.empty_like(seconds)
    comm.Allreduce(seconds, slowest, op=MPI.MAX)
    return slowest


def main() -> None:
    """Print the table; exits 1 if a row misses the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=200, help="per round")
    parser.add_argument("--max-bytes", type=int, default=4 << 20)
    arguments = parser.parse_args()
    owned = start_mpi()
    comm = MPI.COMM_WORLD
    transport = MpiTransport(comm, owned=owned)
    topology = Topology.single_node(comm.size)
    say(comm.rank, f"{library()}, {comm.size} ranks, {arguments.rounds} rounds of {arguments.iterations} iterations\n")
    say(comm.rank, "| pattern | bytes | bare p50 us | ncclbench p50 us | ratio | difference us | within |")
    say(comm.rank, "|---|---:|---:|---:|---:|---:|---|")
    missed = 0
    for pattern in ("all_reduce", "all_to_all"):
        for nbytes in sorted({*(8**k for k in range(1, 8) if 8**k < arguments.max_bytes), arguments.max_bytes}):
            missed += compare(pattern, nbytes, comm, transport, topology, arguments.rounds, arguments.iterations)
    say(comm.rank, f"\n{missed} outside {WITHIN_PERCENT:g}% and {WITHIN_US:g} us")
    transport.close()
    sys.exit(int(missed > 0))


def compare(
    pattern: str,
    nbytes: int,
    comm: MPI.Intracomm,
    transport: MpiTransport,
    topology: Topology,
    rounds: int,
    iterations: int,
) -> bool:
    """Measure one row of the table; returns whether it misses the target (on rank 0)."""
    settings = Settings(iterations=iterations, warmup=20, check=False)
    case = Case(pattern=pattern, nbytes=nbytes)
    ours: list[Floats] = []
    bare: list[Floats] = []

    def by_hand() -> None:
        call = bare_call(pattern, nbytes, comm)
        bare_loop(call, comm, settings.warmup)
        bare.append(bare_loop(call, comm, iterations))

    def by_product() -> None:
        measured = run_case(case, transport, topology, settings)
        if measured is not None:
            assert measured.samples is not None
            ours.append(measured.samples.slowest_N)

    # The second side finds other memory, which alone was 8% at 4 MiB. Therefore the order alternates.
    for k in range(rounds):
        for measure in (by_hand, by_product) if k % 2 else (by_product, by_hand):
            measure()
    if not ours:
        return False
    product, plain = (float(np.median(np.concatenate(times))) * 1e6 for times in (ours, bare))
    missed = product - plain > max(WITHIN_US, plain * WITHIN_PERCENT / 100)
    row = (pattern, nbytes, f"{plain:.2f}", f"{product:.2f}", f"{product / plain:.3f}", f"{product - plain:+.2f}")
    say(0, f"| {' | '.join(map(str, row))} | {'no' if missed else 'yes'} |")
    return missed


def say(rank: int, line: str) -> None:
    """Print a line of the table on rank 0."""
    if rank == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
