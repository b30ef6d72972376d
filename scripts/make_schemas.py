#!/usr/bin/env python
"""Write the schemas in docs/ and the field tables of docs/formats.md from the types of the store.

``scripts/make_schemas.py`` writes, ``--check`` ends in 1 if a file would change. Descriptions are the `Attributes` of a
type's docstring. The schemas are derived here, not by msgspec: those of its versions differ.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect as types

from ncclbench.store.events import Event
from ncclbench.store.manifest import Manifest
from ncclbench.store.records import Record
from ncclbench.store.verdict import CheckResult, RunVerdict

DOCS = Path(__file__).resolve().parents[1] / "docs"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
# What the JSON report shows of a verdict.
IN_REPORTS: dict[type[msgspec.Struct], tuple[str, ...]] = {
    RunVerdict: ("schema", "verdict", "reasons", "profile", "stamps", "starts", "checks"),
    CheckResult: ("check", "subject", "verdict", "reason", "action", "evidence"),
}
# A reader demands these, though the type has a default for code that makes one.
DEMANDED = "schema"
_UNITS = (("gb_per_s", "1e9 B/s"), ("_us", "us"), ("bytes", "B"), ("seconds", "s"), ("_percent", "%"))
_TABLE = re.compile(r"(<!-- fields of (\w+) -->\n).*?(<!-- end of fields -->\n)", re.DOTALL)
_ROOTS = {kind.__name__: kind for kind in (Manifest, Record, Event)}

_PLAIN: dict[type[types.Type], str] = {
    types.NoneType: "null",
    types.BoolType: "boolean",
    types.FloatType: "number",
    types.StrType: "string",
}

Schema = dict[str, Any]


def described(kind: type) -> tuple[str, dict[str, str]]:
    """What a type's docstring says of it, and of each attribute."""
    said, _, listed = inspect.cleandoc(kind.__doc__ or "").partition("\n\nAttributes:\n")
    found: dict[str, str] = {}
    for line in listed.splitlines():
        if match := re.match(r"    (\w+): (.*)", line):
            name, found[match[1]] = match[1], match[2]
        elif line.strip():
            found[name] += f" {line.strip()}"
    return said, found


def schema_of(kind: type[msgspec.Struct], title: str, only: dict[Any, tuple[str, ...]] | None = None) -> Schema:
    """The JSON schema of a type, with all types in it as definitions.

    Args:
        kind: the type.
        title: of the schema.
        only: for a type the fields that there are; all for any other.
    """
    definitions: dict[str, Schema] = {}
    reference = _schema(types.type_info(kind), definitions, only or {})
    return {"$schema": DIALECT, "title": title, **reference, "$defs": definitions}


def _schema(info: types.Type, definitions: dict[str, Schema], only: dict[Any, tuple[str, ...]]) -> Schema:
    match info:
        case types.Metadata():
            extra = {name: value for name, value in (info.extra_json_schema or {}).items() if name != "description"}
            return {**_schema(info.type, definitions, only), **extra}
        case types.AnyType() | types.CustomType():
            return {}
        case types.ListType():
            items = _schema(info.item_type, definitions, only)
            return {"type": "array", **({"items": items} if items else {})}
        case types.DictType():
            values = _schema(info.value_type, definitions, only)
            return {"type": "object", **({"additionalProperties": values} if values else {})}
        case types.UnionType():
            return {"anyOf": [_schema(one, definitions, only) for one in info.types]}
        case types.StructType():
            _define(info, definitions, only)
            return {"$ref": f"#/$defs/{info.cls.__name__}"}
        case types.EnumType():
            said = inspect.cleandoc(info.cls.__doc__ or "")
            definitions[info.cls.__name__] = {"description": said, "enum": [member.value for member in info.cls]}
            return {"$ref": f"#/$defs/{info.cls.__name__}"}
        case _:
            return _plain(info)


def _plain(info: types.Type) -> Schema:
    if isinstance(info, types.IntType):
        bounds = {"minimum": info.ge, "maximum": info.le}
        return {"type": "integer", **{name: bound for name, bound in bounds.items() if bound is not None}}
    if isinstance(info, types.LiteralType):
        return {"enum": sorted(info.values)}
    return {"type": _PLAIN[type(info)]}


def _define(info: types.StructType, definitions: dict[str, Schema], only: dict[Any, tuple[str, ...]]) -> None:
    name = info.cls.__name__
    if name in definitions:
        return
    said, attributes = described(info.cls)
    definitions[name] = {"description": said}  # first, so that a type may hold itself
    fields = [field for field in info.fields if field.name in only.get(info.cls, (field.name,))]
    properties = {}
    for field in fields:
        about = {"description": attributes[field.name]} if field.name in attributes else {}
        properties[field.name] = {**about, **_schema(field.type, definitions, only)}
    required = [field.name for field in fields if field.required or field.name == DEMANDED]
    definitions[name] |= {"type": "object", "properties": properties, "required": required}


def tables_of(kind: type[msgspec.Struct]) -> str:
    """A table of a type's fields, then one of each type in it."""
    lines: list[str] = [""]
    for one, used in _paths(kind).items():
        said, attributes = described(one)
        lines += [f"`{'`, `'.join(used)}`: {_cell(' '.join(said.split()))}", ""] if used else []
        lines += ["| field | unit | what |", "|---|---|---|"]
        lines += [f"| `{name}` | {_unit(name)} | {_cell(text)} |" for name, text in attributes.items()]
        lines.append("")
    return "\n".join(lines)


def _unit(name: str) -> str:
    return next((unit for end, unit in _UNITS if name.endswith(end)), "")


def _cell(text: str) -> str:
    return text.removesuffix(".").replace("``", "`").replace("|", r"\|")


def _paths(root: type[msgspec.Struct]) -> dict[type[msgspec.Struct], list[str]]:
    """Every type in a type, itself first, with the fields that hold it; those of another as ``owner.field``."""
    found: dict[type[msgspec.Struct], list[str]] = {root: []}
    waiting = [(root, "")]
    for owner, prefix in waiting:  # grows as it goes
        info = types.type_info(owner)
        assert isinstance(info, types.StructType)
        for field in info.fields:
            for inner in _structs_in(field.type):
                if inner not in found:
                    waiting.append((inner, f"{prefix}{field.name}."))
                found.setdefault(inner, []).append(f"{prefix}{field.name}")
    return found


def _structs_in(info: types.Type) -> Iterator[type[msgspec.Struct]]:
    match info:
        case types.StructType():
            yield info.cls
        case types.Metadata():
            yield from _structs_in(info.type)
        case types.ListType():
            yield from _structs_in(info.item_type)
        case types.DictType():
            yield from _structs_in(info.value_type)
        case types.UnionType():
            for one in info.types:
                yield from _structs_in(one)


def texts() -> dict[Path, str]:
    """Each file that this script writes, with what it must hold."""
    report = json.loads((DOCS / "report.schema.json").read_text())
    report["$defs"] = schema_of(RunVerdict, "", IN_REPORTS)["$defs"]
    formats = (DOCS / "formats.md").read_text()
    formats = _TABLE.sub(lambda match: match[1] + tables_of(_ROOTS[match[2]]) + match[3], formats)
    return {
        DOCS / "record.schema.json": _json(schema_of(Record, "a line of results.jsonl")),
        DOCS / "verdict.schema.json": _json(schema_of(RunVerdict, "verdict.json")),
        DOCS / "report.schema.json": _json(report),
        DOCS / "formats.md": formats,
    }


def _json(schema: Schema) -> str:
    return json.dumps(schema, indent=1) + "\n"


def main() -> int:
    """Write, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; end in 1 if a file would change")
    checking = parser.parse_args().check
    stale = [path for path, text in texts().items() if path.read_text() != text]
    for path in stale:
        if not checking:
            path.write_text(texts()[path])
        print(f"{path.name} {'is not what the types say' if checking else 'written'}")
    return int(checking and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
