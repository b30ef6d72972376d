"""MoE dispatch: placement, invalid parameters, memory, and the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from ncclbench.cli.run import command
from ncclbench.errors import Unable, UsageError
from ncclbench.measure.case import memory_needed
from ncclbench.moe.expert_placement import ExpertPlacement
from ncclbench.moe.layer_params import LayerParams, LayerSpec
from ncclbench.moe.row_routes import refuse_too_many_rows
from ncclbench.schedule.pattern import build_variants
from ncclbench.topology import Topology
from tests.helpers.moe_cases import case_of, facts_of, run

# Placement.


def test_groups_have_the_requested_number_of_domains() -> None:
    two = Topology.from_hosts(["a"] * 4 + ["b"] * 4)
    placed = ExpertPlacement.of(two, 4, "2x2")
    assert placed.groups.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert placed.domains.tolist() == [[0, 0, 1, 1]] * 2
    assert placed.assumed is None
    inside = ExpertPlacement.of(two, 4, "4x1")
    assert inside.groups.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    alone = ExpertPlacement.of(Topology.single_node(4), 4, "1x4")
    assert alone.domains.tolist() == [[0, 1, 2, 3]]
    assert alone.assumed == "1x4: this job is one domain, played as 4"


@pytest.mark.parametrize(
    ("ep", "shape", "error", "words"),
    [
        (3, "", Unable, "needs a multiple of 3 ranks; this job has 8"),
        (4, "4", UsageError, "RANKSxDOMAINS"),
        (4, "0x4", UsageError, "RANKSxDOMAINS"),
        (4, "2x3", UsageError, "is 6 ranks, and ep is 4"),
        (8, "2x4", Unable, "do not make groups of 4 domains"),
    ],
)
def test_impossible_placement_is_refused(ep: int, shape: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ExpertPlacement.of(Topology.from_hosts(["a"] * 4 + ["b"] * 4), ep, shape)


def test_hierarchical_needs_equal_domains() -> None:
    record = run(case_of(variant="hierarchical"), 3, Topology.from_hosts(["a", "a", "b"]))
    assert record.status == "skipped"
    assert record.reason is not None
    assert "domains of equal size" in record.reason


# Groups of experts.


def test_explicit_expert_groups_equal_those_of_the_model() -> None:
    given, preset = (
        build_variants(case_of(routing="group-limited", top_k=8, routings=1, experts=experts), Topology.single_node(2))
        for experts in (256, 0)
    )
    assert given[0].fingerprint == preset[0].fingerprint


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"experts": 64}, (8, 4)),
        ({"experts": 64, "model": "gpt-oss-20b"}, (8, 4)),
        ({"experts": 64, "groups_kept": 2}, (8, 2)),
        ({"experts": 64, "groups": 4}, (4, 2)),
        ({"experts": 9, "groups": 3, "groups_kept": 2}, (3, 2)),
        ({"experts": 0, "groups": 16}, (16, 8)),
        ({"experts": 0}, (8, 4)),
    ],
)
def test_expert_groups_default_to_the_model(params: dict[str, Any], expected: tuple[int, int]) -> None:
    asked = case_of(routing="group-limited", **params).read(LayerParams)
    router = LayerSpec.of(asked).router
    assert (router.groups, router.groups_kept) == expected


@pytest.mark.parametrize("pattern", ["moe_dispatch", "moe_overlap"])
def test_token_stays_in_the_kept_groups(pattern: str) -> None:
    case = case_of(routing="group-limited", groups=4, groups_kept=1, routings=1, variant="flat")
    first, *_ = build_variants(msgspec.structs.replace(case, pattern=pattern), Topology.single_node(4))
    # The experts of a group are on one rank here, so each token goes to one rank.
    assert np.sum(facts_of(first)["rows"]["rank_dedup"]) == 4 * 12


def test_other_routings_ignore_groups() -> None:
    asked = case_of(experts=0, top_k=60).read(LayerParams)
    assert LayerSpec.of(asked).router.groups == 1


# Refusals.


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"top_k": 17}, "top_k = 17 of 16 experts"),
        ({"tokens": "0"}, "tokens are 0 on every rank"),
        ({"tokens": "0,0,0,0"}, "tokens are 0 on every rank"),
        ({"tokens": "many"}, "whole number, or one for each rank"),
        ({"tokens": "-3"}, "whole number"),
        ({"tokens": str(1 << 25)}, "at most 16777216"),
        ({"hidden": 20}, "multiple of 16"),
        ({"format": "fp4"}, "no row format 'fp4'; there are: bf16, fp8, mxfp8, nvfp4"),
        ({"scales": "separate"}, "bf16 rows have no scales"),
        ({"routing": "random"}, "no routing 'random'"),
        ({"routings": 0}, "routings must be 1 to 256"),
        ({"uneven": 2}, "uneven must be from 0 to 1"),
        ({"capacity": 0}, "capacity must be positive"),
        ({"model": "gpt-5"}, "no model 'gpt-5'"),
        ({"variant": "flatt"}, "variant = 'flatt': it must be one of flat, hierarchical"),
        ({"variant": "padded", "dedup": "selection"}, "dedup = selection goes with"),
        ({"variant": "control", "quad": True}, "every variant but control"),
        ({"ep": -1}, "must not be negative"),
        ({"routing": "trace:/none.jsonl", "tokens": "5"}, "leave tokens and uneven away"),
        ({"routing": "trace:/none.jsonl", "tokens": ""}, "cannot read the trace"),
        ({"routing": "maxvio:100"}, "cannot be"),
        ({"routing": "group-limited", "experts": 0, "model": "gpt-oss-20b"}, "gpt-oss-20b has no groups of experts"),
        ({"routing": "group-limited", "groups": 1}, "one group limits nothing; set groups"),
        ({"routing": "group-limited", "groups": 3}, "16 experts are not 3 equal groups"),
        ({"routing": "group-limited", "experts": 12}, "12 experts are not 8 equal groups; set groups"),
        ({"routing": "group-limited", "groups": 4, "groups_kept": 5}, "groups_kept must be 1 to 4"),
        ({"routing": "group-limited", "groups": 8, "groups_kept": 1}, "1 of 8 groups hold fewer than 4 experts"),
        ({"routing": "group-limited", "groups": -4}, "groups must not be negative"),
        ({"groups": 4}, "go with routing = group-limited, not with uniform"),
        ({"groups_kept": 4, "routing": "zipf:1"}, "go with routing = group-limited, not with zipf:1"),
    ],
)
def test_invalid_parameters_are_refused(params: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build_variants(case_of(**params), Topology.single_node(4))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"ep": 3}, "needs a multiple of 3 ranks"),
        ({"tokens": "1,2,3"}, "tokens has 3 numbers, and this job 4 ranks"),
        ({"experts": 64, "top_k": 40, "format": "fp8"}, "no values whose sums are exact"),
    ],
)
def test_impossible_job_is_skipped_with_a_reason(params: dict[str, Any], words: str) -> None:
    record = run(case_of(**params), 4)
    assert record.status == "skipped"
    assert record.reason is not None
    assert words in record.reason


@pytest.mark.parametrize("axis", [1, 2])
def test_counts_and_displacements_are_int32(axis: int) -> None:
    """No pair exceeds an int32, but the total that one rank sends or receives does."""
    rows = np.zeros((2, 3, 3), np.int64)
    rows[1, 2] = [1 << 30, (1 << 30) - 1, 0]
    rows = rows if axis == 2 else rows.transpose(0, 2, 1)
    refuse_too_many_rows(rows)
    with pytest.raises(Unable, match=r"^2147483648 rows leave or reach one rank, .* at most 2147483647; lower tokens"):
        refuse_too_many_rows(rows + np.eye(3, dtype=np.int64))


@pytest.mark.parametrize(
    ("pattern", "variant"),
    [("moe_overlap", "flat"), *(("moe_dispatch", v) for v in ("flat", "cached", "padded", "hierarchical", "control"))],
)
def test_more_rows_than_int32_counts_are_refused(pattern: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair of ranks has at most 12 rows here, one per token."""
    import ncclbench.moe.row_routes as module

    monkeypatch.setattr(module, "MOST_ROWS", 20)
    case = case_of(variant=variant, placement="2x2", seed=1831)  # a unique seed: no other test has cached it
    with pytest.raises(Unable, match=r"rows leave or reach one rank, .* at most 20"):
        build_variants(msgspec.structs.replace(case, pattern=pattern), Topology.single_node(4))


def test_graph_timing_refuses_counts_on_the_host() -> None:
    first = {v: build_variants(case_of(variant=v), Topology.single_node(2))[0].waits_for_host
             for v in ("flat", "hierarchical", "cached", "padded", "control")}  # fmt: skip
    assert first == {"flat": True, "hierarchical": True, "cached": False, "padded": False, "control": False}


def test_memory_covers_the_busiest_rank_and_variant() -> None:
    topology = Topology.single_node(4)
    needed = memory_needed(case_of(variant="cached", routing="hot-rank:1.0", routings=3), topology)
    each = [
        s.memory_bytes for s in build_variants(case_of(variant="cached", routing="hot-rank:1.0", routings=3), topology)
    ]
    assert needed >= max(each) > memory_needed(case_of(variant="cached", routings=1), topology)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(command, list(args))


def test_readme_command_runs(cli: Callable[..., Any]) -> None:
    done = cli("moe_dispatch", "--dry-run", "--nproc", "32", "--param", "model=deepseek-v3", "--param", "ep=32",
               "--param", "tokens=64", "--param", "routing=zipf:1.0")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "moe_dispatch/bfloat16/917504/isolated/ep=32/routing=zipf:1.0/tokens=64" in done.output


def test_size_and_dtype_options_are_refused(cli: Callable[..., Any]) -> None:
    for flags in (("-b", "1K"), ("-e", "1K"), ("-f", "3"), ("--dtype", "float32")):
        done = cli("moe_dispatch", "--dry-run", "--nproc", "2", *flags)
        assert isinstance(done.exception, UsageError)
        assert "its parameters determine the size" in str(done.exception)


def test_too_much_memory_is_refused_before_allocation(cli: Callable[..., Any]) -> None:
    params = ("tokens=1000", f"hidden={1 << 26}", "routings=1", "experts=8", "top_k=2")
    flags = [text for param in params for text in ("--param", param)]
    done = cli("moe_dispatch", "--transport", "threads", "--nproc", "2", *flags)
    assert isinstance(done.exception, UsageError)
    assert "is free" in str(done.exception)


def test_command_line_run_is_stored(cli: Callable[..., Any], tmp_path: Path) -> None:
    trace = tmp_path / "a.jsonl"
    trace.write_text("".join(
        json.dumps({"rank": r, "token": t, "experts": [r, t + 4]}) + "\n" for r in range(2) for t in range(3)
    ))  # fmt: skip
    done = cli("moe_dispatch", "--transport", "threads", "--nproc", "2", "-n", "6", "-w", "1", "-o", "run",
               "--param", "hidden=32", "--param", "experts=8", "--param", "top_k=2",
               "--param", f"routing=trace:{trace}")  # fmt: skip
    assert done.exit_code == 0, done.output
    (record,) = [json.loads(line) for line in Path("run/results.jsonl").read_text().splitlines()]
    assert (record["status"], record["wrong"], record["facts"][0]["tokens"]["total"]) == ("ok", 0, 6)
    assert Path("run", record["samples"]).exists()


@pytest.mark.parametrize("tokens", ["0,5", "5,0", "3,5"])
@pytest.mark.parametrize(
    "params",
    [{"experts": 70, "top_k": 65}, {"experts": 70, "top_k": 33, "format": "fp8"}, {"top_k": 65, "experts": 66}],
)
def test_too_many_choices_are_skipped_on_every_rank(tokens: str, params: dict[str, Any]) -> None:
    case = case_of(tokens=tokens, hidden=128, routings=1, **params)
    with pytest.raises(Unable, match=f"top {params['top_k']}: no values"):
        memory_needed(case, Topology.single_node(2))  # a dry run asks for this too
    record = run(case, 2)
    assert (record.status, record.wrong) == ("skipped", None)


def test_bad_parameter_names_its_case() -> None:
    case = case_of(tokens=8, routing="maxvio:0", routings=1)
    with pytest.raises(UsageError, match=r"^moe_dispatch/.*routing=maxvio:0.*: routing maxvio:0 is below"):
        build_variants(case, Topology.single_node(2))


def test_late_unable_on_one_rank_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import ncclbench.moe.layer_variants as module
    from ncclbench.moe.token_values import TokenValues

    monkeypatch.setattr(module, "refuse_without_values", lambda _top_k, _format: None)
    honest = TokenValues.numbers

    def unable(values: TokenValues, rank_n: Any, tok_n: Any) -> Any:
        if len(rank_n):
            raise Unable("no values")
        return honest(values, rank_n, tok_n)

    monkeypatch.setattr(TokenValues, "numbers", unable)
    with pytest.raises(RuntimeError, match="found to be impossible when other ranks had begun: no values"):
        run(case_of(tokens="0,5", routings=1), 2)
