"""The conditions of rules: tests of one value, written as data. No part of a profile runs as code.

    "all_reduce"                        equal; text may contain the wildcards * and ?
    8                                   equal
    [8, 16]                             any of these
    { min = "1G", max = "8G" }          within, both ends included; K, M and G are powers of two
    { one_of = ["IB", "SHARP*"] }       any of these
    { none_of = ["NET/Socket*"] }       none of these
    { version = ">=2.27,<3" }           a version in this range
    { present = true }                  has a value (with false: has none)

If a table has several keys, all of them must hold. If the value is a list, every item must pass.
"""

import math
import re
from fnmatch import fnmatchcase

import msgspec
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

from ncclbench.config.toml_files import convert, refuse_unknown_keys
from ncclbench.errors import UsageError
from ncclbench.units import format_size, parse_size

Scalar = str | int | float | bool
_CLAUSE = re.compile(r"(>=|<=|==|!=|>|<)\s*[0-9][\w.+-]*")


class ConditionTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A test written as a table; all of its keys must hold."""

    min: int | float | str | None = None
    max: int | float | str | None = None
    one_of: list[Scalar] | None = None
    none_of: list[Scalar] | None = None
    version: str | None = None
    present: bool | None = None


class Test(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed test: bounds are numbers, and lists are tuples."""

    __test__ = False  # pytest would collect it as a test class

    text: str
    low: float = -math.inf
    high: float = math.inf
    one_of: tuple[Scalar, ...] | None = None
    none_of: tuple[Scalar, ...] = ()
    version: SpecifierSet | None = None
    present: bool | None = None

    def holds(self, value: object) -> bool:
        """Whether `value` passes; None means that there is no value."""
        if value is None:
            return self.present is False
        if self.present is not None:
            return self.present
        if isinstance(value, list | tuple):
            return all(self.holds(item) for item in value)
        return self._in_bounds(value) and self._in_lists(value) and self._in_versions(value)

    def _in_bounds(self, value: object) -> bool:
        if self.low == -math.inf and self.high == math.inf:
            return True
        return isinstance(value, int | float) and self.low <= value <= self.high

    def _in_lists(self, value: object) -> bool:
        if any(same(choice, value) for choice in self.none_of):
            return False
        return self.one_of is None or any(same(choice, value) for choice in self.one_of)

    def _in_versions(self, value: object) -> bool:
        if self.version is None:
            return True
        version = release_of(str(value))
        return version is not None and version in self.version


def same(choice: Scalar, value: object) -> bool:
    """Whether `value` equals `choice`; upper and lower case are the same, and `choice` may contain wildcards.

    A number also equals its own text, since the values of variables are text.
    """
    if isinstance(choice, bool) or isinstance(value, bool):
        return choice is value
    if isinstance(value, str):
        return fnmatchcase(value.lower(), str(choice).lower())
    return bool(choice == value)


def read_test(raw: object, where: str) -> Test:
    """Parse the test in `raw`.

    Raises:
        UsageError: if it is no test, or contradicts itself; the message names `where`.
    """
    if isinstance(raw, dict):
        return _read_table(raw, where)
    listed = raw if isinstance(raw, list) else [raw]
    choices = [choice for choice in listed if isinstance(choice, str | int | float)]
    if not choices or len(choices) < len(listed):
        raise UsageError(f"{where} must be a value, a list of values, or a table; got {raw!r}")
    return Test(text=" or ".join(map(str, choices)), one_of=tuple(choices))


def _read_table(raw: dict[str, object], where: str) -> Test:
    refuse_unknown_keys(raw, ConditionTable, where)
    table = convert(raw, ConditionTable, where)
    if not raw:
        raise UsageError(f"{where}: an empty table tests nothing")
    low, high = (_number(getattr(table, end), f"{where}.{end}") for end in ("min", "max"))
    low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
    if low > high:
        raise UsageError(f"{where}: min {table.min} is above max {table.max}")
    if table.present is not None and len(raw) > 1:
        raise UsageError(f"{where}: present stands alone")
    if table.one_of == []:
        raise UsageError(f"{where}: one_of is empty, so nothing could ever pass")
    return Test(
        text=_describe(table),
        low=low,
        high=high,
        one_of=tuple(table.one_of) if table.one_of is not None else None,
        none_of=tuple(table.none_of or ()),
        version=_read_version(table.version, where) if table.version is not None else None,
        present=table.present,
    )


def _number(value: float | str | None, where: str) -> float | None:
    if isinstance(value, str):
        return float(parse_size(value, where))
    if value is not None and not math.isfinite(value):
        raise UsageError(f"{where} must be finite, got {value}")
    return value


def _describe(table: ConditionTable) -> str:
    parts = []
    if table.min is not None or table.max is not None:
        ends = [_size(end) for end in (table.min, table.max)]
        parts.append(f"{ends[0]} or more" if table.max is None else f"{ends[0] or 'up'} to {ends[1]}")
    parts += ["one of " + ", ".join(map(str, table.one_of))] if table.one_of else []
    parts += ["none of " + ", ".join(map(str, table.none_of))] if table.none_of else []
    parts += [f"version {table.version}"] if table.version else []
    parts += ["present" if table.present else "absent"] if table.present is not None else []
    return ", ".join(parts)


def _size(end: float | str | None) -> str:
    if end is None:
        return ""
    return format_size(end) if isinstance(end, int) else str(end)


def _read_version(text: str, where: str) -> SpecifierSet:
    """The clauses, without the operators that only package indexes need (``~=``, ``===`` and wildcards)."""
    try:
        if all(_CLAUSE.fullmatch(part.strip()) for part in text.split(",")):
            return SpecifierSet(text)
    except InvalidSpecifier:
        pass
    raise UsageError(f"{where}: version must be like '>=2.27,<3', got {text!r}")


def release_of(text: str) -> Version | None:
    """The leading numbers of a version, such as 2.28.9 of ``2.28.9+cuda13``; None if it does not begin with one.

    Versions of drivers and kernels, such as ``6.8.0-45-generic``, are not versions in the sense of `packaging`.
    """
    match = re.match(r"v?(\d+(?:\.\d+)*)", text)
    return Version(match[1]) if match else None
