"""MoE dispatch and combine on threads: bitwise right in every variant."""

from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from ncclbench.plan import Settings
from ncclbench.schedule import Case, Timing
from ncclbench.schedule.rowformats import FORMATS
from tests.moe_cases import ONCE, ROUTINGS, case_of, run

WORLD_SIZES = (1, 2, 5, 8)


def shape_for(ranks: int) -> str:
    return f"{ranks // 2}x2" if ranks % 2 == 0 else f"{ranks}x1"


def variants_for(ranks: int) -> list[dict[str, Any]]:
    return [
        {"variant": "flat"},
        {"variant": "flat", "dedup": "selection"},
        {"variant": "cached"},
        {"variant": "padded"},
        {"variant": "control"},
        {"variant": "hierarchical", "placement": shape_for(ranks)},
        {"variant": "flat", "quad": True},
        {"variant": "hierarchical", "placement": shape_for(ranks), "quad": True},
    ]


VARIANTS = [params for params in variants_for(2) if not params.get("quad")]


def cases_of(ranks: int, routing: str) -> Iterator[dict[str, Any]]:
    """Every variant in every format; scales and the backward twins, which are independent, change from case to case."""
    w, r = WORLD_SIZES.index(ranks), ROUTINGS.index(routing)
    known = [params for params in variants_for(ranks) if not params.get("quad")]
    for (v, params), (f, form) in product(enumerate(known), enumerate(FORMATS)):
        found = {**params, "routing": routing, "format": form, "routings": 1}
        if params["variant"] != "control":
            found["quad"] = (r + w // 2 + f) % 2 == 1
            if form != "bf16":
                found["scales"] = ("packed", "separate")[(r + w + v) % 2]
        yield found


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("ranks", WORLD_SIZES)
def test_every_variant_and_format_is_right_to_the_bit(ranks: int, routing: str) -> None:
    for params in cases_of(ranks, routing):
        record = run(case_of(**params), ranks, settings=ONCE)
        assert (record.status, record.wrong, record.tolerance) == ("ok", 0, 0.0), record.case


def test_the_cases_above_leave_nothing_out() -> None:
    """Every variant, format and routing at every world size; every pair of those with scales and with quad."""
    cases = [(ranks, routing, case) for ranks, routing in product(WORLD_SIZES, ROUTINGS)
             for case in cases_of(ranks, routing)]  # fmt: skip
    dimensions = Counter[tuple[Any, ...]]()
    pairs = set()
    for ranks, routing, case in cases:
        variant = (case["variant"], case.get("dedup", "rank"))
        dimensions[ranks, routing, variant, case["format"]] += 1
        if variant[0] != "control":
            both = (case["quad"], case.get("scales", "packed"))
            pairs |= {(place, what, *both) for place, what in enumerate((ranks, routing, variant, case["format"]))}
    assert len(dimensions) == dimensions.total() == len(WORLD_SIZES) * len(ROUTINGS) * len(VARIANTS) * len(FORMATS)
    seen = len(WORLD_SIZES) + len(ROUTINGS) + len(VARIANTS) - 1 + len(FORMATS)
    assert len(pairs) == 4 * seen - 2  # bf16 has no scales to separate


@pytest.mark.parametrize("ranks", WORLD_SIZES)
def test_fractional_weights_are_right_within_a_tolerance_that_is_said(ranks: int) -> None:
    for params in variants_for(ranks):
        if params["variant"] == "control":
            continue
        record = run(case_of(**params, weights="float", routings=1), ranks, settings=ONCE)
        assert (record.status, record.wrong) == ("ok", 0), record.reason
        assert record.tolerance is not None
        assert 0 < record.tolerance < 0.02
        assert any("fractional weights" in note for note in record.notes)


@pytest.mark.parametrize(
    "params",
    [
        {"tokens": "5,0,9,1", "uneven": 0.0},
        {"uneven": 1.0, "routings": 5},
        {"experts": 10},
        {"experts": 3, "top_k": 3},
        {"top_k": 1},
        {"experts": 40, "top_k": 32},
        {"hidden": 176, "format": "fp8"},
        {"ep": 2},
        {"ep": 1},
    ],
    ids=str,
)
def test_odd_shapes_are_right_too(params: dict[str, Any]) -> None:
    for variant in variants_for(2 if "ep" in params else 4):
        if "ep" in params and "placement" in variant:
            variant["placement"] = "1x2" if params["ep"] == 2 else "1x1"
        record = run(case_of(**{"routings": 1, **variant, **params}), 4, settings=ONCE)
        assert (record.status, record.wrong) == ("ok", 0), (record.case, record.reason)


@pytest.mark.parametrize("timing", [Timing.ISOLATED, Timing.PIPELINED])
def test_both_host_regimes(timing: Timing) -> None:
    case = replace_timing(case_of(), timing)
    record = run(case, 4, settings=Settings(iterations=5, warmup=2))
    assert (record.status, record.variants) == ("ok", 2)
    assert bool(record.subtotals) == (timing is Timing.ISOLATED)


def replace_timing(case: Case, timing: Timing) -> Case:
    return Case(pattern=case.pattern, nbytes=case.nbytes, dtype=case.dtype, timing=timing, params=case.params)
