"""Plug-in look-up by module name: patterns, transports, report formats, importers and checks.

Each module in `ncclbench_patterns`, `ncclbench_reports`, `ncclbench.transports`, `ncclbench.importers` and
`ncclbench.accept.checks` is a plug-in; no further registration is needed. Other distributions add plug-ins by entry
points in the groups `ncclbench.patterns`, `ncclbench.reports`, `ncclbench.transports`, `ncclbench.importers` and
`ncclbench.checks`. The value of an entry point is a module. A transport's module has `open_transport`, or
`open_executor` if it has no ranks; a check's module has `check`. Listing names imports nothing.
"""

import importlib
import pkgutil
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType

from ncclbench.config.refusals import unknown
from ncclbench.errors import UsageError

# kind -> the package of the built-in plug-ins.
_PACKAGES = {
    "patterns": "ncclbench_patterns",
    "reports": "ncclbench_reports",
    "transports": "ncclbench.transports",
    "importers": "ncclbench.importers",
    "checks": "ncclbench.accept.checks",
}
# Plug-in names that are not valid as module names.
_SERVED_BY = {
    ("reports", "nccl_tests"): ("nccl-tests",),
    ("importers", "nccl_tests"): ("nccl-tests",),
    ("importers", "nccl_tests_json"): ("nccl-tests-json",),
}
# Modules that transports share are not transports.
_NOT_PLUGINS = {("transports", name) for name in ("base", "capabilities", "library_checks")}


@cache
def builtin_modules(kind: str) -> dict[str, str]:
    """The module of each name of `kind` in this distribution."""
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


def forget_distributions() -> None:
    """Search the installed distributions again at the next look-up."""
    _third_party.cache_clear()


def names(kind: str) -> list[str]:
    """The sorted names of `kind` (``patterns``, ``reports``, ...), built-in and third-party."""
    return sorted({*builtin_modules(kind), *_third_party(kind)})


def exists(kind: str, name: str) -> bool:
    """Whether `name` exists; other distributions are searched only if it is not built in."""
    return name in builtin_modules(kind) or name in _third_party(kind)


def load(kind: str, name: str) -> ModuleType:
    """Import the module of a plug-in; a built-in one has precedence over a third-party one.

    Raises:
        UsageError: if there is none, naming the nearest and all names; or if a third-party module does not import.
    """
    if name in builtin_modules(kind):
        return importlib.import_module(builtin_modules(kind)[name])
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
