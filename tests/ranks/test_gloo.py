"""Real processes over gloo: every pattern, dtype and reduction is checked, and accounted for as on threads."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from ncclbench.config.plugins import load, names
from ncclbench.errors import Exit
from ncclbench.schedule import DTYPES, Redop

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.ranks.conftest import Starter

# One worker for all: each would measure the plans anew.
pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("plans-over-gloo")]

BUILT_IN = [load("patterns", name) for name in names("patterns")]
PATTERNS = [
    module.__name__.rpartition(".")[2]
    for module in BUILT_IN
    if module.__name__.startswith("ncclbench_patterns.") and not hasattr(module, "variants")
]
WORLD_SIZES = (2, 4)
Records = dict[str, dict[str, Any]]


def reductions(pattern: str) -> list[str]:
    """The reductions a pattern can be asked for, none for one that does not reduce."""
    return [redop.value for redop in Redop] if "redop" in load("patterns", pattern).Params.__struct_fields__ else []


def reduced(pattern: str, world_size: int) -> list[tuple[str, str]]:
    """Dtypes with reductions: each with each between 2 ranks; between 4 each dtype's sum, and the others by turns.

    What is only moved is moved in every dtype between 2 ranks; between 4 as float32, and in some others by turns.
    """
    others = [redop for redop in reductions(pattern) if redop != "sum"]
    dtypes, shift = list(DTYPES), PATTERNS.index(pattern)
    if not others:
        return [(dtype, "") for k, dtype in enumerate(dtypes) if world_size == 2 or k == 0 or (k + shift) % 3 == 0]
    if world_size == 2:
        return list(product(DTYPES, [*others, "sum"]))
    turns = [(dtypes[(k + shift) % len(dtypes)], redop) for k, redop in enumerate(others)]
    return [*((dtype, "sum") for dtype in dtypes), *turns]


def entry(pattern: str, **values: object) -> str:
    """One [[case]]; a dict is a table in one line."""
    lines = ["[[case]]", f"pattern = {pattern!r}"]
    for name, value in values.items():
        inline = ", ".join(f"{k} = {v!r}" for k, v in value.items()) if isinstance(value, dict) else ""
        lines.append(f"{name} = {{ {inline} }}" if inline else f"{name} = {value!r}")
    return "\n".join(lines)


def plan(world_size: int) -> str:
    """Every pattern, dtype and reduction; then pipelined, other roots, and two groups side by side."""
    entries = []
    for pattern in PATTERNS:
        for dtype, redop in reduced(pattern, world_size):
            entries.append(entry(pattern, dtype=dtype, **({"params": {"redop": redop}} if redop else {})))
        entries.append(entry(pattern, timing="pipelined"))
        if "root" in load("patterns", pattern).Params.__struct_fields__:
            entries.append(entry(pattern, params={"root": world_size - 1}))
        if world_size == 4:
            entries.append(entry(pattern, params={"group": 2}, timing=["isolated", "pipelined"]))
    return "\n".join(['name = "all"', "[defaults]", "bytes = 4096", *entries]) + "\n"


def by_case(records: list[dict[str, Any]]) -> Records:
    return {record["case"]: record for record in records}


@pytest.fixture(scope="module")
def measured(module_jobs: Starter) -> Callable[[int], tuple[Records, Records]]:
    """Measures the same plan on gloo and on threads, once for each world size, however the tests are ordered."""

    @cache
    def measure(world_size: int) -> tuple[Records, Records]:
        path = module_jobs.folder / f"plan-{world_size}.toml"
        path.write_text(plan(world_size))
        found = []
        for transport in ("gloo", "threads"):
            job = module_jobs.ncclbench(
                f"run --plan {path} --transport {transport} --nproc {world_size} -n 6 -w 1 --json"
                f" -o {transport}-{world_size}"
            )
            finished = job.wait(280)
            assert finished.code == Exit.GOOD, finished.err
            assert finished.err == ""
            assert job.no_process_is_left()
            found.append(by_case(finished.records))
        return found[0], found[1]

    return measure


@pytest.fixture(params=WORLD_SIZES, ids="{} ranks".format)
def both(
    request: pytest.FixtureRequest, measured: Callable[[int], tuple[Records, Records]]
) -> tuple[int, Records, Records]:
    """World size, and the records of gloo and of threads by case."""
    return request.param, *measured(request.param)


def test_every_case_was_run_on_both(both: tuple[int, Records, Records]) -> None:
    world_size, gloo, threads = both
    assert list(gloo) == list(threads)
    for pattern in PATTERNS:
        for dtype, redop in reduced(pattern, world_size):
            suffix = f"/redop={redop}" if redop not in ("", "sum") else ""
            assert f"{pattern}/{dtype}/4096/isolated{suffix}" in gloo


def test_every_dtype_and_every_reduction_is_among_them() -> None:
    assert {dtype for pattern in PATTERNS for dtype, _ in reduced(pattern, 4)} == set(DTYPES)
    for pattern in PATTERNS:
        assert not reductions(pattern) or {dtype for dtype, _ in reduced(pattern, 4)} == set(DTYPES)
        assert {redop for _, redop in reduced(pattern, 4)} == set(reductions(pattern) or [""])
        assert len(reduced(pattern, 2)) == len(DTYPES) * max(1, len(reductions(pattern)))


def refusal(pattern: str, dtype: str, redop: str) -> str | None:
    """Why gloo has no such reduction; what is only moved it has in every type."""
    if not reductions(pattern):
        return None
    if dtype in ("float8_e4m3fn", "float8_e5m2", "uint32", "uint64"):
        return f"gloo has no reductions of {dtype}"
    return f"gloo has no avg of {dtype}" if redop == "avg" and not DTYPES[dtype].is_float else None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_data_are_right(pattern: str, both: tuple[int, Records, Records]) -> None:
    world_size, gloo, _ = both
    mine = [record for record in gloo.values() if record["pattern"] == pattern]
    assert len(mine) >= len(reduced(pattern, world_size))
    for record in mine:
        # What gloo cannot do.
        unable = refusal(pattern, record["dtype"], record["params"].get("redop", "sum"))
        # Two groups of two are the smallest world that every pattern supports.
        assert record["status"] == ("skipped" if unable else "ok"), record
        if unable:
            assert record["reason"] == unable
        else:
            assert (record["wrong"], record["wrong_ranks"], record["world_size"]) == (0, [], world_size)
            assert record["time_us"]["n"] == 6
            assert record["time_us"]["min"] > 0
            assert record["transport"] == "gloo"


def test_only_what_gloo_lacks_is_skipped(both: tuple[int, Records, Records]) -> None:
    _, gloo, threads = both
    skipped = {case for case, record in gloo.items() if record["status"] == "skipped"}
    lacking = ("/float8_e4m3fn/", "/float8_e5m2/", "/uint32/", "/uint64/")
    averages = [case for case in gloo if case.endswith("redop=avg") and "/float" not in case and "/bfloat" not in case]
    reducing = [case for case in gloo if reductions(case.partition("/")[0])]
    assert skipped == {*averages, *(case for case in reducing if any(part in case for part in lacking))}
    assert {record["status"] for record in threads.values()} == {"ok"}


def test_ledger_does_not_depend_on_the_transport(both: tuple[int, Records, Records]) -> None:
    _, gloo, threads = both
    compared = 0
    for case, record in gloo.items():
        if record["status"] != "ok":
            continue
        other = threads[case]
        assert record["ledger"]["sent_bytes"] == other["ledger"]["sent_bytes"], case
        assert record["ledger"]["bottleneck_bytes"] == other["ledger"]["bottleneck_bytes"], case
        assert sum(record["ledger"]["sent_bytes"].values()) > 0, case
        for mine, theirs in zip(record["phases"], other["phases"], strict=True):
            assert mine["label"] == theirs["label"]
            assert mine["ledger"]["sent_bytes"] == theirs["ledger"]["sent_bytes"], case
        compared += 1
    assert compared > 0.6 * len(gloo)


def test_rates_are_computed_from_the_time_and_the_size(both: tuple[int, Records, Records]) -> None:
    world_size, gloo, _ = both
    record = gloo["all_reduce/float32/4096/isolated"]
    seconds = record["time_us"]["p50"] / 1e6
    assert record["alg_gb_per_s"] == pytest.approx(4096 / seconds / 1e9)
    assert record["bus_gb_per_s"] == pytest.approx(2 * (world_size - 1) / world_size * record["alg_gb_per_s"])


def test_both_regimes_say_how_many_launches_a_sample_is(both: tuple[int, Records, Records]) -> None:
    _, gloo, _ = both
    for pattern in PATTERNS:
        assert gloo[f"{pattern}/float32/4096/isolated"]["launches_per_sample"] == 1
        assert gloo[f"{pattern}/float32/4096/pipelined"]["launches_per_sample"] == 6


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("timing", ["isolated", "pipelined"])
def test_two_concurrent_groups_are_both_reported(pattern: str, timing: str, both: tuple[int, Records, Records]) -> None:
    world_size, gloo, _ = both
    case = f"{pattern}/float32/4096/{timing}"
    if world_size == 2:
        assert gloo[case]["groups"] == []  # one group of all
        return
    record = gloo[case + "/group=2"]
    assert (record["status"], record["group_size"]) == ("ok", 2)
    assert [group["ranks"] for group in record["groups"]] == [[0, 1], [2, 3]]
    slowest = max(group["time_us"]["max"] for group in record["groups"])
    assert record["time_us"]["max"] == pytest.approx(slowest)  # the case is as slow as its slowest group
    for group in record["groups"]:
        assert group["time_us"]["n"] == 6
        assert group["bus_gb_per_s"] > 0
