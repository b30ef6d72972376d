"""How a token's row is laid out on the wire, and what it is decoded to: bf16, FP8, MXFP8, NVFP4.

Quantised rows travel as bytes. A row is its payload and then its scales, or the two go in messages of their own.
Everything here works on NumPy and on CuPy arrays alike: looked-up tables are passed in where the rows are.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import UsageError
from ncclbench.schedule.dtypes import Array

Bytes = NDArray[np.uint8]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E8M0 = np.concatenate([np.ldexp(np.float32(1), np.arange(-127, 128)), [np.float32("nan")]]).astype(np.float32)
# Whole numbers as codes: 0 to 4, which every format has.
_FP8_OF = np.arange(5).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
_E2M1_OF = np.array([_E2M1.index(n) for n in range(5)], np.uint8)
_LARGEST_CODE = 4


@dataclass(frozen=True)
class RowFormat:
    """A layout of rows.

    Attributes:
        name: as in a parameter and in records.
        bits: of an element.
        block: elements that share a scale; 0 without scales.
        scale_bytes_each: bytes of a scale.
        source: where the layout is defined.
    """

    name: str
    bits: int
    block: int
    scale_bytes_each: int
    source: str

    def payload_bytes(self, hidden: int) -> int:
        """Bytes of a row's elements."""
        return hidden * self.bits // 8

    def blocks(self, hidden: int) -> int:
        """Scales of a row."""
        return -(-hidden // self.block) if self.block else 0

    def scale_bytes(self, hidden: int) -> int:
        """Bytes of a row's scales."""
        return self.blocks(hidden) * self.scale_bytes_each

    def row_bytes(self, hidden: int) -> int:
        """Bytes of both."""
        return self.payload_bytes(hidden) + self.scale_bytes(hidden)

    def encode(self, codes: Bytes, exponents: Bytes) -> tuple[Bytes, Bytes]:
        """Payload and scales of rows of `codes` x 2**exponents: small whole numbers (n, H), exponents (n, blocks)."""
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
        """What elements and scales are looked up in; empty where they are numbers as they are."""
        none = np.zeros(0, np.float32)
        if self.name == "bf16":
            return none, none
        if self.name == "nvfp4":
            return np.array([*_E2M1, *(-x for x in _E2M1)], np.float32), _E4M3
        return _E4M3, _E8M0 if self.name == "mxfp8" else none

    def decode(self, payload: Any, scales: Any, hidden: int, tables: tuple[Any, Any]) -> Any:
        """Rows as float32, shape (n, H); arguments are byte arrays of shape (n, bytes), on the host or a device."""
        elements, factors = tables
        number = len(payload)
        if self.name == "bf16":
            return bf16_to_float(payload.view(np.uint16))
        values = elements[_interleaved(payload, hidden) if self.name == "nvfp4" else payload]
        # A copy, since the scales of a packed row need not lie on whole words.
        each = scales.copy().view(np.float32) if not len(factors) else factors[scales]
        whole = hidden // self.block * self.block
        body = values[:, :whole].reshape(number, -1, self.block)
        body *= each[:, : whole // self.block, None]
        if whole < hidden:
            values[:, whole:] *= each[:, -1:]
        return values


def _interleaved(packed: Any, hidden: int) -> Any:
    """Codes of four bits, one a byte: the low half of each byte first."""
    halves = packed.repeat(2, axis=1)
    halves[:, 1::2] >>= np.uint8(4)
    return halves[:, :hidden] & np.uint8(15)


def bf16_to_float(bits: Any) -> Any:
    """bfloat16 as float32: the upper half of its bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(values: Any) -> Any:
    """float32 as the bits of the nearest bfloat16, ties to even; no NaN comes here."""
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
        UsageError: if there is none, naming all there are.
    """
    if name not in FORMATS:
        raise UsageError(f"no row format {name!r}; there are: {', '.join(FORMATS)}")
    return FORMATS[name]


def largest_code(limit: int, format: RowFormat) -> int:
    """The largest code such that code x scale stays within `limit`; scales are 1 and 2 where there are any."""
    return min(limit // 2, _LARGEST_CODE) if format.block else limit
