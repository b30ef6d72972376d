"""What a schedule itself says of its buffers: the seam for data that the symbolic trace cannot describe.

The trace (`trace.py`) knows what a phase writes from whole stretches of other buffers. Where millions of rows are
gathered, scaled and summed by weight, the pattern states instead what every buffer must hold, from what the routing
means, not from the index tables by which the rows are moved.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ncclbench.schedule.dtypes import Array


@dataclass(frozen=True, eq=False)
class ExpectedBytes:
    """Consecutive bytes of a buffer.

    Attributes:
        start: the first byte.
        expected: what is there, an unsigned array of the bits of its elements (uint8, or uint16 for bfloat16).
        tolerance: allowed error relative to the expected value, for bfloat16; 0 where bits are compared.
    """

    start: int
    expected: Array
    tolerance: float = 0.0

    @property
    def stop(self) -> int:
        """One past the last byte."""
        return self.start + int(self.expected.nbytes)


class Contents(Protocol):
    """What the buffers of every rank hold. Bytes that no stretch covers hold the canary."""

    def before(self, rank: int, buffer: str, salt: int) -> Iterator[ExpectedBytes]:
        """What an input is filled with; `salt` chooses a set of values."""

    def after(self, rank: int, buffer: str, salt: int) -> Iterator[ExpectedBytes]:
        """What a buffer, input or not, must hold after the last phase; in order and without overlap."""

    @property
    def tolerance(self) -> float:
        """The largest tolerance of any stretch."""

    @property
    def why(self) -> str | None:
        """Why it is not zero."""
