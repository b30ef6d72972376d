"""The oracle: fills a rank's buffers, and computes what they must hold after the schedule has run.

Every element of every buffer is checked: elements that were written, elements that must not be written (the canary),
and inputs that no phase may change. Bits are compared, unless an average cannot be exact. Then `tolerance` is above
zero, and `tolerance_reason` has the reason.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import log2
from typing import assert_never

import numpy as np

from ncclbench.schedule.dtypes import DTYPES, Array, Dtype, Redop, finish_average, reducer
from ncclbench.schedule.expected_contents import Contents, ExpectedBytes
from ncclbench.schedule.input_values import Fill, Floats, Spread, reductions, refuse_blind_averages, rounding, tolerance
from ncclbench.schedule.phases import flatten
from ncclbench.schedule.schedule import Schedule
from ncclbench.schedule.symbolic_trace import InputElements, NoInput, Reduced, Segment, Term, trace

CANARY_BYTE = 0xA5

# Elements compared at a time. So the memory of a comparison does not depend on the size of the buffer, and stays within
# the reserve that the check of a case's memory leaves.
BLOCK = 1 << 20


def _on_host(bits: Array) -> Array:
    return bits


@dataclass(frozen=True, eq=False)
class Oracle:
    """The contents of one rank's buffers before and after a schedule.

    Attributes:
        schedule: the schedule that is run.
        rank: the rank of the buffers.
        salt: selects a set of values; a pass with another salt exposes data left from the pass before.
        upload: copies a vector of bits to the device of the buffers; on CPUs it does nothing.
    """

    schedule: Schedule
    rank: int
    salt: int
    upload: Callable[[Array], Array] = _on_host

    @cached_property
    def fill(self) -> Fill:
        """The input values that make this schedule exact."""
        return Fill.of(self.schedule, self.salt)

    @cached_property
    def tolerance(self) -> float:
        """Allowed error relative to an expected value; 0 if all comparisons are of bits."""
        if self.schedule.contents is not None:
            return self.schedule.contents.tolerance
        return tolerance(self.schedule.dtype, reductions(flatten(self.schedule.phases)), self.fill.terms)

    @cached_property
    def tolerance_reason(self) -> str | None:
        """Why the tolerance is not zero; None if it is."""
        if self.schedule.contents is not None:
            return self.schedule.contents.tolerance_reason
        rounded = rounding(self.schedule.dtype, reductions(flatten(self.schedule.phases)))
        if not rounded:
            return None
        return f"an average over {max(rounded)} ranks, not a power of two, rounds in {self.schedule.dtype.name}"

    @cached_property
    def expected(self) -> Mapping[str, list[Segment]]:
        """For every buffer, its contents after the last phase."""
        return {name: trace(self.schedule, self.rank, name) for name in self.schedule.buffers}

    def prepare(self, buffers: Mapping[str, Array]) -> None:
        """Fill the inputs, and everything else with canaries; `buffers` are typed, one-dimensional arrays."""
        if self.schedule.contents is not None:
            self._prepare_stated(self.schedule.contents, buffers)
            return
        bits = self.schedule.dtype.bits
        for name in self.schedule.buffers:
            if name in self.schedule.inputs:
                tile(buffers[name].view(bits), self._filled[name])
            else:
                buffers[name].view(np.uint8)[:] = CANARY_BYTE

    @cached_property
    def _filled(self) -> Mapping[str, Array]:
        """One period of each input, as bits on the device of the buffers."""
        names = list(self.schedule.buffers)
        inputs = self.schedule.inputs
        return {name: self._bits(self.fill.values(self.rank, names.index(name))) for name in inputs}

    def count_wrong(self, buffers: Mapping[str, Array]) -> int:
        """Number of wrong elements in this rank's buffers."""
        if self.schedule.contents is not None:
            return self._count_stated(self.schedule.contents, buffers)
        return sum(
            self._wrong_in(buffers[name][segment.start : segment.stop], segment.term)
            for name, segments in self.expected.items()
            for segment in segments
        )

    def _prepare_stated(self, contents: Contents, buffers: Mapping[str, Array]) -> None:
        for name in self.schedule.buffers:
            raw = buffers[name].view(np.uint8)
            raw[:] = CANARY_BYTE
            for expected in contents.before(self.rank, name, self.salt) if name in self.schedule.inputs else ():
                raw[expected.start : expected.stop] = self.upload(expected.bits.reshape(-1).view(np.uint8))

    def _count_stated(self, contents: Contents, buffers: Mapping[str, Array]) -> int:
        wrong = 0
        for name in self.schedule.buffers:
            raw, done = buffers[name].view(np.uint8), 0
            for expected in contents.after(self.rank, name, self.salt):
                if expected.start > done:  # on a GPU even an empty comparison takes two launches and a wait
                    wrong += _changed_canaries(raw[done : expected.start])
                wrong += self._wrong_bytes(raw[expected.start : expected.stop], expected)
                done = expected.stop
            wrong += _changed_canaries(raw[done:])
        return wrong

    def _wrong_bytes(self, raw: Array, expected: ExpectedBytes) -> int:
        bits = self.upload(expected.bits.reshape(-1))
        return _unequal(raw.view(bits.dtype), bits, expected.tolerance, DTYPES["bfloat16"])

    def _wrong_in(self, actual: Array, term: Term) -> int:
        if isinstance(term, NoInput):
            return count_overwritten(actual) if term is NoInput.CANARY else 0
        dtype = self.schedule.dtype
        allowed = self.tolerance if _is_averaged(term) else 0.0
        return count_unequal(actual.view(dtype.bits), self._bits(self._period(term)), allowed, dtype)

    def _bits(self, values: Floats) -> Array:
        dtype = self.schedule.dtype
        return self.upload(values.astype(dtype.numpy).view(dtype.bits))

    def _period(self, term: Term) -> Floats:
        """One period of a term, as exact values in float64."""
        match term:
            case InputElements():
                values = self.fill.values(term.rank, list(self.schedule.buffers).index(term.buffer))
                return np.roll(values, -(term.start % self.fill.period))
            case Reduced():
                return self._reduced_period(term)
            case NoInput():
                raise ValueError(f"{term.value} contents have no values")
            case _:
                assert_never(term)

    def _reduced_period(self, term: Reduced) -> Floats:
        fold = reducer(term.redop)
        total, *others = (self._period(inner) for inner in term.terms)
        for other in others:
            total = fold(total, other)
        if term.redop is Redop.AVG:
            whole = not self.schedule.dtype.is_float
            total = np.floor(total / len(term.terms)) if whole else finish_average(total, len(term.terms))
        return total


def _changed_canaries(raw: Array) -> int:
    return int(np.count_nonzero(raw != CANARY_BYTE))


def _is_averaged(term: Term) -> bool:
    return isinstance(term, Reduced) and (term.redop is Redop.AVG or any(map(_is_averaged, term.terms)))


def tile(target: Array, period: Array) -> None:
    """Repeat `period` over the one-dimensional `target`."""
    whole = len(target) // len(period)
    if whole:
        target[: whole * len(period)].reshape(whole, len(period))[:] = period
    rest = target[whole * len(period) :]
    rest[:] = period[: len(rest)]


def count_unequal(actual: Array, period: Array, tolerance: float, dtype: Dtype) -> int:
    """Number of elements of `actual` that differ from `period` repeated: in their bits, or by more than `tolerance`.

    Both are arrays of `dtype.bits`, both on the host or both on the device; only the count is copied to the host.
    """
    whole = len(actual) // len(period)
    body = actual[: whole * len(period)].reshape(whole, len(period))
    rest = actual[whole * len(period) :]
    rows = max(1, BLOCK // len(period))
    blocks = (body[first : first + rows] for first in range(0, whole, rows))
    wrong = sum(_unequal(block, period, tolerance, dtype) for block in blocks)
    return wrong + _unequal(rest, period[: len(rest)], tolerance, dtype)


def count_overwritten(actual: Array) -> int:
    """Number of elements of `actual` of which any byte is not the canary's."""
    raw = actual.view(np.uint8).reshape(len(actual), -1)
    blocks = (raw[first : first + BLOCK] for first in range(0, len(raw), BLOCK))
    return sum(int(np.count_nonzero(np.any(block != CANARY_BYTE, axis=1))) for block in blocks)


def _unequal(actual: Array, expected: Array, tolerance: float, dtype: Dtype) -> int:
    if not tolerance:
        return int(np.count_nonzero(actual != expected))
    want = _as_float64(expected, dtype)
    close = np.abs(_as_float64(actual, dtype) - want) <= tolerance * np.abs(want)
    return int(np.count_nonzero(~close))  # NaN is close to no number


def refuse_unverifiable(variants: Iterable[Schedule]) -> None:
    """Refuse schedules that no values can check, before anything is allocated or sent.

    Raises:
        Unable: with the reason.
    """
    for variant in variants:
        if variant.contents is None:
            refuse_blind_averages(variant)


def _as_float64(bits: Array, dtype: Dtype) -> Array:
    """Decode `bits` to float64, by types that every array library has.

    bfloat16 is the upper half of a float32, and e5m2 of a float16. The exponent of e4m3fn has one bit less than that of
    float16, so its bias is smaller by 8. Its NaN is decoded as 480, which is none of its numbers.
    """
    if dtype.name == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    if dtype.name == "float8_e5m2":
        return (bits.astype(np.uint16) << np.uint16(8)).view(np.float16).astype(np.float64)
    if dtype.name == "float8_e4m3fn":
        wide = bits.astype(np.uint16)
        half = ((wide & np.uint16(0x80)) << np.uint16(8)) | ((wide & np.uint16(0x7F)) << np.uint16(7))
        return half.view(np.float16).astype(np.float64) * 256.0
    return bits.view(dtype.numpy).astype(np.float64)


def repeats_before_overflow(schedule: Schedule) -> int:
    """Iterations that an in-place schedule can run on its own results before they exceed the type's range; at least 1.

    An in-place sum over n ranks multiplies its data by n each time. Timing loops refill after this many iterations,
    outside the timed part. A schedule that does not read its own output has no such limit.
    """
    unlimited = 1 << 30
    steps = flatten(schedule.phases)
    grown = {phase.write for phase in steps} & set(schedule.inputs)
    growing = [n for redop, n in reductions(steps) if redop in (Redop.SUM, Redop.PROD) and n > 1]
    if not grown or not growing:
        return unlimited
    fill = Fill.of(schedule, 0)
    dtype = schedule.dtype
    headroom = dtype.doublings - log2(max(2, fill.limit))
    if fill.spread is Spread.DOUBLED or Redop.PROD in {redop for redop, _ in reductions(steps)}:
        # A product over n ranks multiplies the logarithm by n.
        return max(1, int(log2(max(2, dtype.doublings)) / sum(log2(n) for n in growing)))
    return max(1, int(headroom / sum(log2(n) for n in growing)))
