"""JSON schemas as msgspec derives them from types, alike for every version of msgspec and of Python."""

import inspect
import json
from pathlib import Path

import msgspec


def schema_of(kind: type) -> object:
    """The schema of a type."""
    return _dedented(msgspec.json.schema(kind))


def stated_schema(path: Path) -> object:
    """The schema in a file of the docs."""
    return _dedented(json.loads(path.read_text()))


def _dedented(value: object) -> object:
    """`value` with docstrings dedented, as msgspec from 0.23 and Python from 3.13 do by themselves."""
    if isinstance(value, dict):
        return {
            name: inspect.cleandoc(one) if name == "description" and isinstance(one, str) else _dedented(one)
            for name, one in value.items()
        }
    return [_dedented(one) for one in value] if isinstance(value, list) else value
