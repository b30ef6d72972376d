"""TOML files as typed structs: plans, profiles, model presets and topology files are read here.

An error is one line with the file, the path of the key, and the nearest valid key.
"""

import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TypeVar, get_args, get_origin

import msgspec

from ncclbench.config.refusals import refuse_newer, refuse_unknown
from ncclbench.errors import UsageError

S = TypeVar("S", bound=msgspec.Struct)


def read_text(path: Path, what: str) -> str:
    """The text of a file without a byte order mark; errors call the file a `what`.

    Raises:
        UsageError: if the file cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null byte in the path
        raise UsageError(f"cannot read the {what} {path}: {error}") from None


def decode_toml(text: str, kind: type[S], source: str, *, newest: int | None = None, hidden: Collection[str] = ()) -> S:
    """Decode TOML text into a struct.

    Args:
        text: the content of the file.
        kind: the type to decode to; nested structs are checked for unknown keys too.
        source: the file, as errors name it.
        newest: the newest schema that this version reads, if such files have a schema.
        hidden: fields of `kind` that a file cannot set.

    Raises:
        UsageError: naming the file and the wrong key or value.
    """
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{source}: not a TOML file: {error}") from None
    if newest is not None:
        refuse_newer(table.get("schema"), newest, source)  # first, because a newer schema has unknown keys
    _check_keys(table, kind, source, hidden=hidden)
    return convert(table, kind, source)


def convert(value: object, kind: type[S], where: str) -> S:
    """Convert plain data into a struct.

    Raises:
        UsageError: naming `where` and the value of a wrong type.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"{where}: {error}") from None


def refuse_unknown_keys(names: Collection[str], kind: type[msgspec.Struct], where: str) -> None:
    """Refuse keys that are not fields of `kind`.

    Raises:
        UsageError: see `refuse_unknown`.
    """
    refuse_unknown(names, _keys(kind), where)


def _keys(kind: type[msgspec.Struct], hidden: Collection[str] = ()) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(kind) if field.encode_name not in hidden]


def _check_keys(
    table: dict[str, object], kind: type[msgspec.Struct], source: str, path: str = "", hidden: Collection[str] = ()
) -> None:
    """Refuse unknown keys at any depth, and ``[name]`` if the format has ``[[name]]``."""
    refuse_unknown(table, _keys(kind, hidden), source, path)
    for field in msgspec.structs.fields(kind):
        nested, is_list = _nested_struct(field.type)
        name = field.encode_name
        if nested is None or name not in table:
            continue
        if is_list and not isinstance(table[name], list):
            where = path.partition("[")[0]
            full = f"{where}.{name}" if where else name
            raise UsageError(f"{source}: {path}{name} must be a list: write [[{full}]], not [{full}]")
        for inner_path, inner in _tables(table[name], f"{path}{name}"):
            _check_keys(inner, nested, source, f"{inner_path}.")


def _nested_struct(hint: object) -> tuple[type[msgspec.Struct] | None, bool]:
    """The struct inside a type, and whether the type is a list of it: ``tuple[Node, ...]`` gives ``(Node, True)``."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return hint, False
    for argument in get_args(hint):
        kind, is_list = _nested_struct(argument)
        if kind is not None:
            return kind, is_list or get_origin(hint) in (list, tuple)
    return None, False


def _tables(value: object, path: str) -> Iterator[tuple[str, dict[str, object]]]:
    """The tables in a value, each with its path; the decoder checks all other values."""
    if isinstance(value, list):
        for k, entry in enumerate(value):
            yield from _tables(entry, f"{path}[{k}]")
    elif isinstance(value, dict):
        yield path, value
