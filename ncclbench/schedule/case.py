"""A case: pattern + parameters + bytes + dtype + timing regime."""

from collections.abc import Mapping
from enum import Enum, StrEnum
from typing import TypeAlias, TypeVar, get_type_hints

import msgspec

from ncclbench.config.refusals import unknown
from ncclbench.errors import UsageError
from ncclbench.schedule.dtypes import Dtype, dtype_of

# Data that JSON can represent.
JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"


class Timing(StrEnum):
    """What is timed; ``docs/measuring.md`` defines each."""

    PIPELINED = "pipelined"
    ISOLATED = "isolated"
    GRAPH = "graph"


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of a pattern's own parameters: one field per parameter, with its type and default.

    Values come from a plan or from ``--param NAME=VALUE``, so text is converted if possible.
    """


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """How a process must have been started for a case; the result of a pattern's ``needs(case)``.

    Attributes:
        variables: NCCL's settings, which it reads once per process.
        only_nccl: the part of the case that only NCCL supports, in words; "" if other transports can run it too.
        pxn: whether NCCL must hop over NVLink to the receiver's rail, or must not.
    """

    variables: dict[str, str] = {}
    only_nccl: str = ""
    pxn: bool = False


P = TypeVar("P", bound=Params)


class GroupParams(Params, frozen=True, kw_only=True):
    """The parameter of every collective."""

    group: str = "world"
    """world; node, domain, rail or site for the ranks that share one; or N for blocks of N ranks."""


class CollectiveParams(GroupParams, frozen=True, kw_only=True):
    """The parameters of a pattern that is a single library call."""

    persistent: bool = False
    """plan the call once, and only start it each time: MPI-4's persistent collectives."""

    overlap: bool = False
    """start the call, compute, then wait for it: how much of it is hidden behind the computing, as OSU defines it."""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to measure.

    Attributes:
        pattern: name of a pattern.
        nbytes: S as requested; the size that a schedule moves is its `size_bytes`.
        dtype: name of the element type.
        timing: the regime.
        params: the pattern's parameters that differ from their defaults.
    """

    pattern: str
    nbytes: int
    dtype: str = "float32"
    timing: Timing = Timing.ISOLATED
    params: Mapping[str, object] = {}

    @property
    def element(self) -> Dtype:
        """The element type."""
        return dtype_of(self.dtype)

    @property
    def id(self) -> str:
        """The name of the case in a plan: ``all_reduce/float32/1048576/isolated``, then any parameters."""
        stem = f"{self.pattern}/{self.dtype}/{self.nbytes}/{self.timing}"
        return stem + "".join(f"/{name}={value}" for name, value in sorted(self.params.items()))

    def read(self, kind: type[P]) -> P:
        """The parameters as the pattern's own type.

        Raises:
            UsageError: if a name is unknown or a value has the wrong type.
        """
        return convert_params(self.pattern, self.params, kind)


def convert_params(pattern: str, params: Mapping[str, object], kind: type[P]) -> P:
    """`params` checked against `kind`; numbers may arrive as text.

    Raises:
        UsageError: naming the pattern, the parameter, and the known ones.
    """
    known = [field.name for field in msgspec.structs.fields(kind)]
    for name in params:
        if name not in known:
            raise UsageError(f"{pattern} has {unknown('parameter', name, known)}")
    # A plan may have group = 4 although the type is text, so numbers are converted as on the command line.
    texts = {name: str(value) if type(value) in (int, float) else value for name, value in params.items()}
    try:
        return msgspec.convert(texts, kind, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"{pattern}: {_in_words(str(error), texts, kind)}") from None


def _in_words(error: str, values: Mapping[str, object], kind: type[Params]) -> str:
    """The error of a parameter, with the values that are allowed."""
    what, _, path = error.partition(" - at `$.")
    name = path.rstrip("`")
    if name not in values:
        return f"parameter {error}"
    wanted = get_type_hints(kind).get(name)
    if isinstance(wanted, type) and issubclass(wanted, Enum):
        what = f"it must be one of {', '.join(str(member.value) for member in wanted)}"
    elif wanted is bool:
        what = "it must be true or false"
    return f"parameter {name} = {values[name]!r}: {what}"


def non_default(pattern: str, params: Mapping[str, object], kind: type[Params]) -> dict[str, object]:
    """The parameters of `params` that differ from their defaults, as plain data; they are a part of the case's name."""
    converted: dict[str, object] = msgspec.to_builtins(convert_params(pattern, params, kind))
    defaults = {f.name: msgspec.to_builtins(f.default) for f in msgspec.structs.fields(kind)}
    return {name: value for name, value in converted.items() if defaults[name] != value}
