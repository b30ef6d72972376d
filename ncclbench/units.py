"""Sizes, rates and durations: parsing and formatting.

The sizes 1K, 1M and 1G are powers of two, as in nccl-tests. GB in a rate is 1e9 bytes.
"""

import re
from fractions import Fraction
from typing import Annotated

import msgspec

from ncclbench.errors import UsageError

# The range of a 64-bit column. Readers of stored files refuse numbers outside of it.
Int64 = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]

_SUFFIX = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_PLURALS = {"entry": "entries", "leaf": "leaves"}
_SIZE = re.compile(r"(\d{1,40}(?:\.\d{1,40})?)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)


def parse_size(text: str | int, name: str = "size") -> int:
    """Parse a size in bytes, such as ``8``, ``"1K"``, ``"1.5M"`` or ``"64MiB"``.

    Args:
        text: a whole number of bytes, or a number with one of the suffixes K, M, G, T (powers of two).
        name: the name of the value in errors, such as ``--min-bytes``.

    Raises:
        UsageError: if it is not a size, is not positive, or is not a whole number of bytes.
    """
    match = _SIZE.fullmatch(str(text).strip())
    if isinstance(text, bool) or match is None:
        raise UsageError(f"{name} must be a positive size such as 8, 1K or 64M; got {text!r}")
    number, suffix = match.groups()
    scale = _SUFFIX[suffix.upper()]
    exact = Fraction(number) * scale
    if exact.denominator != 1:
        raise UsageError(f"{name} must be a whole number of bytes; {text!r} is {float(exact)} bytes")
    if exact <= 0:
        raise UsageError(f"{name} must be a positive size such as 8, 1K or 64M; got {text!r}")
    if exact >= 1 << 62:
        raise UsageError(f"{name} is larger than any memory: {text!r}")
    return int(exact)


def counted(number: int | None, what: str) -> str:
    """A count with its noun: ``1 rank``, ``2 ranks``, ``3 entries``; ``? ranks`` if the count is unknown."""
    ending = _PLURALS.get(what.rpartition(" ")[2])
    several = what + "s" if ending is None else what.removesuffix(what.rpartition(" ")[2]) + ending
    return f"{'?' if number is None else number} {what if number == 1 else several}"


def format_size(nbytes: float) -> str:
    """Format a size exactly: ``1K``, ``64M``, or the plain number if no suffix is exact.

    >>> format_size(1024), format_size(1000), format_size(3 << 20)
    ('1K', '1000', '3M')
    """
    whole = int(nbytes)
    for suffix in "TGMK":
        if whole and whole % _SUFFIX[suffix] == 0:
            return f"{whole // _SUFFIX[suffix]}{suffix}"
    return str(whole)


def format_bytes(nbytes: float) -> str:
    """Format a size, rounded, with a binary unit: ``1.5 MiB``."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        shown = round(value, 0 if unit == "B" else 1)
        if shown < 1024:  # compare the rounded value: 1023.99 KiB is 1.0 MiB
            return f"{shown:.0f} {unit}" if unit == "B" else f"{shown:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """Format a duration: ``0.4 s``, ``12 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
