"""What there is of each kind: patterns, transports, report formats, importers and checks, found by module name.

A file in `ncclbench_patterns`, `ncclbench_reports`, `ncclbench.transports`, `ncclbench.importers` or
`ncclbench.accept.checks` *is* its registration. Other distributions add theirs through an entry point in the group
`ncclbench.patterns`, `ncclbench.reports`, `ncclbench.transports`, `ncclbench.importers` or `ncclbench.checks`; its
value is a module (a transport's has `open_transport`, or `open_executor` where it has no ranks, a check's has `check`).
Nothing is imported to list the names.
"""

import importlib
import pkgutil
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType

from ncclbench.config.refusals import unknown
from ncclbench.errors import UsageError

# kind -> the package whose modules are the built-in ones.
_PACKAGES = {
    "patterns": "ncclbench_patterns",
    "reports": "ncclbench_reports",
    "transports": "ncclbench.transports",
    "importers": "ncclbench.importers",
    "checks": "ncclbench.accept.checks",
}
# A module cannot be called what people call these.
_SERVED_BY = {
    ("reports", "nccl_tests"): ("nccl-tests",),
    ("importers", "nccl_tests"): ("nccl-tests",),
    ("importers", "nccl_tests_json"): ("nccl-tests-json",),
}
# What every transport is written against is not itself a transport.
_NOT_PLUGINS = {("transports", name) for name in ("base", "capabilities", "library_checks")}


@cache
def _builtin(kind: str) -> dict[str, str]:
    package = _PACKAGES[kind]
    found: dict[str, str] = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if info.ispkg or info.name.startswith("_") or (kind, info.name) in _NOT_PLUGINS:
            continue
        for name in _SERVED_BY.get((kind, info.name), (info.name,)):
            found[name] = f"{package}.{info.name}"
    return found


@cache
def _third_party(kind: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"ncclbench.{kind}")}


def names(kind: str) -> list[str]:
    """Names of `kind` (``patterns``, ``reports``, ...), sorted; a third party cannot hide a built-in."""
    return sorted({*_builtin(kind), *_third_party(kind)})


def exists(kind: str, name: str) -> bool:
    """Whether there is a `name` of `kind`; other distributions are searched only if it is not built in."""
    return name in _builtin(kind) or name in _third_party(kind)


def load(kind: str, name: str) -> ModuleType:
    """The module behind `name`.

    Raises:
        UsageError: if there is none, naming the nearest and all there are; or if a third party's does not import.
    """
    if name in _builtin(kind):
        return importlib.import_module(_builtin(kind)[name])
    point = _third_party(kind).get(name)
    if point is None:
        raise UsageError(unknown(kind.removesuffix("s"), name, names(kind)))
    try:
        module = point.load()
    except Exception as error:
        raise UsageError(f"{kind.removesuffix('s')} {name!r} ({point.value}) does not load: {error}") from error
    if not isinstance(module, ModuleType):
        raise UsageError(f"{kind.removesuffix('s')} {name!r} ({point.value}) must name a module")
    return module
