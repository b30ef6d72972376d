"""Errors for invalid input: unknown names and keys, with the nearest known one, and schemas that are too new."""

import difflib
import re
from collections.abc import Iterable

from ncclbench.errors import UsageError

_BARE_KEY = re.compile(r"[\w.\[\]-]+")


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a failed look-up, with the nearest name and all names."""
    choices = [str(choice) for choice in known]
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"no {what} {name!r}; {hint}there are: {', '.join(choices) or 'none'}"


def unresolved(what: str, name: str, known: Iterable[str], most: int = 12) -> str:
    """The message for a reference in a file to a name that the file does not define.

    Args:
        what: the kind of thing, such as ``leaf``.
        name: the name that was referred to.
        known: the names that the file defines.
        most: how many names the message lists.
    """
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{what} {name!r}, which is not in the file; {hint}there are: {listed(choices, most) or 'none'}"


def listed(names: Iterable[str], most: int = 12) -> str:
    """The first `most` names, joined by commas, and the number of the rest."""
    choices = list(names)
    return ", ".join(choices[:most]) + (f" and {len(choices) - most} more" if len(choices) > most else "")


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str, path: str = "") -> None:
    """Refuse the first key that is not known.

    Args:
        names: the keys that were given.
        known: the keys that exist.
        where: the file, as messages name it.
        path: the path of the table in the file, such as ``case[0].``.

    Raises:
        UsageError: naming the key by its path, the nearest known key, and all known keys.
    """
    choices = list(known)
    for name in names:
        if name not in choices:
            near = difflib.get_close_matches(name, choices, n=1, cutoff=0.0)[0]
            key = name if _BARE_KEY.fullmatch(name) else repr(name)
            raise UsageError(f"{where}: unknown key {path}{key}; did you mean {near!r}? known: {', '.join(choices)}")


def refuse_newer(schema: object, newest: int, where: object) -> None:
    """Refuse a file whose schema is newer than this version reads; the decoder checks the type of `schema`.

    Raises:
        UsageError: naming the file and both schemas.
    """
    if isinstance(schema, int) and schema > newest:
        raise UsageError(f"{where} has schema {schema}; this ncclbench reads up to {newest}: use a newer one")
