"""Row work with random contents, to compare implementations bit by bit."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncclbench.buffers.arrays import Buffers, allocate
from ncclbench.schedule import Case, RowKernel, RowPlan, RowWork, Schedule
from ncclbench.schedule.oracle import CANARY_BYTE
from ncclbench.schedule.pattern import build_variants
from ncclbench.schedule.phases import flatten
from ncclbench.topology import Topology
from ncclbench.transports._row_work import row_call

Bytes = NDArray[np.uint8]
Random = np.random.Generator

# Each kernel; each format with packed and separate scales; rows of whole words and others; one row per block and many.
LAYERS: list[dict[str, Any]] = [
    {"variant": "flat", "hidden": 32},
    {"variant": "flat", "hidden": 1808, "tokens": "9"},
    {"variant": "cached", "dedup": "selection", "hidden": 16},
    {"variant": "hierarchical", "placement": "2x2", "quad": True, "hidden": 48, "weights": "float"},
    *(
        {"variant": variant, "format": form, "scales": scales, "hidden": hidden}
        for form in ("fp8", "mxfp8", "nvfp4")
        for variant, scales, hidden in (
            ("padded", "packed", 176),
            ("flat", "packed", 16),
            ("flat", "separate", 176),
            ("flat", "packed", 1792),
        )
    ),
]


@dataclass(frozen=True)
class Work:
    """One phase on one rank."""

    schedule: Schedule
    phase: RowWork
    rank: int

    @property
    def plan(self) -> RowPlan:
        return self.phase.plan(self.rank)

    def filled(self, rng: Random) -> dict[str, Bytes]:
        """Buffers of random rows, with canaries in the buffer that the phase writes."""
        phase = self.phase
        buffers = {name: array.view(np.uint8) for name, array in allocate(self.schedule, "cpu").items()}
        for array in buffers.values():
            array[:] = rng.integers(0, 256, len(array), dtype=np.uint8)
        if phase.kernel is RowKernel.SUM or (phase.kernel is RowKernel.SCALE and not phase.format.block):
            _numbers(buffers[phase.read], rng)
        elif phase.kernel is RowKernel.SCALE:
            _quantised(phase, buffers, rng)
        if phase.weights:
            weights = buffers[phase.weights].view(np.float32).reshape(-1, 2)
            weights[:, 1] = rng.normal(size=len(weights))
        buffers[phase.write][:] = CANARY_BYTE
        return buffers

    def on_host(self, buffers: Buffers) -> dict[str, Bytes]:
        """The result of NumPy on copies of the buffers."""
        found = {name: array.copy() for name, array in buffers.items()}
        with np.errstate(all="ignore"):  # random numbers overflow
            row_call(self.phase, self.rank, found)()
        return found


def _numbers(raw: Bytes, rng: Random) -> None:
    """bfloat16 between 2^-63 and 2^63 of either sign, every sixteenth a denormal, and zeros of either sign."""
    bits = raw.view(np.uint16)
    sign = rng.integers(0, 2, len(bits), dtype=np.uint16) << np.uint16(15)
    exponent = rng.integers(64, 190, len(bits), dtype=np.uint16) << np.uint16(7)
    mantissa = rng.integers(0, 128, len(bits), dtype=np.uint16)
    kind = rng.integers(0, 16, len(bits))
    bits[:] = sign | np.where(kind == 0, 0, exponent) | np.where(kind == 1, 0, mantissa)
    bits[kind == 2] &= np.uint16(0x8000)


def _quantised(phase: RowWork, buffers: dict[str, Bytes], rng: Random) -> None:
    """Elements of every code that is a number, and scales from the smallest one on."""
    form, rows = phase.format, _by_rows(buffers[phase.read], phase.read_row)
    payload = rows[:, : form.payload_bytes(phase.hidden)]
    if form.name != "nvfp4":
        payload[payload & 0x7F == 0x7F] = 0x7E
    scales = rows[:, form.payload_bytes(phase.hidden) :]
    if phase.scales:
        scales = _by_rows(buffers[phase.scales], form.scale_bytes(phase.hidden))
    if form.name == "fp8":
        values = rng.normal(size=(len(scales), form.blocks(phase.hidden))) * 2.0 ** rng.integers(-20, 20)
        scales[:] = values.astype("<f4").view(np.uint8)
    elif form.name == "mxfp8":
        scales[:] = rng.choice(np.array([0, 1, 100, 127, 128, 150], np.uint8), scales.shape)
    else:
        scales[scales & 0x7F == 0x7F] = 0x01


def _by_rows(raw: Bytes, row: int) -> Bytes:
    return raw[: len(raw) // row * row].reshape(-1, row)


def works(params: dict[str, Any], ranks: int = 4) -> Iterator[Work]:
    """Every row work of a small layer, on every rank that has rows."""
    small = {"tokens": "12,0,7,3", "experts": 16, "top_k": 4, "routings": 1, "routing": "zipf:1.0", **params}
    case = Case(pattern="moe_dispatch", nbytes=64, dtype="bfloat16", params=small)
    (schedule, *_) = build_variants(case, Topology.single_node(ranks))
    for phase in flatten(schedule.phases):
        if isinstance(phase, RowWork) and phase.kernel is not RowKernel.TO_HOST:
            for rank in range(ranks):
                work = Work(schedule, phase, rank)
                if len(work.plan.index):
                    yield work
