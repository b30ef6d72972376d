"""What stands in a run directory, made from plain data as a file has it."""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from ncclbench.store.manifest import Manifest

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)


def manifest_of(fields: Mapping[str, Any]) -> Manifest:
    """A manifest with these fields."""
    return msgspec.convert(dict(fields), Manifest)


def plain(data: object) -> Any:
    """The same as JSON has it, to look into."""
    return msgspec.to_builtins(data)


def known(value: T | None) -> T:
    """A value that must be there."""
    assert value is not None
    return value


def like(base: S, **fields: Any) -> S:
    """`base` with other fields."""
    return msgspec.structs.replace(base, **fields)
