"""Parameters that only the whole suite tries; `scripts/test --fast` leaves them out."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def exhaustive_if(is_exhaustive: Callable[[Any], bool], values: Iterable[Any]) -> list[Any]:
    """The values, with the marker `exhaustive` on those for which the predicate is true."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.exhaustive)
        if is_exhaustive(value)
        else value
        for value in values
    ]
