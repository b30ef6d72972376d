"""Requests as plain data: type checks for requests that a caller built, and JSON for other processes.

In JSON a path is text. The JSON is ASCII, so that no launcher or locale changes it.
"""

import json
from pathlib import Path
from typing import TypeVar

import msgspec

from ncclbench.errors import UsageError

R = TypeVar("R", bound=msgspec.Struct)


def request_json(request: msgspec.Struct) -> str:
    """The request as JSON in one compact line, without fields that have their defaults."""
    return json.dumps(msgspec.to_builtins(request, enc_hook=_plain), separators=(",", ":"))


def request_from_json(text: str, kind: type[R]) -> R:
    """Parse a request.

    Raises:
        UsageError: if `text` is not JSON, or not a request of this kind.
    """
    try:
        return msgspec.convert(json.loads(text), kind, dec_hook=_typed)
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"--request is not a request of this version of ncclbench: {error}") from None


def checked(request: R) -> R:
    """Check the type of every field; text is converted for a field that is declared as a path.

    Raises:
        UsageError: naming the field that has another type.
    """
    kind = type(request)
    try:
        return msgspec.convert(msgspec.to_builtins(request, enc_hook=_plain), kind, dec_hook=_typed)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{kind.__name__}: {error}") from None


def _plain(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} cannot be part of a request")


def _typed(kind: type[object], value: object) -> Path:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"{value!r} is not a {kind.__name__}")
