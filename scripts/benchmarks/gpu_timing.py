"""Accuracy of GPU times: both NCCL transports against a bare CuPy loop, alternating in the same processes.

    torchrun --nproc-per-node 2 scripts/benchmarks/gpu_timing.py [OUT]

Prints Markdown and writes it to OUT/gpu_timing.md. Its end lists the targets that were missed. Targets:

- graph regime, 8 B to 1 GiB: `nccl`, `cupy_nccl` and a bare graph of CuPy launches within 2% of each other;
- isolated regime at 8 B: five repetitions per transport under 9 us and within 3%;
- 1 GiB of each large op, in graphs: busbw of both transports within 1% of the bare loop.

The bare loop is measured twice in every round, and the order changes from round to round.
"""

import datetime
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from ncclbench.buffers.arrays import l2_bytes, rotation
from ncclbench.launch.launcher_detection import detect
from ncclbench.measure.case import run_case
from ncclbench.measure.timing_device import graph_launches
from ncclbench.plan.plan import Settings
from ncclbench.schedule import Case, Timing
from ncclbench.schedule.rates import bus_gb_per_s
from ncclbench.topology import Topology
from ncclbench.transports._cupy_nccl import CupyNcclTransport
from ncclbench.transports.capabilities import capabilities_of
from ncclbench.transports.cuda.nccl_log import NcclLog
from ncclbench.transports.nccl import open_transport

GRAPH_SIZES = [8, 64, 1 << 10, 1 << 13, 1 << 16, 1 << 19, 1 << 22, 1 << 25, 1 << 28, 1 << 30]
LARGE_OPS = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"]
ROUNDS, LARGE_ROUNDS = 5, 3
SMALLEST_US, ISOLATED_US, SPREAD, ALIKE, ALIKE_LARGE = 6.2, 9.0, 0.03, 0.02, 0.01


# Notes of the measured cases, such as a gate that opened at its time limit.
doubtful = set[str]()


class Bare:
    """The minimal code that times NCCL from Python: one communicator, one stream, one graph."""

    def __init__(self, transport: CupyNcclTransport) -> None:
        """Take the communicator and the stream of `transport`."""
        self.rank, self.world_size = transport.rank, transport.world_size
        self.barrier, self.gather = transport.barrier, transport.control.gather
        self.comm: Any = transport.communicator(tuple(range(self.world_size)))
        self.stream = transport._cupy_stream
        self.enter = transport.stream.make_current

    def launch(self, op: str, nbytes: int, send: Any, recv: Any) -> Callable[[], None]:
        """One launch of `op` with a buffer of `nbytes` in total, float32."""
        comm, stream, n, me = self.comm, self.stream.ptr, self.world_size, self.rank
        shard = nbytes // n
        s, r = send.data.ptr, recv.data.ptr
        if op == "all_reduce":
            return lambda: comm.allReduce(s, s, nbytes // 4, 7, 0, stream)
        if op == "all_gather":
            return lambda: comm.allGather(s, r, shard // 4, 7, stream)
        if op == "reduce_scatter":
            return lambda: comm.reduceScatter(s, r, shard // 4, 7, 0, stream)
        to = list(range(n)) if op == "all_to_all" else [(me + 1) % n]
        by = list(range(n)) if op == "all_to_all" else [(me - 1) % n]
        size = shard if op == "all_to_all" else nbytes

        def grouped() -> None:
            cupy.cuda.nccl.groupStart()
            for k, peer in enumerate(to):
                comm.send(s + k * size, size, 1, peer, stream)
            for k, peer in enumerate(by):
                comm.recv(r + k * size, size, 1, peer, stream)
            cupy.cuda.nccl.groupEnd()

        return grouped

    def graph_us(self, op: str, nbytes: int) -> float:
        """Median over replays of the slowest rank, in microseconds per launch."""
        launches, replays = graph_launches(nbytes), 40
        # As in ncclbench: rotate over so many buffers that L2 does not hold them, where the size allows.
        copies = rotation(nbytes if op == "all_reduce" else 2 * nbytes, l2_bytes(), "cold").copies
        pairs = [(cupy.zeros(nbytes, np.uint8), cupy.zeros(nbytes, np.uint8)) for _ in range(copies)]
        calls = [self.launch(op, nbytes, *pairs[k % copies]) for k in range(launches)]
        for call in calls[:5]:
            call()
        self.stream.synchronize()
        self.stream.begin_capture()
        for call in calls:
            call()
        graph = self.stream.end_capture()
        self.barrier()
        for _ in range(2):
            graph.launch(self.stream)
        self.stream.synchronize()
        seconds = []
        for _ in range(replays // 20):
            self.barrier()
            marks = [cupy.cuda.Event() for _ in range(21)]
            marks[0].record(self.stream)
            for mark in marks[1:]:
                graph.launch(self.stream)
                mark.record(self.stream)
            self.stream.synchronize()
            seconds += [cupy.cuda.get_elapsed_time(a, b) / launches for a, b in pairwise(marks)]
        everyone = self.gather(np.array(seconds))
        return float(np.median(everyone.max(axis=0))) * 1e3 if everyone is not None else 0.0


def product_us(transport: Any, topology: Topology, op: str, nbytes: int, timing: Timing, iterations: int = 40) -> float:
    """Run a case; returns its p50 in microseconds, 0 on ranks other than 0."""
    transport.stream.make_current()
    settings = Settings(iterations=iterations, check=False)
    measured = run_case(Case(pattern=op, nbytes=nbytes, timing=timing), transport, topology, settings)
    if measured is None:
        return 0.0
    record = measured.record
    if record.status != "ok" or record.time_us is None:
        sys.exit(f"{record.case} by {transport.name}: {record.status}: {record.reason}")
    doubtful.update(f"{record.case} by {transport.name}: {note}" for note in record.notes)
    return record.time_us.p50


class Report:
    """Lines that rank 0 prints and stores for a file."""

    def __init__(self, rank: int) -> None:
        """Start empty."""
        self.rank, self.lines = rank, list[str]()
        self.aims, self.missed = 0, list[str]()

    def aim(self, what: str, met: bool) -> None:
        """Count a target, and store it if it was missed."""
        self.aims += 1
        self.missed += [] if met else [what]

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(text, flush=True)
            self.lines.append(text)


def in_turns(sides: list[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Each side's results by round. The order changes, because later sides find other memory."""
    found: list[list[float]] = [[] for _ in sides]
    for first in range(rounds):
        for k in range(len(sides)):
            side = (first + k) % len(sides)
            found[side].append(sides[side]())
    return found


def compared(
    bare: Bare, transports: list[Any], topology: Topology, op: str, nbytes: int, rounds: int
) -> list[list[float]]:
    """Microseconds of the bare graph, of each transport, and of the bare graph again."""

    def bare_us() -> float:
        bare.enter()
        return bare.graph_us(op, nbytes)

    mine = [partial(product_us, transport, topology, op, nbytes, Timing.GRAPH) for transport in transports]
    return in_turns([bare_us, *mine, bare_us], rounds)


def ratio(one: list[float], other: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def graphs(report: Report, bare: Bare, transports: list[Any], topology: Topology) -> None:
    """The graph regime against the bare graph, for every size."""
    report.say(
        "| all_reduce, B | bare graph (us) | torch (us) | CuPy (us) | torch/bare | CuPy/bare | torch/CuPy | bare/bare |"
        "\n|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for nbytes in GRAPH_SIZES:
        found = compared(bare, transports, topology, "all_reduce", nbytes, ROUNDS)
        if report.rank:
            continue
        once, by_torch, by_cupy, again = found
        b, t, c = (statistics.median(side) for side in (once, by_torch, by_cupy))
        ratios = [ratio(by_torch, once), ratio(by_cupy, once), ratio(by_torch, by_cupy)]
        shown = " | ".join(f"{one:.3f}" for one in (*ratios, ratio(again, once)))
        report.say(f"| {nbytes} | {b:.2f} | {t:.2f} | {c:.2f} | {shown} |")
        report.aim(f"{nbytes} B in graphs within {ALIKE:.0%}", all(abs(one - 1) <= ALIKE for one in ratios))
        if nbytes == GRAPH_SIZES[0]:
            report.aim(f"{nbytes} B in graphs under {SMALLEST_US} us", max(t, c) < SMALLEST_US)


def repetitions(report: Report, transports: list[Any], topology: Topology) -> None:
    """The isolated regime at 8 bytes, five times per transport."""
    report.say("\n| isolated, all_reduce of 8 B | five p50 (us) | median | spread |\n|---|---|---:|---:|")
    for transport in transports:
        five = [product_us(transport, topology, "all_reduce", 8, Timing.ISOLATED, 400) for _ in range(5)]
        if report.rank:
            continue
        middle = statistics.median(five)
        spread, shown = (max(five) - min(five)) / middle, ", ".join(f"{x:.2f}" for x in five)
        report.say(f"| {transport.name} | {shown} | {middle:.2f} | {spread:.1%} |")
        report.aim(f"isolated by {transport.name} under {ISOLATED_US} us", middle < ISOLATED_US)
        report.aim(f"five repetitions by {transport.name} within {SPREAD:.0%}", spread < SPREAD)


def large(report: Report, bare: Bare, transports: list[Any], topology: Topology) -> None:
    """1 GiB of every large op, per transport and bare."""
    report.say(
        "\n| 1 GiB in graphs | bare busbw (GB/s) | torch | CuPy | torch/bare | CuPy/bare | bare/bare |"
        "\n|---|---:|---:|---:|---:|---:|---:|"
    )
    for op in LARGE_OPS:
        found = compared(bare, transports, topology, op, 1 << 30, LARGE_ROUNDS)
        if report.rank:
            continue
        once, by_torch, by_cupy, again = found
        middles = (statistics.median(side) / 1e6 for side in (once, by_torch, by_cupy))
        b, t, c = (bus_gb_per_s(op, bare.world_size, 1 << 30, seconds) or 0.0 for seconds in middles)
        ratios = [ratio(once, by_torch), ratio(once, by_cupy)]
        shown = " | ".join(f"{one:.3f}" for one in (*ratios, ratio(once, again)))
        report.say(f"| {op} | {b:.1f} | {t:.1f} | {c:.1f} | {shown} |")
        report.aim(f"1 GiB of {op} within {ALIKE_LARGE:.0%}", all(abs(one - 1) <= ALIKE_LARGE for one in ratios))


def main() -> None:
    """Measure everything; rank 0 prints."""
    launched = detect(os.environ)
    assert launched is not None, "start this with torchrun"
    log = NcclLog.switch_on()
    by_nccl = open_transport("nccl", launched, 60.0)
    by_cupy_nccl = CupyNcclTransport(capabilities_of("cupy_nccl"), launched, by_nccl, log)
    topology, bare, report = Topology.single_node(launched.world_size), Bare(by_cupy_nccl), Report(launched.rank)
    transports: list[Any] = [by_nccl, by_cupy_nccl]
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    versions = f"{by_nccl.describe()}, cupy {cupy.__version__}"
    told = ", ".join(f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("NCCL_"))
    report.say(f"{datetime.date.today()}, {launched.world_size} x {name}, {versions}; {told}\n")
    if by_nccl.ranks_per_gpu > 1:
        report.say("Ranks share a GPU: this tests the script and is no result of a fabric.\n")
    graphs(report, bare, transports, topology)
    repetitions(report, transports, topology)
    large(report, bare, transports, topology)
    met, missed = report.aims - len(report.missed), "; ".join(report.missed) or "none"
    for note in sorted(doubtful):
        report.say(f"- {note}")
    report.say(f"\n{met} of {report.aims} targets met. Missed: {missed}.")
    if launched.rank == 0 and len(sys.argv) > 1:
        Path(sys.argv[1], "gpu_timing.md").write_text("\n".join(report.lines) + "\n")
    for transport in reversed(transports):
        transport.stream.make_current()
        transport.stream.synchronize()
    by_nccl.close()


if __name__ == "__main__":
    main()
