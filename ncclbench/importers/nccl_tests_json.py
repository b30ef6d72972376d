"""JSON that nccl-tests writes with -J, versions 1 to 3; with -I, the time of every launch becomes a sample.

Booleans and the root are text in this format, and a rate that is no number is the text "nan". The file has the whole
environment, secrets included: the importer keeps only the variables that ncclbench records in its own runs.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace

import msgspec

from ncclbench.importers.common.imported_cases import Reading, Stated, agreed
from ncclbench.importers.common.log_file import DamageError, Log
from ncclbench.importers.common.nccl_tests_tables import (
    OVER_RANKS,
    PLACEMENTS,
    Half,
    NcclTestsTable,
    Row,
    cases_of_table,
    pattern_of,
)
from ncclbench.store.manifest import LoggedDevice
from ncclbench.store.provenance import recorded_variables
from ncclbench.store.records import Json, OriginRecord, Placement

_TOOL = "nccl-tests"
_NEWEST = 3
_MOST = 1 << 62

_PROGRAM = re.compile(r"\w{1,60}", re.ASCII)
_NAME = re.compile(r"\w{0,20}", re.ASCII)

Number = float | str | None
_CONFIG = {
    "nthreads": "nThread",
    "ngpus": "nGpus",
    "minimum_bytes": "minBytes",
    "maximum_bytes": "maxBytes",
    "warmup_iters": "warmup iters",
    "iterations": "iters",
    "aggregated_iterations": "agg iters",
    "validation": "validation",
    "graph": "graph",
    "unalign": "unalign",
}
_PER_ITERATION = ("min_us", "max_us", "avg_us", "p50_us", "p95_us", "p99_us", "stdev_us", "cv_pct")


class _Figures(msgspec.Struct):
    alg_bw: Number
    bus_bw: Number
    nwrong: Number = None
    time: Number = None
    cpu_time: Number = None


class _PerIteration(msgspec.Struct):
    times_us: list[float]
    per_process_max_times_us: list[list[float]] = []
    skipped_iterations: int = 0
    min_us: float | None = None
    max_us: float | None = None
    avg_us: float | None = None
    p50_us: float | None = None
    p95_us: float | None = None
    p99_us: float | None = None
    stdev_us: float | None = None
    cv_pct: float | None = None


class _JsonResult(msgspec.Struct):
    size: int
    count: int
    type: str
    redop: str
    root: int | str
    in_place: _Figures | None = None
    out_of_place: _Figures | None = None
    in_place_per_iter: _PerIteration | None = None
    out_of_place_per_iter: _PerIteration | None = None


class _Device(msgspec.Struct):
    rank: int
    group: int | None = None
    pid: int | None = None
    hostname: str = ""
    device: int | None = None
    device_hex: str | None = None
    device_info: str | None = None


class _Report(msgspec.Struct):
    version: int
    results: list[_JsonResult]
    config: dict[str, Json] = {}
    args: list[str] = []
    env: list[str] = []
    start_time: str | None = None
    end_time: str | None = None
    nccl_version: int | None = None
    out_of_bounds: dict[str, Json] = {}
    average_bus_bandwidth: dict[str, Json] = {}


def recognises(log: Log) -> bool:
    """Whether the file is one JSON object with nccl-tests' keys."""
    head = log.text[:4096].lstrip()
    return head.startswith("{") and '"version"' in head and ('"nccl_version"' in log.text or '"args"' in head)


def read(log: Log, stated: Stated) -> Reading:
    """The file's results.

    Raises:
        DamageError: if it is cut off, or a value is not what it must be.
    """
    report = _decode(log)
    devices = _devices(report)
    table = NcclTestsTable(number=0, line=None, devices=devices, concluded=report.end_time is not None)
    program = _PROGRAM.fullmatch(report.args[0].rpartition("/")[2]) if report.args else None
    table.program = program[0] if program else None
    table.config = _config(report)
    table.cpu_time = any(result.out_of_place and result.out_of_place.cpu_time for result in report.results)
    table.over_ranks = _over_ranks(report.args)
    table.out_of_bounds = _whole(report.out_of_bounds.get("count"))
    table.avg_bus_gb_per_s = _real(report.average_bus_bandwidth.get("bandwidth"))
    if report.nccl_version is not None:
        table.versions["nccl-library"] = str(report.nccl_version)
    for place, result in enumerate(report.results):
        table.rows.append(_row(place, result))
    said = pattern_of(table.program) if table.program else None
    pattern = agreed(said, stated.pattern, "--pattern", None)
    if pattern is None:
        raise DamageError(1, "the file does not name the test; name it with --pattern all_reduce", one_line=False)
    origin = OriginRecord(source=0, tool=_TOOL, file=log.name)
    cases = cases_of_table(
        table, pattern, agreed(len(devices) or None, stated.world_size, "--world-size", None), origin
    )
    facts = {**table.facts(), "args": report.args, "end_time": report.end_time, "json_version": report.version}
    return Reading(
        tool=_TOOL,
        cases=cases,
        tables=[facts],
        ranks=devices,
        versions=dict(table.versions),
        variables=recorded_variables(dict(pair.partition("=")[::2] for pair in report.env)),
        started=report.start_time,
    )


def _decode(log: Log) -> _Report:
    try:
        report = msgspec.json.decode(log.text.encode(errors="replace"), type=_Report)
    except msgspec.ValidationError as error:
        raise DamageError(1, f"no report of nccl-tests: {error}", one_line=False) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise DamageError(_line_of(log, str(error)), f"no whole JSON: {error}", one_line=False) from None
    if not 1 <= report.version <= _NEWEST:
        raise DamageError(
            1, f"version {report.version} of nccl-tests' JSON; this ncclbench reads 1 to {_NEWEST}", one_line=False
        )
    return report


def _line_of(log: Log, error: str) -> int:
    """The line of the byte that the decoder's message names; the last line if it names none."""
    place = error.partition("(byte ")[2].partition(")")[0]
    content = log.text.rstrip().encode(errors="replace")
    return content[: int(place) if place.isdecimal() else None].count(b"\n") + 1


def _row(place: int, result: _JsonResult) -> Row:
    where = f"results[{place}]"
    _bounded(result.size, f"{where}.size")
    _bounded(result.count, f"{where}.count")
    for name in ("type", "redop"):
        if not _NAME.fullmatch(getattr(result, name)):
            raise DamageError(1, f"{where}.{name} is {getattr(result, name)[:40]!r}, which is no name", one_line=False)
    halves: dict[Placement, Half] = {}
    for placement in PLACEMENTS:
        figures: _Figures | None = getattr(result, placement)
        if figures is not None:
            halves[placement] = _half(f"{where}.{placement}", figures, getattr(result, f"{placement}_per_iter"))
    try:
        root = int(str(result.root).strip())
    except ValueError:
        raise DamageError(1, f"{where}.root is {str(result.root)[:40]!r}", one_line=False) from None
    redop = None if result.redop in ("none", "") else result.redop
    return Row(
        line=None,
        size=result.size,
        count=result.count,
        dtype=result.type,
        redop=redop,
        root=_bounded(root + 1, f"{where}.root") - 1,
        halves=halves,
    )


def _half(where: str, figures: _Figures, launches: _PerIteration | None) -> Half:
    wrong = _figure(figures.nwrong, f"{where}.nwrong")
    half = Half(
        time_us=_figure(figures.time if figures.cpu_time is None else figures.cpu_time, f"{where}.time"),
        alg_gb_per_s=_figure(figures.alg_bw, f"{where}.alg_bw"),
        bus_gb_per_s=_figure(figures.bus_bw, f"{where}.bus_bw"),
        wrong=int(wrong) if wrong is not None else None,
    )
    return half if launches is None else _with_launches(f"{where}_per_iter", half, launches)


def _with_launches(where: str, half: Half, launches: _PerIteration) -> Half:
    """`half` with the figures that -I adds."""
    number = len(launches.times_us)
    for times in (launches.times_us, *launches.per_process_max_times_us):
        if len(times) != number:
            raise DamageError(1, f"{where}: a process has {len(times)} times, and others {number}", one_line=False)
        if any(not 0 <= time < 1e15 for time in times):
            raise DamageError(1, f"{where}: a time is negative, or no time", one_line=False)
    statistics = {name: value for name in _PER_ITERATION if (value := getattr(launches, name)) is not None}
    return replace(
        half,
        per_iteration={**statistics, "skipped_iterations": launches.skipped_iterations},
        times_us=launches.times_us,
        process_times_us=launches.per_process_max_times_us,
    )


def _figure(value: Number, where: str) -> float | None:
    """A figure that is not negative; None for null and for the text ``nan``."""
    if value is None or value in ("nan", "-nan"):
        return None
    if isinstance(value, str) or not 0 <= value < 1e30:
        raise DamageError(1, f"{where} is {str(value)[:40]!r}, which is no figure", one_line=False)
    return float(value)


def _bounded(value: int, where: str) -> int:
    if not 0 <= value < _MOST:
        raise DamageError(1, f"{where} is {value}, which cannot be", one_line=False)
    return value


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST else None


def _real(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, float | int):
        return None
    return float(value) if 0 <= value < 1e30 else None


def _config(report: _Report) -> dict[str, int | str]:
    config: dict[str, int | str] = {}
    for theirs, ours in _CONFIG.items():
        value = _whole(report.config.get(theirs))
        if value is not None:
            config[ours] = value
    for name, unit in (("step_factor", "factor"), ("step_bytes", "bytes")):
        step = _whole(report.config.get(name))
        if step is not None:
            config |= {"step": step, "step is a": unit}
    if report.config.get("blocking_collectives") == "true":
        config["blocking"] = "true"
    return config


def _devices(report: _Report) -> list[LoggedDevice]:
    try:
        devices = msgspec.convert(report.config.get("devices", []), list[_Device])
    except msgspec.ValidationError as error:
        raise DamageError(1, f"config.devices: {error}", one_line=False) from None
    return [
        LoggedDevice(
            rank=_bounded(device.rank, "a device's rank"),
            group=device.group,
            pid=device.pid,
            host=device.hostname,
            device=device.device,
            gpu=device.device_hex,
            name=device.device_info,
        )
        for device in devices
    ]


def _over_ranks(args: list[str]) -> str:
    """How the ranks' times became one figure: the option -a, and the mean without it."""
    given: Mapping[str, str] = dict(itertools.pairwise(args))
    return OVER_RANKS.get(given.get("-a", given.get("--average", "1")), "mean")
