"""Modes of a plan: settings that a library reads once per process, so that each mode needs its own process starts.

    [[mode]]
    name = "spine"
    variables = { NCCL_PXN_DISABLE = 1, NCCL_CROSS_NIC = 1 }

A plan with M modes and ``starts = N`` has M x N process starts. Start k has mode k mod M and measures only the cases of
that mode; this order spreads a drift of the machine over all modes. Under every launcher each rank sets the variables
of its mode itself, before it loads any library.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from ncclbench.errors import UsageError
from ncclbench.schedule.case import Case, Needs
from ncclbench.store.manifest import ModeRecord

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,29}")
# Libraries read these when a communicator is created, and the manifest records them. A plan may set no others.
_MAY_SET = ("NCCL_", "UCX_", "GLOO_", "TORCH_NCCL_")
_MOST_MODES = 20


class ModeEntry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One ``[[mode]]`` of a plan."""

    name: str
    variables: dict[str, str | int]


@dataclass(frozen=True)
class Mode:
    """A name and the environment variables of its processes, as text."""

    name: str
    variables: Mapping[str, str]

    @property
    def settings(self) -> str:
        """The variables in shell syntax, as before a command."""
        return " ".join(f"{name}={value}" for name, value in self.variables.items())

    @property
    def in_words(self) -> str:
        """Name and settings."""
        return f"mode {self.name}: {self.settings}"

    def as_record(self) -> ModeRecord:
        """The mode as the manifest stores it."""
        return ModeRecord(name=self.name, variables=dict(self.variables))

    def meets(self, needs: Needs) -> bool:
        """Whether a process of this mode is started as a case requires."""
        return all(self.variables.get(name) == value for name, value in needs.variables.items())


def read_modes(entries: Sequence[ModeEntry], source: str) -> tuple[Mode, ...]:
    """Check the ``[[mode]]`` entries of a plan and convert them.

    Raises:
        UsageError: naming the mode and the problem.
    """
    if len(entries) > _MOST_MODES:
        raise UsageError(f"{source}: at most {_MOST_MODES} modes, got {len(entries)}")
    found: dict[str, Mode] = {}
    for k, entry in enumerate(entries):
        where = f"{source}: mode[{k}]"
        if not _NAME.fullmatch(entry.name):
            raise UsageError(
                f"{where}: name must be up to 30 lower-case letters, digits, '_' or '-', got {entry.name!r}"
            )
        if entry.name in found:
            raise UsageError(f"{where}: {entry.name!r} is given twice")
        for name, value in entry.variables.items():
            if not (name.startswith(_MAY_SET) and name.isidentifier() and name.isascii()) or "\0" in str(value):
                raise UsageError(f"{where}: a mode sets only variables of {', '.join(_MAY_SET)}, not {name[:60]!r}")
        found[entry.name] = Mode(entry.name, {name: str(value) for name, value in entry.variables.items()})
    return tuple(found.values())


def mode_of_case(case: Case, needs: Needs | None, asked: str | None, modes: Sequence[Mode]) -> str | None:
    """The mode whose process starts measure a case: the mode that it names, or the first that meets its needs.

    Args:
        case: the case.
        needs: how its pattern requires the process to be started.
        asked: the mode that the plan names for the case.
        modes: the modes of the plan.

    Raises:
        UsageError: if no mode meets the needs, or the named mode does not exist.
    """
    known = {mode.name: mode for mode in modes}
    if asked is not None and asked not in known:
        raise UsageError(f"no mode {asked!r}; the plan has {', '.join(known) or 'no [[mode]]'}")
    fitting = [mode for mode in modes if needs is None or mode.meets(needs)]
    if asked is None and fitting:
        return fitting[0].name
    if modes and needs and (not fitting or asked not in [mode.name for mode in fitting]):
        wanted = ", ".join(f'{name} = "{value}"' for name, value in needs.variables.items())
        what = f"mode {asked!r} does not set" if asked else "no [[mode]] sets"
        raise UsageError(f"{case.id} needs a process started with {wanted}, which {what}")
    return asked


def mode_of_start(modes: Sequence[Mode], start: int) -> Mode | None:
    """The mode of process start `start`, counted from 0; None in a plan without modes."""
    return modes[start % len(modes)] if modes else None


@contextmanager
def mode_environment(mode: Mode | None) -> Iterator[None]:
    """Set the variables of `mode` inside the block; libraries that are loaded there keep its settings."""
    before = {name: os.environ.get(name) for name in (mode.variables if mode else ())}
    os.environ.update(mode.variables if mode else {})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
