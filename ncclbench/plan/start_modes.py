"""Modes of a plan: settings that a library reads once in a process's life, so that each is a process start of its own.

    [[mode]]
    name = "spine"
    variables = { NCCL_PXN_DISABLE = 1, NCCL_CROSS_NIC = 1 }

A plan with M modes and ``starts = N`` is M x N process starts. Start k is of mode k mod M, so that a machine which
drifts does so in all modes alike, and measures that mode's cases alone. With every launcher each rank sets its mode's
variables itself, before any library is loaded.
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
# Those that are read when a communicator is made, and that the manifest records; a plan sets nothing else.
_MAY_SET = ("NCCL_", "UCX_", "GLOO_", "TORCH_NCCL_")
_MOST_MODES = 20


class ModeEntry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One ``[[mode]]`` of a plan."""

    name: str
    variables: dict[str, str | int]


@dataclass(frozen=True)
class Mode:
    """A way to start the processes: variables of their environment, as text."""

    name: str
    variables: Mapping[str, str]

    @property
    def settings(self) -> str:
        """As a shell takes them in front of a command."""
        return " ".join(f"{name}={value}" for name, value in self.variables.items())

    @property
    def in_words(self) -> str:
        """Name and settings."""
        return f"mode {self.name}: {self.settings}"

    def as_record(self) -> ModeRecord:
        """The mode as the manifest stores it."""
        return ModeRecord(name=self.name, variables=dict(self.variables))

    def meets(self, needs: Needs) -> bool:
        """Whether a process of this mode is started as a case needs it."""
        return all(self.variables.get(name) == value for name, value in needs.variables.items())


def read_modes(entries: Sequence[ModeEntry], source: str) -> tuple[Mode, ...]:
    """The modes of a plan, checked.

    Raises:
        UsageError: naming the mode and what is wrong with it.
    """
    if len(entries) > _MOST_MODES:
        raise UsageError(f"{source}: at most {_MOST_MODES} modes, got {len(entries)}")
    found: dict[str, Mode] = {}
    for k, entry in enumerate(entries):
        where = f"{source}: mode[{k}]"
        if not _NAME.fullmatch(entry.name):
            raise UsageError(f"{where}: name must be up to 30 small letters, digits, '_' or '-', got {entry.name!r}")
        if entry.name in found:
            raise UsageError(f"{where}: {entry.name!r} stands twice")
        for name, value in entry.variables.items():
            if not (name.startswith(_MAY_SET) and name.isidentifier() and name.isascii()) or "\0" in str(value):
                raise UsageError(f"{where}: a mode sets variables of {', '.join(_MAY_SET)} alone, not {name[:60]!r}")
        found[entry.name] = Mode(entry.name, {name: str(value) for name, value in entry.variables.items()})
    return tuple(found.values())


def mode_of_case(case: Case, needs: Needs | None, asked: str | None, modes: Sequence[Mode]) -> str | None:
    """The mode whose process starts measure a case: the one it names, or the first that is started as it needs.

    Args:
        case: the case.
        needs: what its pattern asks of the way its process was started.
        asked: the mode that the plan names for it.
        modes: of the plan.

    Raises:
        UsageError: if there is none such.
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
    """The mode of process start `start`, counted from 0; None of a plan without modes."""
    return modes[start % len(modes)] if modes else None


@contextmanager
def entered(mode: Mode | None) -> Iterator[None]:
    """This process is of `mode`, until the end of the block; libraries that are loaded meanwhile keep its settings."""
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
