"""Profiles: the figures that a kind of hardware must reach, each with its source. TOML files, validated on load.

Schema history:
    1  first version.
"""

import hashlib
import math
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import msgspec

from ncclbench.accept.conditions import Test, read_test
from ncclbench.config.refusals import refuse_unknown, unknown
from ncclbench.config.shipped_files import PROFILES
from ncclbench.config.toml_files import decode_toml
from ncclbench.errors import UsageError
from ncclbench.store.records import Json
from ncclbench.store.verdict import Action, Verdict
from ncclbench.units import parse_size

SCHEMA = 1
# published: a document states the figure; measured: with `--make-profile` or by the project; assumed: neither.
Basis = Literal["published", "measured", "assumed"]

# The facts that a `where` may test; `CaseFacts` has the same fields.
FACTS = (
    "pattern", "timing", "dtype", "bytes", "ranks", "nodes", "domains", "group", "groups", "transport", "redop",
    "world_size", "case", "nvls",
)  # fmt: skip
SCOPE_FACTS = ("ranks", "nodes", "domains")
RATES = ("bus_gb_per_s", "alg_gb_per_s", "bottleneck_gb_per_s")
# Variables that name the host, devices and files of one rank, so that healthy ranks differ in them.
_OF_ONE_RANK = (
    "CUDA_VISIBLE_DEVICES", "NCCL_DEBUG*", "UCX_NET_DEVICES", "UCX_TLS", "NCCL_HOSTID", "NCCL_IB_HCA", "NCCL_TOPO_FILE",
)  # fmt: skip
METRICS = (*RATES, "time_us.p50", "time_us.p95", "time_us.p99")


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of the tables of a profile."""


class Fabric(_Part, frozen=True, kw_only=True):
    """The fabric that the profile is for; a run on another fabric is not judged.

    Attributes:
        device: ``cpu`` or ``cuda``.
        transports: names of the transports.
        gpu: names of the GPU as the driver reports them, with wildcards.
        domain_ranks: ranks in an NVLink domain, where that distinguishes fabrics.
        link_layer: link layer of the NICs, ``IB`` or ``RoCE``, from NCCL's log; NCCL calls both of them NET/IB.
    """

    device: Literal["cpu", "cuda"]
    transports: list[str]
    gpu: list[str] = []
    domain_ranks: Json = None
    link_layer: list[str] = []


class Bound(_Part, frozen=True, kw_only=True):
    """A figure that floors refer to by a fraction, such as the rate of a NIC."""

    name: str
    gb_per_s: float
    source: str
    date: str


class Floor(_Part, frozen=True, kw_only=True):
    """The figure that the cases selected by `where` must reach.

    Attributes:
        where: tests of facts of a case, by name; see `FACTS`.
        metric: one of `METRICS`.
        phase: the label of a phase; None for the whole case.
        at_least: lower limit of a rate, in the unit of `metric`.
        at_most: upper limit of a time, in the unit of `metric`.
        fraction: a share of the bound `of`, instead of a figure.
        of: name of a bound.
        tolerance: share of the figure by which a result may miss it.
        good: a result between the figure and this value is inconclusive and must be monitored.
        basis: how the figure is known; an assumed one can never fail a run.
        source: document or measurement of the figure.
        date: when the source was read or measured.
        required: whether a run that can measure the figure must measure it.
        action: what to do if a run misses the figure.
    """

    where: dict[str, Json]
    metric: str = "bus_gb_per_s"
    phase: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    fraction: float | None = None
    of: str | None = None
    tolerance: float
    good: float | None = None
    basis: Basis
    source: str
    date: str
    required: bool = True
    action: Action = Action.MONITOR


class Exempt(_Part, frozen=True, kw_only=True):
    """Cases whose speed is not judged, with the reason; their data and path are still judged."""

    where: dict[str, Json]
    reason: str


class PathRules(_Part, frozen=True, kw_only=True):
    """The paths that the data may take.

    Attributes:
        allowed: allowed links, as NCCL's log names them, with wildcards.
        across_nodes: links of which at least one must be used if a group spans nodes.
        gdr: whether NICs must read GPU memory directly.
        proof: whether an unproven path is inconclusive.
    """

    allowed: list[str]
    across_nodes: list[str] = []
    gdr: bool | None = None
    proof: bool = False


class Wanted(_Part, frozen=True, kw_only=True):
    """The versions and settings that every rank must have: a test per name."""

    versions: dict[str, Json] = {}
    variables: dict[str, Json] = {}


class Limits(_Part, frozen=True, kw_only=True):
    """When a figure is too uncertain to judge, and how much equal units may differ.

    Attributes:
        min_starts: process starts that a verdict on performance needs.
        min_samples: samples per start that a verdict needs; 6 is the fewest with a 95% interval.
        p99_samples: samples that a verdict on p99 needs; an upper bound on p99 needs 299.
        median_width: largest half width of the median's interval over the median.
        p95_over_p50: largest ratio of p95 to the median.
        start_spread: largest (largest - smallest) / median of the starts' medians.
        skew_share: largest ratio of the median arrival skew to the median time.
        fleet_margin: an outlier among equal units differs by more than this share.
        fleet_alpha: probability of any false alarm among all units that are compared.
        baseline_margin: a case that is slower than the baseline by more than this share fails.
        sum_tolerance: largest relative difference of a record's median from its samples' median.
        may_differ: variables that may differ between healthy ranks.
    """

    min_starts: int = 3
    min_samples: int = 6
    p99_samples: int = 299
    median_width: float = 0.05
    p95_over_p50: float = 2.0
    start_spread: float = 0.05
    skew_share: float = 1.0
    fleet_margin: float = 0.05
    fleet_alpha: float = 0.05
    baseline_margin: float = 0.05
    sum_tolerance: float = 1e-9
    may_differ: list[str] = msgspec.field(default_factory=lambda: list(_OF_ONE_RANK))


class Health(_Part, frozen=True, kw_only=True):
    """The verdict for a warning of a GPU or a NIC; the first rule that matches the text applies."""

    match: str
    verdict: Verdict
    action: Action


class HealthFile(_Part, frozen=True, kw_only=True):
    """The rules of ``health.toml``."""

    health: list[Health]


class Profile(_Part, frozen=True, kw_only=True):
    """The content of a profile file."""

    schema: int
    name: str
    title: str
    plan: str
    fabric: Fabric
    stamps: list[str] = []
    bound: list[Bound] = []
    floor: list[Floor] = []
    exempt: list[Exempt] = []
    path: PathRules | None = None
    wanted: Wanted = Wanted()
    limits: Limits = Limits()
    health: list[Health] = []


@dataclass(frozen=True)
class FloorRule:
    """A parsed floor: its tests, and its figure without (`figure`) and with (`limit`) the tolerance."""

    floor: Floor
    tests: dict[str, Test]
    figure: float
    limit: float
    why: str

    @property
    def is_rate(self) -> bool:
        """Whether a larger value is better."""
        return self.floor.at_most is None


@dataclass(frozen=True)
class Rules:
    """A profile, its text, and its parsed rules."""

    profile: Profile
    text: str
    floors: tuple[FloorRule, ...]
    exempt: tuple[tuple[Exempt, dict[str, Test]], ...]
    wanted: dict[str, dict[str, Test]]
    health: tuple[Health, ...]

    @property
    def sha256(self) -> str:
        """SHA-256 of the profile's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_profile(name_or_file: str) -> Rules:
    """Load a profile file, or a shipped profile by its name.

    Raises:
        UsageError: if the profile is invalid; the message names the file and the error.
    """
    return parse_profile(PROFILES.read_file_or_name(name_or_file), name_or_file)


def parse_profile(text: str, source: str) -> Rules:
    """Parse the profile in `text`; error messages call it `source`.

    Raises:
        UsageError: see `load_profile`.
    """
    profile = decode_toml(text, Profile, source, newest=SCHEMA)
    _refuse_contradictions(profile, source)
    bounds = {bound.name: bound for bound in profile.bound}
    return Rules(
        profile=profile,
        text=text,
        floors=_read_floors(profile, bounds, source),
        exempt=tuple(
            (item, _read_where(item.where, f"{source}: exempt[{k}]")) for k, item in enumerate(profile.exempt)
        ),
        wanted={
            kind: {name: read_test(raw, f"{source}: wanted.{kind}.{name}") for name, raw in tests.items()}
            for kind, tests in (("versions", profile.wanted.versions), ("variables", profile.wanted.variables))
        },
        health=(*profile.health, *default_health()),
    )


def default_health() -> list[Health]:
    """The rules for warnings that a profile has no rule for."""
    text = (resources.files("ncclbench.accept") / "health.toml").read_text(encoding="utf-8")
    return decode_toml(text, HealthFile, "health.toml").health


def _refuse_contradictions(profile: Profile, source: str) -> None:
    if (profile.fabric.device == "cpu") == bool(profile.fabric.gpu):
        raise UsageError(f"{source}: fabric.gpu must name GPUs if the device is cuda, and none if it is cpu")
    if profile.fabric.domain_ranks is not None:
        read_test(profile.fabric.domain_ranks, f"{source}: fabric.domain_ranks")
    names = [bound.name for bound in profile.bound]
    if len(set(names)) != len(names):
        raise UsageError(f"{source}: a bound stands twice: {', '.join(names)}")
    for name, value in msgspec.structs.asdict(profile.limits).items():
        least = 1 if name in ("min_starts", "p99_samples") else 6 if name == "min_samples" else 0
        if isinstance(value, int | float) and not least <= value < math.inf:
            raise UsageError(f"{source}: limits.{name} must be at least {least} and finite, got {value}")
    if not 0 < profile.limits.fleet_alpha < 1:
        raise UsageError(f"{source}: limits.fleet_alpha must lie between 0 and 1, got {profile.limits.fleet_alpha}")


def _read_floors(profile: Profile, bounds: dict[str, Bound], source: str) -> tuple[FloorRule, ...]:
    rules: list[FloorRule] = []
    seen: dict[str, int] = {}
    for k, floor in enumerate(profile.floor):
        where = f"{source}: floor[{k}]"
        key = msgspec.json.encode([floor.where, floor.metric, floor.phase], order="deterministic").decode()
        if key in seen:
            raise UsageError(f"{where} has the same where and metric as floor[{seen[key]}]")
        seen[key] = k
        rules.append(_read_floor(floor, bounds, where))
    return tuple(rules)


def _read_floor(floor: Floor, bounds: dict[str, Bound], where: str) -> FloorRule:
    given = [name for name in ("at_least", "at_most", "fraction") if getattr(floor, name) is not None]
    if len(given) != 1:
        raise UsageError(f"{where} needs exactly one of at_least, at_most and fraction; has {' and '.join(given) or 0}")
    if floor.metric not in METRICS:
        raise UsageError(f"{where}: {unknown('metric', floor.metric, METRICS)}")
    if (floor.at_most is None) is not (floor.metric in RATES):
        raise UsageError(f"{where}: {given[0]} contradicts {floor.metric}: rates are at least, times at most")
    if (floor.fraction is None) is not (floor.of is None):
        raise UsageError(f"{where}: fraction and of go together")
    if floor.of is not None and floor.of not in bounds:
        raise UsageError(f"{where}: {unknown('bound', floor.of, bounds)}")
    if not 0 <= floor.tolerance < 1:
        raise UsageError(f"{where}: tolerance must be a share from 0 to 1, got {floor.tolerance}")
    if not (floor.source.strip() and floor.date.strip()):
        raise UsageError(f"{where} needs a source and a date")
    return _with_figure(floor, bounds, where)


def _with_figure(floor: Floor, bounds: dict[str, Bound], where: str) -> FloorRule:
    if floor.of is not None and floor.fraction is not None:
        bound = bounds[floor.of]
        figure, why = floor.fraction * bound.gb_per_s, f"{floor.fraction:g} of {bound.name} ({bound.gb_per_s:g} GB/s)"
    else:
        figure = floor.at_least if floor.at_least is not None else floor.at_most or 0.0
        why = f"{figure:g}"
    if not 0 < figure < math.inf:
        raise UsageError(f"{where}: the figure must be above 0 and finite, got {figure}")
    limit = figure * (1 + floor.tolerance) if floor.at_most is not None else figure * (1 - floor.tolerance)
    beyond = floor.good is not None and (floor.good < limit if floor.at_most is None else floor.good > limit)
    if beyond:
        raise UsageError(f"{where}: good {floor.good:g} is no better than what fails, {limit:g}")
    return FloorRule(floor, _read_where(floor.where, where), figure, limit, why)


def _read_where(raw: dict[str, Json], where: str) -> dict[str, Test]:
    refuse_unknown(raw, FACTS, f"{where}.where")
    if "pattern" not in raw:
        raise UsageError(f"{where}.where needs a pattern")
    # Sizes have the usual suffixes: 1M means 1,048,576.
    sizes = {"bytes": _as_sizes(raw["bytes"], f"{where}.where.bytes")} if "bytes" in raw else {}
    return {name: read_test(sizes.get(name, test), f"{where}.where.{name}") for name, test in raw.items()}


def _as_sizes(raw: Json, where: str) -> Json:
    if isinstance(raw, list):
        return [parse_size(size, where) for size in raw]
    return raw if isinstance(raw, dict) else parse_size(raw if isinstance(raw, int) else str(raw), where)
