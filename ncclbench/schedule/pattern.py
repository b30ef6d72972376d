"""Patterns as typed objects: what a pattern module offers, looked up once.

A pattern module has a class `Params` and one of two functions, and may have two more:

- ``schedule(case, topology) -> Schedule``, or ``variants(case, topology)`` with the schedules that iterations rotate
  through;
- ``needs(case) -> Needs``: how the process must have been started;
- ``size_and_dtype(params) -> (bytes, dtype)``: set if the parameters determine how much is moved.

No other module asks a pattern module for its attributes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

from ncclbench.config.plugins import load
from ncclbench.errors import UsageError
from ncclbench.schedule.case import Case, Needs, Params
from ncclbench.schedule.schedule import Schedule
from ncclbench.topology import Topology


@dataclass(frozen=True)
class Pattern:
    """One pattern.

    Attributes:
        name: as in a plan.
        params: the type of its parameters.
        build: makes the schedules of a case; see `variants`.
        rotates: whether it defines ``variants`` rather than ``schedule``.
        size_and_dtype: bytes and element type that parameters determine; None if the case states both.
        needs_of: what a case requires of the process start; None if it requires nothing.
    """

    name: str
    params: type[Params]
    build: Callable[[Case, Topology], Sequence[Schedule]]
    rotates: bool = False
    size_and_dtype: Callable[[Params], tuple[int, str]] | None = None
    needs_of: Callable[[Case], Needs] | None = None

    @classmethod
    def of_module(cls, name: str, module: ModuleType) -> "Pattern":
        """The pattern that `module` defines.

        Raises:
            UsageError: if the module lacks `Params`, or both ``schedule`` and ``variants``.
        """
        for choices in (("Params",), ("schedule", "variants")):
            if not any(hasattr(module, choice) for choice in choices):
                raise UsageError(f"pattern {name!r}: {module.__name__} has no {choices[0]}; see CONTRIBUTING.md")
        rotates = hasattr(module, "variants")
        return cls(
            name=name,
            params=module.Params,
            build=module.variants if rotates else lambda case, topology: (module.schedule(case, topology),),
            rotates=rotates,
            size_and_dtype=getattr(module, "size_and_dtype", None),
            needs_of=getattr(module, "needs", None),
        )

    def variants(self, case: Case, topology: Topology) -> tuple[Schedule, ...]:
        """The schedules that iterations of `case` rotate through; for most patterns there is one.

        Raises:
            Unable: if the pattern cannot run on this topology.
            UsageError: if the parameters are wrong; the message begins with the case.
        """
        try:
            return tuple(self.build(case, topology))
        except UsageError as error:
            raise type(error)(f"{case.id}: {error}") from None

    def needs(self, case: Case) -> Needs | None:
        """How a process must have been started for `case`; None if any start will do."""
        return self.needs_of(case) if self.needs_of else None


def load_pattern(name: str) -> Pattern:
    """The pattern called `name`.

    Raises:
        UsageError: if there is no such pattern, or if its module lacks what makes a pattern.
    """
    return Pattern.of_module(name, load("patterns", name))


def build_variants(case: Case, topology: Topology) -> tuple[Schedule, ...]:
    """The schedules of the case's pattern; see `Pattern.variants`.

    Raises:
        Unable: if the pattern cannot run on this topology.
        UsageError: if there is no such pattern, or its parameters are wrong.
    """
    return load_pattern(case.pattern).variants(case, topology)


def build_schedule(case: Case, topology: Topology) -> Schedule:
    """The first schedule of the case's pattern."""
    return build_variants(case, topology)[0]
