"""Plans: from TOML to cases. Misspelled names are refused here, before any rank starts.

A plan has defaults and a list of entries. An entry expands to one case for each combination of its sizes, dtypes,
timing regimes and listed parameter values.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from ncclbench.buffers.kinds import Cache, Kind
from ncclbench.config.refusals import unknown
from ncclbench.config.shipped_files import PLANS
from ncclbench.config.toml_files import decode_toml
from ncclbench.errors import UsageError
from ncclbench.plan.start_modes import Mode, ModeEntry, mode_of_case, mode_of_start, read_modes
from ncclbench.schedule.case import Case, Params, Timing, convert_params, non_default
from ncclbench.schedule.dtypes import dtype_of
from ncclbench.schedule.pattern import load_pattern
from ncclbench.store.manifest import PlannedCaseRecord, PlanRecord
from ncclbench.units import parse_size

Size = int | str
T = TypeVar("T")
_MOST_CASES = 100_000
_MOST_STARTS = 100
_MOST_ITERATIONS = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a case is measured.

    Attributes:
        iterations: a fixed number of iterations; None to continue until `precision` or `max_seconds`. In the pipelined
            regime, the number of launches per block.
        warmup: untimed iterations before the timed ones, for every size.
        precision: stop when half of the median's 95% interval is below this fraction of the median.
        max_seconds: stop after this time.
        check: validate the data before and after timing.
        seed: seed of the fill values.
        timeout: seconds without progress after which a rank counts as hung; increases with the size of a case.
        cache: on GPUs, ``cold`` rotates over so many buffers that they do not fit into the L2 cache.
        buffers: on GPUs, the allocator: CuPy's ``pool``, ``nccl`` (ncclMemAlloc) or ``torch``.
    """

    iterations: int | None = None
    warmup: int = 5
    precision: float = 0.02
    max_seconds: float = 2.0
    check: bool = True
    seed: int = 0
    timeout: float = 60.0
    cache: Cache = "cold"
    buffers: Kind = "pool"


class SettingOverrides(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Settings that override those of a plan; None keeps the plan's value. `Settings` documents each."""

    iterations: int | None = None
    warmup: int | None = None
    precision: float | None = None
    max_seconds: float | None = None
    check: bool | None = None
    seed: int | None = None
    timeout: float | None = None
    cache: Cache | None = None
    buffers: Kind | None = None


_NO_OVERRIDES = SettingOverrides()


class Entry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One ``[[case]]`` of a plan, or ``[defaults]``, which may set the same keys.

    Sizes are either `bytes` (one size or a list) or a sweep from `min_bytes` to `max_bytes` by `factor`. `mode` names
    the ``[[mode]]`` whose process starts measure the case; by default, the first mode that meets its needs.
    """

    pattern: str | None = None
    mode: str | None = None
    bytes: Size | list[Size] | None = None
    min_bytes: Size | None = None
    max_bytes: Size | None = None
    factor: float | None = None
    dtype: str | list[str] | None = None
    timing: str | list[str] | None = None
    params: dict[str, object] = {}
    iterations: int | None = None
    warmup: int | None = None
    precision: float | None = None
    max_seconds: float | None = None
    check: bool | None = None
    timeout: float | None = None
    cache: Cache | None = None
    buffers: Kind | None = None


class PlanFile(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The TOML structure of a plan."""

    name: str
    starts: int = 1
    seed: int = 0
    mode: list[ModeEntry] = []
    defaults: Entry = msgspec.field(default_factory=Entry)
    case: list[Entry] = []


@dataclass(frozen=True)
class PlannedCase:
    """A case, its settings, and the mode of the process starts that measure it (None in a plan without modes)."""

    case: Case
    settings: Settings
    mode: str | None = None

    def as_record(self) -> PlannedCaseRecord:
        """The case as the manifest stores it."""
        return PlannedCaseRecord(
            id=self.case.id,
            pattern=self.case.pattern,
            nbytes=self.case.nbytes,
            dtype=self.case.dtype,
            timing=self.case.timing.value,
            params=dict(self.case.params),
            mode=self.mode,
            settings=dict(vars(self.settings)),
        )


@dataclass(frozen=True)
class Plan:
    """The cases of a run, in order.

    Attributes:
        name: name of the plan.
        cases: the cases of all modes.
        starts: number of process starts that measure each case.
        modes: see `ncclbench.plan.start_modes`.
    """

    name: str
    cases: tuple[PlannedCase, ...]
    starts: int = 1
    modes: tuple[Mode, ...] = ()

    @property
    def process_starts(self) -> int:
        """The number of process starts of all modes."""
        return self.starts * max(1, len(self.modes))

    def mode_of(self, start: int) -> Mode | None:
        """The mode of process start `start`, counted from 0."""
        return mode_of_start(self.modes, start)

    def elsewhere(self, start: int) -> set[str]:
        """The ids of the cases that process starts of other modes measure."""
        mode = self.mode_of(start)
        return {planned.case.id for planned in self.cases if mode and planned.mode != mode.name}

    def as_record(self) -> PlanRecord:
        """The plan as the manifest stores it; a resumed run must have the same plan."""
        return PlanRecord(
            name=self.name,
            starts=self.starts,
            modes=[mode.as_record() for mode in self.modes],
            cases=[planned.as_record() for planned in self.cases],
        )


def read_plan(name_or_file: str, overrides: SettingOverrides = _NO_OVERRIDES, only: Iterable[str] = ()) -> Plan:
    """Read a plan from a file, or a shipped plan by its name.

    Args:
        name_or_file: a path that exists or ends in ``.toml``, or the name of a shipped plan.
        overrides: settings from the command line, which override the plan's.
        only: keep only the cases of these patterns.

    Raises:
        UsageError: naming the file, the wrong key or value, and the nearest valid one.
    """
    return parse_plan(PLANS.read_file_or_name(name_or_file), name_or_file, overrides, only)


def parse_plan(text: str, source: str, overrides: SettingOverrides = _NO_OVERRIDES, only: Iterable[str] = ()) -> Plan:
    """Parse the plan in `text`; errors name it `source`. See `read_plan`."""
    plan = decode_toml(text, PlanFile, source)
    if not re.fullmatch(r"\w[\w.-]{0,59}", plan.name):
        raise UsageError(f"{source}: name must be up to 60 letters, digits, '_', '.' or '-', got {plan.name[:80]!r}")
    if not 1 <= plan.starts <= _MOST_STARTS:
        raise UsageError(f"{source}: starts must be 1 to {_MOST_STARTS}, got {plan.starts}")
    wanted = list(only)
    entries = [entry for entry in plan.case if not wanted or entry.pattern in wanted]
    missing = [name for name in wanted if name not in {entry.pattern for entry in entries}]
    if missing:
        raise UsageError(f"{source} has no case of {', '.join(missing)}")
    modes = read_modes(plan.mode, source)
    made = make_plan(plan.name, entries, plan.defaults, source, seed=plan.seed, overrides=overrides, modes=modes)
    used = {planned.mode for planned in made.cases}
    idle = [mode.name for mode in modes if mode.name not in used]
    if idle and not wanted:
        raise UsageError(
            f"{source}: mode {idle[0]!r} has no case: name it in one with mode = {idle[0]!r}, or leave it out"
        )
    return replace(made, starts=plan.starts, modes=tuple(mode for mode in modes if mode.name in used))


def make_plan(
    name: str,
    entries: list[Entry],
    defaults: Entry,
    source: str,
    *,
    seed: int = 0,
    overrides: SettingOverrides = _NO_OVERRIDES,
    modes: tuple[Mode, ...] = (),
) -> Plan:
    """Expand `entries` into cases.

    Raises:
        UsageError: naming the entry by its path, such as ``case[1].bytes``.
    """
    planned: list[PlannedCase] = []
    for k, entry in enumerate(entries):
        expanded = _expand(entry, defaults, f"{source}: case[{k}]", overrides, seed)
        asked = _first_or_none(entry.mode, defaults.mode)
        planned += [_in_mode(item, asked, modes, f"{source}: case[{k}]") for item in expanded]
        if len(planned) > _MOST_CASES:
            raise UsageError(f"{source}: more than {_MOST_CASES} cases")
    if not planned:
        raise UsageError(f"{source}: a plan needs at least one [[case]]")
    seen: set[str] = set()
    for item in planned:
        if item.case.id in seen:
            raise UsageError(f"{source}: {item.case.id} is given twice")
        seen.add(item.case.id)
    return Plan(name, tuple(planned))


def _in_mode(planned: PlannedCase, asked: str | None, modes: tuple[Mode, ...], where: str) -> PlannedCase:
    needs = load_pattern(planned.case.pattern).needs(planned.case) if modes else None
    try:
        return replace(planned, mode=mode_of_case(planned.case, needs, asked, modes))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _expand(entry: Entry, defaults: Entry, where: str, overrides: SettingOverrides, seed: int) -> list[PlannedCase]:
    if entry.pattern is None:
        raise UsageError(f"{where}: no pattern")
    try:
        kind = load_pattern(entry.pattern).params
        params = {**defaults.params, **entry.params}
        chosen = [non_default(entry.pattern, one, kind) for one in _combinations(params)]
        shapes = _shapes(entry, defaults, kind, chosen)
        timings = _timings(_names(entry.timing, defaults.timing, "isolated"))
        settings = _settings(entry, defaults, overrides, seed)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return [
        PlannedCase(Case(pattern=entry.pattern, nbytes=size, dtype=dtype, timing=timing, params=one), settings)
        for timing, (one, own) in itertools.product(timings, zip(chosen, shapes, strict=True))
        for dtype, size in own
    ]


def _shapes(
    entry: Entry, defaults: Entry, kind: type[Params], chosen: list[dict[str, object]]
) -> list[list[tuple[str, int]]]:
    """For each set of parameters, the dtypes and sizes of its cases.

    If a pattern's parameters determine its size, it has a function ``size_and_dtype(params)``, and there is one case.
    """
    assert entry.pattern is not None
    own = load_pattern(entry.pattern).size_and_dtype
    if own is None:
        sizes = _sizes(entry, defaults)
        dtypes = [dtype_of(name).name for name in _names(entry.dtype, defaults.dtype, "float32")]
        return [list(itertools.product(dtypes, sizes))] * len(chosen)
    for name in ("bytes", "min_bytes", "max_bytes", "factor", "dtype"):
        if getattr(entry, name) is not None:
            raise UsageError(f"{name} does not go with {entry.pattern}: its parameters determine the size")
    found = [own(convert_params(entry.pattern, one, kind)) for one in chosen]
    return [[(dtype, size)] for size, dtype in found]


def _combinations(params: dict[str, object]) -> list[dict[str, object]]:
    """One set of parameters for each combination of the values that are lists."""
    choices = [[(name, value) for value in _listed(values)] for name, values in params.items()]
    return [dict(chosen) for chosen in itertools.product(*choices)]


def _first_or_none(*levels: T | None) -> T | None:
    return next((level for level in levels if level is not None), None)


def _first(*levels: T | None) -> T:
    """The first value that is not None; the last one never is."""
    return next(level for level in levels if level is not None)


def _listed(value: T | list[T]) -> list[T]:
    if value == []:
        raise UsageError("an empty list selects no case")
    return value if isinstance(value, list) else [value]


def _names(*levels: str | list[str] | None) -> list[str]:
    """The names of the first level that is not None."""
    named = next(level for level in levels if level is not None)
    return [named] if isinstance(named, str) else _listed(named)


def _timings(names: list[str]) -> list[Timing]:
    """The timing regimes with these names; ``all`` means every regime."""
    chosen: list[Timing] = []
    for name in names:
        if name != "all" and name not in list(Timing):
            raise UsageError(unknown("timing", name, [*Timing, "all"]))
        chosen += list(Timing) if name == "all" else [Timing(name)]
    return list(dict.fromkeys(chosen))


def _sizes(entry: Entry, defaults: Entry) -> list[int]:
    own_sweep = entry.min_bytes is not None or entry.max_bytes is not None
    if entry.bytes is not None and own_sweep:
        raise UsageError("bytes and min_bytes/max_bytes exclude each other")
    listed = entry.bytes if entry.bytes is not None else None if own_sweep else defaults.bytes
    if listed is not None:
        given: list[Size] = _listed(listed)
        return [parse_size(size, "bytes") for size in given]
    low = entry.min_bytes if entry.min_bytes is not None else defaults.min_bytes
    high = entry.max_bytes if entry.max_bytes is not None else defaults.max_bytes
    if low is None or high is None:
        raise UsageError("no sizes: set bytes, or min_bytes and max_bytes")
    factor = entry.factor if entry.factor is not None else defaults.factor
    return sweep(parse_size(low, "min_bytes"), parse_size(high, "max_bytes"), 2 if factor is None else factor)


def sweep(low: int, high: int, factor: float) -> list[int]:
    """Sizes from `low` to `high`, each `factor` times the previous one, as -b -e -f of nccl-tests.

    Raises:
        UsageError: if the range is empty or the factor is not above 1.
    """
    if low > high:
        raise UsageError(f"min_bytes {low} is above max_bytes {high}")
    if not 1 < factor < math.inf:
        raise UsageError(f"factor must be above 1 and finite, got {factor}")
    if math.log(high / low) / math.log(factor) > _MOST_CASES:
        raise UsageError(f"factor {factor} makes more than {_MOST_CASES} sizes from {low} to {high}")
    sizes: list[int] = []
    size = float(low)
    while size < high + 0.5:
        if not sizes or round(size) != sizes[-1]:
            sizes.append(round(size))
        size *= factor
    return sizes


_LEAST = {"iterations": 1, "warmup": 0, "precision": 0.0, "max_seconds": 0.0, "timeout": 0.1}
# At most 7 days for a timeout: libraries store it as milliseconds in 32 bits.
_MOST = {"iterations": _MOST_ITERATIONS, "warmup": _MOST_ITERATIONS, "timeout": 7 * 24 * 3600}


def _settings(entry: Entry, defaults: Entry, overrides: SettingOverrides, seed: int) -> Settings:
    levels = (overrides, entry, defaults)
    chosen = Settings(
        iterations=_first_or_none(*(level.iterations for level in levels)),
        warmup=_first(*(level.warmup for level in levels), Settings.warmup),
        precision=_first(*(level.precision for level in levels), Settings.precision),
        max_seconds=_first(*(level.max_seconds for level in levels), Settings.max_seconds),
        check=_first(*(level.check for level in levels), Settings.check),
        seed=_first(overrides.seed, seed),
        timeout=_first(*(level.timeout for level in levels), Settings.timeout),
        cache=_first(*(level.cache for level in levels), Settings.cache),
        buffers=_first(*(level.buffers for level in levels), Settings.buffers),
    )
    _refuse_bounds(
        {
            "iterations": chosen.iterations,
            "warmup": chosen.warmup,
            "precision": chosen.precision,
            "max_seconds": chosen.max_seconds,
            "timeout": chosen.timeout,
        }
    )
    return chosen


def _refuse_bounds(figures: Mapping[str, float | None]) -> None:
    for name, most in _MOST.items():
        figure = figures[name]
        if figure is not None and figure > most:
            raise UsageError(f"{name} must be at most {most}, got {figure}")
    for name, least in _LEAST.items():
        figure = figures[name]
        if figure is not None and not least <= figure < math.inf:
            raise UsageError(f"{name} must be at least {least:g} and finite, got {figure}")
