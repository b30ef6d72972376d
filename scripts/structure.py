#!/usr/bin/env python
"""Count what the architecture promises, and print it as a table: ``scripts/structure.py [--list NAME] [--check]``.

Each row counts one habit that makes the code hard to read, over ``ncclbench``, ``patterns`` and ``reports``, beside the
limit that it must keep. ``--list NAME`` prints the places behind a row; ``--check`` ends in 1 if a limit is passed.
"""

import argparse
import ast
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("ncclbench", "patterns/ncclbench_patterns", "reports/ncclbench_reports")
# Folders whose modules are plug-ins: a plug-in may be as short as it likes.
PLUGINS = (
    "ncclbench/accept/checks", "ncclbench/importers", "ncclbench/transports", "patterns/ncclbench_patterns",
    "reports/ncclbench_reports",
)  # fmt: skip
# Where data from outside becomes typed, so that a test for a mapping is no second look at the same data.
EDGES = ("ncclbench/importers", "ncclbench/store", "ncclbench/config")
SHORT = 40


@dataclass(frozen=True)
class Module:
    """One source file, parsed."""

    path: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        """Dotted name of the package that the module is in."""
        parts = Path(self.path).with_suffix("").parts
        parts = parts[1:] if parts[0] in ("patterns", "reports") else parts
        return ".".join(parts[:-1])

    def inside(self, folders: tuple[str, ...]) -> bool:
        """Whether the module lies in one of `folders`, or below."""
        return any(self.path.startswith(f"{folder}/") for folder in folders)

    def at(self, node: ast.AST) -> str:
        """``path:line`` of a node."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}"


def modules() -> list[Module]:
    """All source files of the product."""
    files = sorted(file for source in SOURCES for file in (ROOT / source).rglob("*.py"))
    return [
        Module(file.relative_to(ROOT).as_posix(), text := file.read_text(), ast.parse(text)) for file in files
    ]  # fmt: skip


def _annotated_any(found: list[Module]) -> Iterator[str]:
    for module in found:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Name) and node.id == "Any":
                yield module.at(node)


def _is_str_any(node: ast.Subscript) -> bool:
    names = [part.id for part in ast.walk(node.slice) if isinstance(part, ast.Name)]
    return isinstance(node.value, ast.Name) and node.value.id in ("dict", "Mapping") and names == ["str", "Any"]


def _dicts_of_any(found: list[Module]) -> Iterator[str]:
    for module in found:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Subscript) and _is_str_any(node):
                yield module.at(node)


def _doubled_classes(found: list[Module]) -> Iterator[str]:
    homes: dict[str, list[str]] = defaultdict(list)
    for module in found:
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and node.name != "Params":  # every pattern has its own Params
                homes[node.name.lstrip("_")].append(module.at(node))
    yield from (f"{name}: {', '.join(places)}" for name, places in sorted(homes.items()) if len(places) > 1)


def _option_look_ups(found: list[Module]) -> Iterator[str]:
    for module in found:
        for node in ast.walk(module.tree):
            subscript = (
                isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "options"
            )
            get = (
                isinstance(node, ast.Attribute)
                and node.attr == "get"
                and isinstance(node.value, ast.Name)
                and node.value.id == "options"
            )
            if subscript or get:
                yield module.at(node)


def _mapping_checks(found: list[Module]) -> Iterator[str]:
    for module in found:
        if module.inside(EDGES):
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                kinds = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
                if kinds & {"dict", "Mapping"}:
                    yield module.at(node)


def _short_modules(found: list[Module]) -> Iterator[str]:
    for module in found:
        path = Path(module.path)
        plugin = path.parent.as_posix() in PLUGINS and not path.name.startswith("_")
        if not plugin and path.name not in ("__init__.py", "__main__.py") and len(module.text.splitlines()) < SHORT:
            yield f"{module.path} ({len(module.text.splitlines())} lines)"


def _private_imports(found: list[Module]) -> Iterator[str]:
    for module in found:
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("ncclbench"):
                continue
            assert node.module is not None
            for name in [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]:
                owner, _, private = name.partition("._")
                if private and not private.startswith("_") and not f"{module.package}.".startswith(f"{owner}."):
                    yield f"{module.at(node)} {name}"


def _transport_names(found: list[Module]) -> Iterator[str]:
    names = {"gloo", "nccl", "cupy_nccl", "threads", "mpi", "model"}
    for module in found:
        # In `buffers`, "nccl" is a kind of memory; in `importers`, it names another program's transport; in `accept`, a
        # library with a version, and the transport of an example. "model" is a word of the stored format.
        data = (
            "ncclbench/accept/example_runs.py",
            "ncclbench/accept/profile_from_run.py",
            "ncclbench/store/run_directory.py",
        )
        if module.inside(("ncclbench/transports", "ncclbench/importers", "ncclbench/buffers")) or module.path in data:
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names:
                yield f"{module.at(node)} {node.value!r}"


@dataclass(frozen=True)
class Row:
    """A count with its limit; `per_kloc` divides by thousands of product lines."""

    name: str
    what: str
    find: Callable[[list[Module]], Iterator[str]]
    limit: float
    per_kloc: bool = False


ROWS = (
    Row("any", "`Any` per 1,000 lines", _annotated_any, 3, per_kloc=True),
    Row("dict-any", "`dict[str, Any]` per 1,000 lines", _dicts_of_any, 3, per_kloc=True),
    Row("classes", "class names that are defined twice", _doubled_classes, 0),
    Row("options", "look-ups in `options` by a string", _option_look_ups, 0),
    Row("mappings", "`isinstance(.., dict | Mapping)` outside importers and store", _mapping_checks, 4),
    Row("short", f"modules under {SHORT} lines that are no plug-in", _short_modules, 14),
    Row("private", "private names that another package imports", _private_imports, 0),
    Row("transports", "transport names outside `transports`", _transport_names, 0),
)


def main() -> int:
    """Print the table, or the places behind one row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", choices=[row.name for row in ROWS], help="print the places behind a row")
    parser.add_argument("--check", action="store_true", help="end in 1 if a limit is passed")
    options = parser.parse_args()
    found = modules()
    if options.list:
        print("\n".join(next(row for row in ROWS if row.name == options.list).find(found)))
        return 0
    lines = sum(len(module.text.splitlines()) for module in found)
    print(f"{len(found)} modules, {lines} lines\n")
    passed = False
    for row in ROWS:
        count: float = sum(1 for _ in row.find(found))
        count = count / lines * 1000 if row.per_kloc else count
        over = count > row.limit if not row.per_kloc else count >= row.limit
        passed |= over
        limit = f"under {row.limit:g}" if row.per_kloc else f"at most {row.limit:g}"
        print(f"{count:8.4g}  {limit:<12} {'OVER ' if over else '     '}{row.what}  ({row.name})")
    return int(passed and options.check)


if __name__ == "__main__":
    sys.exit(main())
