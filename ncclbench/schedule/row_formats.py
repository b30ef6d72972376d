"""Formats of a token's row in messages, with encoding and decoding: bf16, FP8, MXFP8, NVFP4.

Quantised rows are sent as bytes. A row is its payload and then its scales, or the two are sent in separate messages.
Everything here works on NumPy and on CuPy arrays alike: lookup tables are passed in on the device of the rows.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import UsageError
from ncclbench.schedule.dtypes import Array

Bytes = NDArray[np.uint8]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E8M0 = np.concatenate([np.ldexp(np.float32(1), np.arange(-127, 128)), [np.float32("nan")]]).astype(np.float32)
# Codes of the whole numbers 0 to 4, which every format can represent.
_FP8_OF = np.arange(5).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
_E2M1_OF = np.array([_E2M1.index(n) for n in range(5)], np.uint8)
_LARGEST_CODE = 4


@dataclass(frozen=True)
class RowFormat:
    """A format of rows.

    Attributes:
        name: as in a parameter and in records.
        bits: bits per element.
        block: elements that share a scale; 0 without scales.
        scale_bytes_each: bytes per scale.
        source: definition of the format.
    """

    name: str
    bits: int
    block: int
    scale_bytes_each: int
    source: str

    def payload_bytes(self, hidden: int) -> int:
        """Bytes of the elements of a row."""
        return hidden * self.bits // 8

    def blocks(self, hidden: int) -> int:
        """Number of scales per row."""
        return -(-hidden // self.block) if self.block else 0

    def scale_bytes(self, hidden: int) -> int:
        """Bytes of the scales of a row."""
        return self.blocks(hidden) * self.scale_bytes_each

    def row_bytes(self, hidden: int) -> int:
        """Bytes of the elements and scales of a row."""
        return self.payload_bytes(hidden) + self.scale_bytes(hidden)

    def encode(self, codes: Bytes, exponents: Bytes) -> tuple[Bytes, Bytes]:
        """Payload and scales of the rows `codes` x 2**exponents: small whole numbers (n, H), exponents (n, blocks)."""
        if self.name == "bf16":
            payload = (codes.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
            return payload.view(np.uint8), np.zeros((len(codes), 0), np.uint8)
        if self.name == "nvfp4":
            code = _E2M1_OF[codes]
            payload4 = code[:, 0::2] | code[:, 1::2] << np.uint8(4)  # the even element in the low half
            return payload4, np.ldexp(1.0, exponents).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        if self.name == "mxfp8":
            return _FP8_OF[codes], exponents + np.uint8(127)
        return _FP8_OF[codes], np.ldexp(np.float32(1), exponents).astype("<f4").view(np.uint8)

    def tables(self) -> tuple[Array, Array]:
        """Lookup tables of elements and of scales; empty if their bits are numbers already."""
        none = np.zeros(0, np.float32)
        if self.name == "bf16":
            return none, none
        if self.name == "nvfp4":
            return np.array([*_E2M1, *(-x for x in _E2M1)], np.float32), _E4M3
        return _E4M3, _E8M0 if self.name == "mxfp8" else none

    def decode(self, payload: Array, scales: Array | None, hidden: int, tables: tuple[Array, Array]) -> Array:
        """Rows as float32, shape (n, H); arguments are byte arrays of shape (n, bytes), on the host or a device."""
        elements, factors = tables
        number = len(payload)
        if self.name == "bf16":
            return bf16_to_float(payload.view(np.uint16))
        values = elements[_interleaved(payload, hidden) if self.name == "nvfp4" else payload]
        assert scales is not None
        # A copy, since the scales of a packed row may not be aligned.
        each = scales.copy().view(np.float32) if not len(factors) else factors[scales]
        whole = hidden // self.block * self.block
        body = values[:, :whole].reshape(number, -1, self.block)
        body *= each[:, : whole // self.block, None]
        if whole < hidden:
            values[:, whole:] *= each[:, -1:]
        return values


def _interleaved(packed: Array, hidden: int) -> Array:
    """Codes of four bits, one per byte: the low half of each byte first."""
    halves = packed.repeat(2, axis=1)
    halves[:, 1::2] >>= np.uint8(4)
    return halves[:, :hidden] & np.uint8(15)


def bf16_to_float(bits: Array) -> Array:
    """bfloat16 as float32: the upper half of its bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(values: Array) -> Array:
    """float32 as the bits of the nearest bfloat16, ties to even; NaN is not supported."""
    bits = values.view(np.uint32)
    rounded = bits + ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    return (rounded >> np.uint32(16)).astype(np.uint16)


FORMATS = {
    one.name: one
    for one in (
        RowFormat("bf16", 16, 0, 0, "upper half of IEEE float32"),
        RowFormat("fp8", 8, 128, 4, "DeepSeek-V3, arXiv 2412.19437, section 3.3: e4m3, an fp32 scale per 128"),
        RowFormat("mxfp8", 8, 32, 1, "OCP Microscaling Formats 1.0: e4m3, an e8m0 scale per 32"),
        RowFormat("nvfp4", 4, 16, 1, "NVIDIA NVFP4: e2m1, an e4m3 scale per 16"),
    )
}


def format_of(name: str) -> RowFormat:
    """The format called `name`.

    Raises:
        UsageError: if there is none, naming the known ones.
    """
    if name not in FORMATS:
        raise UsageError(f"no row format {name!r}; there are: {', '.join(FORMATS)}")
    return FORMATS[name]


def largest_code(limit: int, format: RowFormat) -> int:
    """The largest code such that code x scale is at most `limit`; scales, if there are any, are 1 and 2."""
    return min(limit // 2, _LARGEST_CODE) if format.block else limit
