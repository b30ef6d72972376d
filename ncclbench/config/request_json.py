"""Requests as plain data: checked when a caller has built one, and as JSON for other processes.

Paths are text in JSON. All of it is ASCII, so that no launcher and no locale changes it on its way.
"""

import json
from pathlib import Path
from typing import TypeVar

import msgspec

from ncclbench.errors import UsageError

R = TypeVar("R", bound=msgspec.Struct)


def request_json(request: msgspec.Struct) -> str:
    """The request in one compact line; fields that have their defaults are left out."""
    return json.dumps(msgspec.to_builtins(request, enc_hook=_plain), separators=(",", ":"))


def request_from_json(text: str, kind: type[R]) -> R:
    """The request again.

    Raises:
        UsageError: if `text` is no JSON, or not of this kind of request.
    """
    try:
        return msgspec.convert(json.loads(text), kind, dec_hook=_typed)
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"--request is not a request of this version of ncclbench: {error}") from None


def checked(request: R) -> R:
    """The request with every field of its declared type; text becomes a path where a path is declared.

    Raises:
        UsageError: naming the field that is of another type.
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
    raise TypeError(f"{value!r} is no {kind.__name__}")
