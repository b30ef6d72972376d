"""Contents of the rows of an expert-parallel layer, chosen so that no sum rounds, in any order and any hierarchy.

A row is small whole numbers q times block scales of 1 or 2; an expert multiplies by 1 or 2, and a weight is 1 or 2.
With k choices the sum of a token is at most 256, up to which bfloat16 represents every whole number. The first numbers
of a row encode the hash of (salt, rank, token), so that no two rows are alike. The others are a window of one long
vector.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import Unable
from ncclbench.schedule.counter_rng import below, bits, key_of, unit
from ncclbench.schedule.dtypes import DTYPES
from ncclbench.schedule.row_formats import RowFormat, float_to_bf16, largest_code
from ncclbench.schedule.row_work import ENTRY_BYTES

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# A prime, larger than the length of a row, so that windows differ.
_PERIOD = 65521
# Elements at the start of a row that encode its hash.
_HASHED = 16
_STREAM_VECTOR, _STREAM_ROW, _STREAM_WEIGHT = range(10, 13)
# Largest product of an expert's factor and a weight.
_LARGEST_PRODUCT = 4


@dataclass(frozen=True)
class TokenValues:
    """The values of one pass.

    Attributes:
        hidden: elements per row.
        format: format of the rows.
        top_k: k, the largest number of terms of a sum.
        exact: weights are powers of two; otherwise any fraction, and results have a tolerance.
        salt: selects a set of values.
        backward: whether the rows are gradients; the weights are those of the tokens.
    """

    hidden: int
    format: RowFormat
    top_k: int
    exact: bool
    salt: int
    backward: bool = False

    @property
    def largest(self) -> int:
        """The largest code q of an element."""
        return _largest(self.top_k, self.format)

    def _codes(self, rank_n: Ints, tok_n: Ints) -> tuple[Bytes, Bytes]:
        """Codes (n, H) and scale exponents (n, blocks) of rows."""
        codes, exponents = _vectors(key_of(self.salt, _STREAM_VECTOR, self.backward), self.largest, self.hidden)
        random = bits(key_of(self.salt, _STREAM_ROW, self.backward), (rank_n << 40) + tok_n)
        start = below(random, _PERIOD)
        codes_nH = np.lib.stride_tricks.sliding_window_view(codes, self.hidden)[start]
        base, rest = np.uint64(self.largest + 1), random.copy()
        for column in range(min(_HASHED, self.hidden)):
            codes_nH[:, column] = rest % base
            rest //= base
        blocks = self.format.blocks(self.hidden)
        scales = np.lib.stride_tricks.sliding_window_view(exponents, blocks)[start] if blocks else codes_nH[:, :0]
        return codes_nH, scales

    def raw(self, rank_n: Ints, tok_n: Ints) -> tuple[Bytes, Bytes]:
        """Encoded payload and scales of rows; rows of rank -1 are zeros."""
        payload, scales = self.format.encode(*self._codes(rank_n, tok_n))
        payload[rank_n < 0] = 0
        scales[rank_n < 0] = 0
        return payload, scales

    def numbers(self, rank_n: Ints, tok_n: Ints) -> Floats:
        """Decoded rows, shape (n, H)."""
        codes, exponents = self._codes(rank_n, tok_n)
        values = codes.astype(np.float32)
        if self.format.block:
            values *= np.repeat(np.exp2(exponents.astype(np.float32)), self.format.block, axis=1)[:, : self.hidden]
        values[rank_n < 0] = 0
        return values

    def weighted(self, rank_n: Ints, tok_n: Ints, factor_n: Floats) -> NDArray[np.uint16]:
        """Rows times one factor each, as the bits of bfloat16, shape (n, H)."""
        return np.asarray(float_to_bf16(self.numbers(rank_n, tok_n) * factor_n.astype(np.float32)[:, None]))

    def weights(self, rank_n: Ints, tok_n: Ints) -> Floats:
        """Weight of each choice of the tokens, shape (n, k)."""
        lanes = ((rank_n << 40) + tok_n)[:, None] * 64 + np.arange(self.top_k)
        random = bits(key_of(self.salt, _STREAM_WEIGHT), lanes)
        if self.exact:
            return np.exp2((random & np.uint64(1)).astype(np.float32))
        return unit(random).astype(np.float32)

    def entries(self, rank_n: Ints, tok_n: Ints, choices_nk: Ints, slots_nS: Ints) -> Bytes:
        """Routing metadata of rows, shape (n, S x 8): expert + 1 and weight of each choice carried, or zeros."""
        there = slots_nS >= 0
        slot = np.maximum(slots_nS, 0)
        out = np.zeros((*slots_nS.shape, 2), np.int32)
        out[:, :, 0] = np.where(there, np.take_along_axis(choices_nk, slot, axis=1) + 1, 0)
        weights = np.take_along_axis(self.weights(rank_n, tok_n), slot, axis=1)
        out[:, :, 1] = np.where(there, weights, np.float32(0)).view(np.int32)
        return out.view(np.uint8).reshape(len(rank_n), slots_nS.shape[1] * ENTRY_BYTES)


def _largest(top_k: int, format: RowFormat) -> int:
    return largest_code(DTYPES["bfloat16"].exact // (_LARGEST_PRODUCT * top_k), format)


def refuse_without_values(top_k: int, format: RowFormat) -> None:
    """Refuse layers for which no exact values exist; all ranks refuse alike, also a rank without tokens.

    Raises:
        Unable: if there are so many choices that sums could not be exact.
    """
    if _largest(top_k, format) < 1:
        raise Unable(
            f"top {top_k}: no values whose sums are exact in bfloat16; up to 64 choices of bf16 rows, and 32 of "
            "others, can be checked"
        )


@lru_cache(maxsize=6)
def _vectors(key: int, largest: int, hidden: int) -> tuple[Bytes, Bytes]:
    """The long vectors of codes and scale exponents that rows are windows of."""
    random = bits(key, np.arange(_PERIOD + hidden, dtype=np.int64) % _PERIOD)
    return below(random, largest + 1).astype(np.uint8), (random & np.uint64(1)).astype(np.uint8)


def expert_exponents(experts: int) -> NDArray[np.int8]:
    """Each expert multiplies by 2 to this power, shape (E,). Neighbors differ, so that a swap is detected."""
    return (np.arange(experts) % 2).astype(np.int8)
