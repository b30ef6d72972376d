"""The timing loops for a device with streams: gated iterations, and graphs.

Both return durations by the device's own clock, shape (samples, columns), like the loops of `timing_host`.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from ncclbench.analysis.summary import Floats
from ncclbench.measure.timing_host import Loop, quiet_gc
from ncclbench.schedule.phases import Collective, Op
from ncclbench.schedule.schedule import Schedule
from ncclbench.transports.base import Call, DeviceStream, nothing

# A stream's queue holds about a thousand launches. With more, enqueuing waits for the gate, which waits for enqueuing.
LAUNCH_BUDGET = 500
# Launches of the device barrier: one operation of NCCL, with its events.
_BARRIER_LAUNCHES = 4
# No rank completes one of these before all ranks have begun it.
_SYNCHRONIZING = frozenset({Op.ALL_REDUCE, Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.ALL_TO_ALL})
# The gate opens by itself after this time, so that no kernel spins forever if a peer died.
GATE_LIMIT_SECONDS = 10.0
# Graph replays between two synchronisations.
_REPLAYS = 20


def graph_launches(nbytes: int) -> int:
    """Launches in one graph: many if launches are short, so that the graph's own overhead per launch is small."""
    if nbytes <= 1 << 20:
        return 50
    return 20 if nbytes <= 16 << 20 else 4


def starts_together(variants: Sequence[Schedule]) -> bool:
    """Whether ranks that run `variants` back to back begin each iteration together without a barrier.

    They do not if a rank's partners change, if data flow in one direction, or if a rank takes no part in a phase. Such
    a rank begins its next iteration while others are still in this one, and its wait for them would be timed. One slow
    NIC would then slow down all ranks that communicate with its rank a round later.
    """
    if len(variants) > 1 or len(variants[0].phases) > 1:
        return False
    phase = variants[0].phases[0]
    return isinstance(phase, Collective) and phase.op in _SYNCHRONIZING


def gated(loop: Loop, samples: int) -> Floats:
    """Time every iteration between two events, all enqueued behind a gate that opens when every rank is ready.

    With `loop.device_barrier`, a small operation of all ranks runs before each iteration, outside its events.
    """
    stream = _stream(loop)
    queued = max(sum(step.launches + 1 for step in program.steps) for program in loop.programs)
    chunk = max(1, LAUNCH_BUDGET // (queued + 1 + loop.device_barrier * _BARRIER_LAUNCHES))
    seconds = np.empty((samples, len(loop.columns)))
    with quiet_gc():
        for first in range(0, samples, chunk):
            seconds[first : first + chunk] = _gated_chunk(loop, stream, first, min(chunk, samples - first))
    return seconds


def _gated_chunk(loop: Loop, stream: DeviceStream, first: int, count: int) -> Floats:
    loop.refill()
    device_barrier: Call = stream.device_barrier if loop.device_barrier else nothing
    device_barrier()  # makes missing connections, which must not happen behind a gate
    stream.synchronize()
    loop.step(first)
    loop.barrier()
    stream.hold(GATE_LIMIT_SECONDS)
    marks, late, parts = [], [], loop.parts
    for i in range(first, first + count):
        device_barrier()
        row = [stream.mark()]
        for k, step in enumerate(loop.program_of(i).steps):
            step.launch()
            row.append(stream.mark())
            if k in parts[i % len(parts)]:
                columns, part_seconds = parts[i % len(parts)][k]
                late.append((i - first, columns, part_seconds()))
        marks.append(row)
    loop.barrier()  # no gate opens before all ranks have enqueued everything
    stream.release()
    stream.synchronize()
    loop.step(first + count)
    if stream.opened_by_itself:
        loop.remarks.add(f"a gate opened by itself after {GATE_LIMIT_SECONDS:g} s: launch costs may be in the figures")
    seconds, step_columns = np.full((count, len(loop.columns)), np.nan), loop.step_columns
    for i, row in enumerate(marks):
        seconds[i, 0] = stream.seconds_between(row[0], row[-1])
        for column, (a, b) in zip(step_columns[(first + i) % len(step_columns)], pairwise(row), strict=False):
            seconds[i, column] = stream.seconds_between(a, b)
    for i, columns, seconds_of_parts in late:
        seconds[i, columns] = seconds_of_parts()
    return seconds


def captured(loop: Loop, launches: int) -> Callable[[int], Floats]:
    """Capture `launches` iterations in a graph; returns the loop that times replays. One sample is one replay."""
    stream = _stream(loop)
    loop.refill()
    stream.synchronize()
    calls = [step.launch for i in range(launches) for step in loop.program_of(i).steps]
    replay = stream.capture(calls)
    loop.barrier()  # instantiation makes missing connections, so all ranks must be done before the first replay
    for _ in range(2):
        replay()
    stream.synchronize()

    def measure(samples: int) -> Floats:
        seconds = np.empty((samples, 1))
        with quiet_gc():
            for first in range(0, samples, _REPLAYS):
                count = min(_REPLAYS, samples - first)
                loop.refill()
                stream.synchronize()
                loop.step(first)
                loop.barrier()
                marks = [stream.mark()]
                for _ in range(count):
                    replay()
                    marks.append(stream.mark())
                stream.synchronize()
                loop.step(first + count)
                pairs = pairwise(marks)
                seconds[first : first + count, 0] = [stream.seconds_between(a, b) / launches for a, b in pairs]
        return seconds

    return measure


def _stream(loop: Loop) -> DeviceStream:
    assert loop.stream is not None, "a device regime on a host transport"
    return loop.stream
