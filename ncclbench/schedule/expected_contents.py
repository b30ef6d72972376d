"""Contents of buffers that a schedule states itself, for data that the symbolic trace cannot describe.

The trace (`symbolic_trace`) works with whole segments of buffers. If millions of rows are gathered, scaled and summed,
the pattern states instead what every buffer must hold. It derives this from the meaning of the routing, not from the
index tables by which the rows are moved.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ncclbench.schedule.dtypes import Array


@dataclass(frozen=True, eq=False)
class ExpectedBytes:
    """Consecutive bytes of a buffer, and what they must hold.

    Attributes:
        start: the first byte.
        bits: bits of the elements, as an unsigned array (uint8, or uint16 for bfloat16).
        tolerance: allowed error relative to the expected value, for bfloat16; 0 if bits are compared.
    """

    start: int
    bits: Array
    tolerance: float = 0.0

    @property
    def stop(self) -> int:
        """One past the last byte."""
        return self.start + int(self.bits.nbytes)


class Contents(Protocol):
    """Expected contents of the buffers of every rank. Bytes that no `ExpectedBytes` covers hold the canary."""

    def before(self, rank: int, buffer: str, salt: int) -> Iterator[ExpectedBytes]:
        """The contents that an input is filled with; `salt` selects a set of values."""

    def after(self, rank: int, buffer: str, salt: int) -> Iterator[ExpectedBytes]:
        """The contents of any buffer after the last phase, in order and without overlap."""

    @property
    def tolerance(self) -> float:
        """The largest tolerance of any bytes."""

    @property
    def tolerance_reason(self) -> str | None:
        """Why the tolerance is not zero; None if it is."""
