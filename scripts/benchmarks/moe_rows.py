"""Row work against memory bandwidth, and MoE dispatch against a bare all-to-all.

    python scripts/benchmarks/moe_rows.py [OUT]                               one GPU
    torchrun --nproc-per-node 2 scripts/benchmarks/moe_rows.py [OUT]          two GPUs, with the all-to-all

Prints Markdown and writes it to OUT/moe_rows.md:

- pack, expert, expert_reduce and unpack of DeepSeek-V3, EP 8, 4096 tokens, in every row format. One GPU computes one
  rank of the eight. The data of the other ranks are filled in, and the output is compared with the oracle to the bit
  before timing. The bound is the time in which a plain device copy, measured in the same run, moves as many bytes. It
  is computed twice: counting every row read, and counting rows that are read several times only once.
- with two or more ranks, `dispatch` of moe_dispatch against torch's all_to_all_single of the same splits, alternating.

Launches wait behind a gate, and the L2 cache is overwritten between them.
"""

import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from ncclbench.buffers.arrays import Buffers, allocate, uploader
from ncclbench.launch.launcher_detection import detect
from ncclbench.measure.case import run_case
from ncclbench.measure.timing_device import GATE_LIMIT_SECONDS
from ncclbench.plan.plan import Settings
from ncclbench.schedule import AllToAllV, Case, RowKernel, RowWork, Schedule
from ncclbench.schedule.oracle import CANARY_BYTE
from ncclbench.schedule.pattern import build_variants
from ncclbench.schedule.phases import flatten
from ncclbench.schedule.row_formats import FORMATS
from ncclbench.schedule.row_work import ENTRY_BYTES
from ncclbench.topology import Topology
from ncclbench.transports._local_work import local_call
from ncclbench.transports.cuda.stream import CudaStream

EXPERT_PARALLEL = 8
LAYER: dict[str, Any] = {"model": "deepseek-v3", "tokens": "4096", "variant": "cached", "routings": 1}
PHASES = ("pack", "expert", "expert_reduce", "unpack")
LAUNCHES, ROUNDS = 30, 5
# Targets: pack + unpack over the bound, and dispatch over a bare all-to-all.
OVER_BOUND, DISPATCH_ALIKE = 1.5, 0.05
COPY_BYTES, FLUSH_BYTES = 1 << 30, 256 << 20


def layer_schedule(world: int, **params: Any) -> Schedule:
    """The layer over `world` ranks of one node."""
    case = Case(pattern="moe_dispatch", nbytes=64, dtype="bfloat16", params={**LAYER, **params})
    return build_variants(case, Topology.single_node(world))[0]


@dataclass(frozen=True)
class Rank:
    """One rank's buffers, filled with the oracle's expected data."""

    schedule: Schedule
    buffers: Buffers
    rank: int
    salt: int = 1

    def fill(self, name: str) -> None:
        """Fill the buffer with its content after the last phase, and the canary elsewhere."""
        assert self.schedule.contents is not None
        raw, upload = self.buffers[name].view(np.uint8), uploader("cuda")
        raw[:] = CANARY_BYTE
        for stretch in self.schedule.contents.after(self.rank, name, self.salt):
            raw[stretch.start : stretch.stop] = upload(stretch.bits.reshape(-1).view(np.uint8))

    def wrong(self, name: str) -> int:
        """Number of bytes of the buffer that differ from it."""
        assert self.schedule.contents is not None
        raw, upload, done, wrong = self.buffers[name].view(np.uint8), uploader("cuda"), 0, 0
        for stretch in self.schedule.contents.after(self.rank, name, self.salt):
            expected = upload(stretch.bits.reshape(-1).view(np.uint8))
            wrong += int(np.count_nonzero(raw[stretch.start : stretch.stop] != expected))
            wrong += int(np.count_nonzero(raw[done : stretch.start] != CANARY_BYTE))
            done = stretch.stop
        return wrong + int(np.count_nonzero(raw[done:] != CANARY_BYTE))


def bytes_moved(phase: RowWork, rank: int) -> tuple[int, int]:
    """Bytes read and written, with tables: first counting every row read, then each row once."""
    plan = phase.plan(rank)
    read = plan.index[plan.index >= 0]
    row = phase.read_row + (phase.format.scale_bytes(phase.hidden) if phase.scales else 0)
    tables = 4 * plan.index.size + 4 * len(plan.exponents) + (ENTRY_BYTES * plan.index.size if phase.weights else 0)
    fixed = tables + len(plan.index) * phase.write_row
    return fixed + len(read) * row, fixed + len(np.unique(read)) * row


class Timer:
    """Times of launches behind a gate, each with an overwritten L2 cache."""

    def __init__(self, stream: Any) -> None:
        """Launch on `stream`, which is current."""
        self.stream, self.scratch, self.opened = stream, cupy.empty(FLUSH_BYTES, np.uint8), 0

    def seconds(
        self,
        call: Callable[[], object],
        meet: Callable[[], None] | None = None,
        before: Callable[[], object] = lambda: None,
    ) -> list[float]:
        """One duration per launch. `meet` synchronizes all ranks before the gate opens; `before` is not timed."""
        for _ in range(3):
            self.scratch.fill(1)
            before()
            call()
        self.stream.synchronize()
        if meet:
            meet()
        self.stream.hold(GATE_LIMIT_SECONDS)
        marks = []
        for _ in range(LAUNCHES):
            self.scratch.fill(2)
            before()
            marks.append(self.stream.mark())
            call()
            marks.append(self.stream.mark())
        if meet:
            meet()
        self.stream.release()
        self.stream.synchronize()
        self.opened += self.stream.opened_by_itself
        return [self.stream.seconds_between(a, b) for a, b in list(pairwise(marks))[::2]]


def copy_rate(timer: Timer, stream: Any) -> float:
    """Bytes per second, read and written, of a plain device copy."""
    source, target = cupy.zeros(COPY_BYTES, np.uint8), cupy.zeros(COPY_BYTES, np.uint8)
    kind = cupy.cuda.runtime.memcpyDeviceToDevice

    def copy() -> None:
        cupy.cuda.runtime.memcpyAsync(target.data.ptr, source.data.ptr, COPY_BYTES, kind, stream.ptr)

    return 2 * COPY_BYTES / statistics.median(timer.seconds(copy))


def checked(rank: Rank, phase: RowWork) -> Callable[[], object]:
    """The compiled phase, after its output was checked."""
    for name in {phase.read, *(name for name, _ in phase.extra)}:
        rank.fill(name)
    rank.buffers[phase.write].view(np.uint8)[:] = CANARY_BYTE
    call = local_call(phase, rank.rank, rank.buffers)
    call()
    wrong = rank.wrong(phase.write)
    if wrong:
        sys.exit(f"{phase.label} of {phase.format.name} rows: {wrong} bytes are wrong")
    return call


def rows_table(say: Callable[[str], None], timer: Timer, rate: float, rank: int) -> None:
    """Every phase in every format against the copy."""
    worst = 0.0
    say("| format | phase | bytes (MB) | time (us) | bound (us) | ratio | bytes, rows once (MB) | ratio |")
    say("|---|---|---:|---:|---:|---:|---:|---:|")
    for form in FORMATS:
        schedule = layer_schedule(EXPERT_PARALLEL, format=form)
        computed = Rank(schedule, allocate(schedule, "cuda"), rank)
        totals = np.zeros(3)
        for phase in flatten(schedule.phases):
            if not isinstance(phase, RowWork) or phase.label not in PHASES:
                continue
            call = checked(computed, phase)
            seconds, (every, once) = statistics.median(timer.seconds(call)), bytes_moved(phase, rank)
            say(_line(form, phase.label, seconds, every, once, rate))
            if phase.kernel is RowKernel.TAKE or phase.label == "unpack":
                totals += (seconds, every, once)
        say(_line(form, "pack + unpack", float(totals[0]), int(totals[1]), int(totals[2]), rate))
        worst = max(worst, float(totals[0]) * rate / float(totals[1]))
    met = "yes" if worst <= OVER_BOUND else "NO"
    say(f"\nPack + unpack within {OVER_BOUND} times the bound: {met}, {worst:.2f} at most.")


def _line(form: str, label: str, seconds: float, every: int, once: int, rate: float) -> str:
    bound = every / rate
    return (
        f"| {form} | {label} | {every / 1e6:.1f} | {seconds * 1e6:.1f} | {bound * 1e6:.1f} | {seconds / bound:.2f} | "
        f"{once / 1e6:.1f} | {seconds * rate / once:.2f} |"
    )


def dispatch_table(say: Callable[[str], None], timer: Timer, transport: Any) -> None:
    """Compare ncclbench's dispatch with a bare all_to_all_single of the same splits, alternating.

    Both start with synchronized ranks and pack the same rows. Ranks with fewer rows finish earlier and wait inside the
    timed section.
    """
    import torch
    import torch.distributed as dist

    world, me = transport.world_size, transport.rank
    schedule = layer_schedule(world)
    (phase,) = (p for p in flatten(schedule.phases) if isinstance(p, AllToAllV) and p.label == "dispatch")
    (packing,) = (p for p in flatten(schedule.phases) if isinstance(p, RowWork) and p.label == "pack")
    pack = checked(Rank(schedule, allocate(schedule, "cuda"), me), packing)

    def before() -> None:
        transport.stream.device_barrier()
        pack()

    sent, received = (split // phase.row_bytes for split in phase.splits(0, me))
    send, recv = (
        torch.zeros((int(rows.sum()), phase.row_bytes), dtype=torch.uint8, device="cuda") for rows in (sent, received)
    )

    send.random_(0, 255)

    def bare() -> None:
        dist.all_to_all_single(recv, send, received.tolist(), sent.tolist())

    def bare_us() -> float:
        everyone = transport.control.gather(np.array(timer.seconds(bare, transport.barrier, before)))
        return float(np.median(everyone.max(axis=0))) * 1e6 if everyone is not None else 0.0

    say(f"\n| dispatch over {world} GPUs, bf16 | p50 (us) | over bare |\n|---|---:|---:|")
    rounds = [
        (bare_us(), *(product_us(transport, variant) for variant in ("cached", "control"))) for _ in range(ROUNDS)
    ]
    for place, name in enumerate(("bare all_to_all_single", "moe_dispatch, variant=cached", "variant=control")):
        middle = statistics.median(row[place] for row in rounds)
        ratio = statistics.median(row[place] / row[0] for row in rounds) if me == 0 else 0.0
        say(f"| {name} | {middle:.1f} | {ratio:.3f} |")
        if place == 1:
            verdict = f"within {DISPATCH_ALIKE:.0%}: {'yes' if abs(ratio - 1) <= DISPATCH_ALIKE else 'NO'}"
    say(f"\nDispatch {verdict}.")


def product_us(transport: Any, variant: str) -> float:
    """The p50 of moe_dispatch's dispatch phase in microseconds, checked; 0 on ranks other than 0."""
    params = {**LAYER, "variant": variant}
    case = Case(pattern="moe_dispatch", nbytes=64, dtype="bfloat16", params=params)
    measured = run_case(case, transport, Topology.single_node(transport.world_size), Settings(iterations=2 * LAUNCHES))
    if measured is None:
        return 0.0
    if measured.record.status != "ok":
        sys.exit(f"moe_dispatch, variant={variant}: {measured.record.status}: {measured.record.reason}")
    return next(p.time_us.p50 for p in measured.record.phases if p.label == "dispatch" and p.time_us)


def main() -> None:
    """Measure everything; rank 0 prints."""
    began, launched, lines, transport = time.monotonic(), detect(os.environ), list[str](), None
    if launched is not None and launched.world_size > 1:
        from ncclbench.transports.nccl import open_transport

        transport = open_transport("nccl", launched, 60.0)
    rank, world = (transport.rank, transport.world_size) if transport else (0, 1)

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)
            lines.append(text)

    own = cupy.cuda.get_current_stream() if transport else cupy.cuda.Stream(non_blocking=True)
    own.use()
    timer = Timer(transport.stream if transport else CudaStream(own))
    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())["name"].decode()
    runtime = cupy.cuda.runtime.runtimeGetVersion()
    say(f"{datetime.date.today()}, {name}, a world of {world}, CuPy {cupy.__version__}, CUDA {runtime}\n")
    if transport and transport.ranks_per_gpu > 1:
        say("Ranks share a GPU: this tests the script and is no result of a fabric.\n")
    rate = copy_rate(timer, own)
    say(f"A device copy of 1 GiB reads and writes {rate / 1e12:.2f} TB/s. Rank {rank % EXPERT_PARALLEL} of EP 8, "
        "DeepSeek-V3, 4096 tokens, hidden 7168; correct to the bit.\n")  # fmt: skip
    rows_table(say, timer, rate, rank % EXPERT_PARALLEL)
    if transport:
        dispatch_table(say, timer, transport)
    else:
        say("\nNo all-to-all was measured: a world of 1 has no link. Start it with torchrun on two GPUs.")
    opened = f"{timer.opened} gates opened by themselves" if timer.opened else "no gate opened by itself"
    say(f"\nTook {time.monotonic() - began:.0f} s; {opened}.")
    if rank == 0 and len(sys.argv) > 1:
        Path(sys.argv[1], "moe_rows.md").write_text("\n".join(lines) + "\n")
    if transport:
        transport.close()


if __name__ == "__main__":
    main()
