"""MoE dispatch and combine on threads: bitwise correct in every variant."""

from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from ncclbench.moe.layer_params import Variant
from ncclbench.moe.routing import KINDS, RoutingSpec
from ncclbench.plan.plan import Settings
from ncclbench.schedule import Case, Timing
from ncclbench.schedule.row_formats import FORMATS
from ncclbench.topology import Topology
from tests.helpers.exhaustive import exhaustive_if
from tests.helpers.moe_cases import ONCE, ROUTINGS, case_of, routed, run

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
EVEN, UNEVEN = [12] * 8, [12, 0, 7, 1, 9, 12, 0, 3]
"""Tokens per rank. A job of one rank uses the first number, since without tokens nothing would move."""


def cases_of(ranks: int, routing: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Every variant in every format, format by format, so that the values of a format are computed once.

    What does not depend on them changes from case to case: where scales travel, the backward twins, and whether ranks
    have equally many tokens, which every case has both ways at some world size.
    """
    w, r = WORLD_SIZES.index(ranks), ROUTINGS.index(routing)
    known = [params for params in variants_for(ranks) if not params.get("quad")]
    tables = [routed(routing, tokens[:ranks], folder) for tokens in (EVEN, UNEVEN)]
    for (f, form), (v, params) in product(enumerate(FORMATS), enumerate(known)):
        found = {**params, **tables[(w + v + f + r) % 2], "format": form, "routings": 1}
        if params["variant"] != "control":
            found["quad"] = (r + w + f) % 4 == 0
            if form != "bf16":
                found["scales"] = ("packed", "separate")[(r + w + v) % 2]
        yield found


def topology_for(ranks: int, routing: str) -> Topology:
    """One node with one rail per rank; two nodes for a hot rail, so that it has more than one rank."""
    two = routing.startswith("hot-rail") and ranks % 2 == 0
    return Topology.from_hosts(["x", "y"] * (ranks // 2)) if two else Topology.single_node(ranks)


# The fast suite: every routing at 1 and 2 ranks, and one with more ranks on one node and on two.
FEW = {*product((1, 2), ROUTINGS), (5, "uniform"), (8, "hot-rail:0.7")}


def test_the_fast_suite_has_every_world_size() -> None:
    assert {ranks for ranks, routing in FEW if routing in ROUTINGS} == set(WORLD_SIZES)


@pytest.mark.parametrize(
    ("ranks", "routing"), exhaustive_if(lambda pair: pair not in FEW, product(WORLD_SIZES, ROUTINGS))
)
def test_every_variant_and_format_is_exact(ranks: int, routing: str, tmp_path: Path) -> None:
    for params in cases_of(ranks, routing, tmp_path):
        record = run(case_of(**params), ranks, topology_for(ranks, routing), ONCE)
        assert (record.status, record.wrong, record.tolerance) == ("ok", 0, 0.0), (record.case, record.reason)


def test_cases_cover_every_variant_format_and_routing(tmp_path: Path) -> None:
    """Every variant, format and kind of routing at every world size; every pair of these with scales and with quad.

    Each of the first three with equally many tokens on all ranks at some world size, and with other counts at another.
    """
    assert [RoutingSpec.parse(routing).kind for routing in ROUTINGS] == list(KINDS)
    assert {(params["variant"], params.get("dedup", "rank")) for params in VARIANTS} == {
        *((variant.value, "rank") for variant in Variant), ("flat", "selection")
    }  # fmt: skip
    cases = [(ranks, routing, case) for ranks, routing in product(WORLD_SIZES, ROUTINGS)
             for case in cases_of(ranks, routing, tmp_path)]  # fmt: skip
    dimensions = Counter[tuple[Any, ...]]()
    counts, pairs = set(), set()
    for ranks, routing, case in cases:
        variant = (case["variant"], case.get("dedup", "rank"))
        dimensions[ranks, routing, variant, case["format"]] += 1
        if ranks > 1:
            said = case["tokens"] or Path(case["routing"].removeprefix("trace:")).stem.replace("-", ",")
            counts.add((routing, variant, case["format"], "0" in said.split(",")))
        if variant[0] != "control":
            both = (case["quad"], case.get("scales", "packed"))
            pairs |= {(index, what, *both) for index, what in enumerate((ranks, routing, variant, case["format"]))}
    inner = len(ROUTINGS) * len(VARIANTS) * len(FORMATS)
    assert len(dimensions) == dimensions.total() == len(WORLD_SIZES) * inner
    assert len(counts) == 2 * inner
    seen = len(WORLD_SIZES) + len(ROUTINGS) + len(VARIANTS) - 1 + len(FORMATS)
    assert len(pairs) == 4 * seen - 2  # bf16 has no separate scales


@pytest.mark.parametrize("ranks", exhaustive_if(lambda ranks: ranks == 5, WORLD_SIZES))
def test_fractional_weights_are_correct_within_the_stated_tolerance(ranks: int) -> None:
    """Every variant except control, which has no weights; every format at 5 ranks and at one other world size."""
    forms, w = list(FORMATS), WORLD_SIZES.index(ranks)
    for v, params in enumerate(variants_for(ranks)):
        if params["variant"] == "control":
            continue
        for f, form in enumerate(forms if ranks == 5 else [forms[(v + w) % len(forms)]]):
            scales = {"scales": "separate"} if form != "bf16" and (v + f) % 2 else {}
            record = run(case_of(**params, format=form, **scales, weights="float", routings=1), ranks, settings=ONCE)
            assert (record.status, record.wrong) == ("ok", 0), (record.case, record.reason)
            assert record.tolerance is not None
            assert 0 < record.tolerance < 0.02
            assert any("fractional weights" in note for note in record.notes)


@pytest.mark.parametrize(
    "params",
    [
        {"uneven": 1.0, "routings": 2},
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
def test_unusual_shapes_are_exact(params: dict[str, Any]) -> None:
    for variant in variants_for(2 if "ep" in params else 4):
        if "ep" in params and "placement" in variant:
            variant["placement"] = "1x2" if params["ep"] == 2 else "1x1"
        record = run(case_of(**{"routings": 1, **variant, **params}), 4, settings=ONCE)
        assert (record.status, record.wrong) == ("ok", 0), (record.case, record.reason)


@pytest.mark.parametrize("timing", [Timing.ISOLATED, Timing.PIPELINED])
def test_both_host_timing_regimes_are_exact(timing: Timing) -> None:
    case = replace_timing(case_of(), timing)
    record = run(case, 4, settings=Settings(iterations=5, warmup=2))
    assert (record.status, record.variants) == ("ok", 2)
    assert bool(record.subtotals) == (timing is Timing.ISOLATED)


def replace_timing(case: Case, timing: Timing) -> Case:
    return Case(pattern=case.pattern, nbytes=case.nbytes, dtype=case.dtype, timing=timing, params=case.params)
