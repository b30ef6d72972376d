"""Random numbers that depend on a counter alone: the same on every rank, machine and version of NumPy.

They are SplitMix64 over (key, counter). The logarithm uses additions, multiplications and divisions only, which are
rounded correctly on every machine. A library's `log` is not, and one differing bit would route a token elsewhere.
"""

from decimal import Context, Decimal
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Bits = NDArray[np.uint64]
Floats = NDArray[np.float64]

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1
_LN2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476
_POWERS = Context(prec=28)


def mix(numbers: Bits) -> Bits:
    """SplitMix64's finalizer: a well-mixed number for each number, the same on every machine."""
    z = numbers.copy()
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


@lru_cache(maxsize=1024)
def key_of(*parts: int) -> int:
    """One 64-bit key from several numbers, in order."""
    key = 0
    for part in parts:
        key = int(mix(np.array([(key * _GOLDEN + part + 1) & _WORD], np.uint64))[0])
    return key


def bits(key: int, counters: ArrayLike) -> Bits:
    """64 random bits for each counter."""
    numbers = np.asarray(counters).astype(np.uint64)
    return mix(numbers * np.uint64(_GOLDEN) + np.uint64(key))


def below(random: Bits, limit: int) -> NDArray[np.int64]:
    """A number from 0 to limit - 1 for each; the bias of the multiplication is under 2**-32 x limit."""
    return ((random >> np.uint64(32)) * np.uint64(limit) >> np.uint64(32)).astype(np.int64)


def unit(random: Bits) -> Floats:
    """A number in (0, 1] for each."""
    return np.asarray(((random >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53)


def exponential(random: Bits) -> Floats:
    """A sample of the exponential distribution for each: -ln(u), to about 1e-12, the same bits on every machine.

    With u = m 2^e and m in [sqrt(1/2), sqrt(2)), ln m = 2 (s + s^3/3 + s^5/5 + ...) where s = (m - 1) / (m + 1).
    """
    mantissa, exponent = np.frexp(unit(random))
    low = mantissa < _SQRT_HALF
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    powers = exponent - low
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = np.full_like(s, 1.0 / 13.0)
    for odd in (11.0, 9.0, 7.0, 5.0, 3.0, 1.0):
        series = series * square + 1.0 / odd
    return np.asarray(-(powers * _LN2 + 2.0 * s * series))


def zipf_weights(number: int, alpha: float) -> Floats:
    """1, 2**-alpha, 3**-alpha, ...: shape (number,), computed in decimal so that all machines round alike."""
    exponent = Decimal(repr(-alpha))
    return np.array([float(_POWERS.power(Decimal(i), exponent)) for i in range(1, number + 1)])
