"""Routings: known answers, skews, determinism, traces, and what is refused."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncclbench.config.shipped_files import MODELS
from ncclbench.errors import UsageError
from ncclbench.moe import routing_sampling
from ncclbench.moe.model_presets import read_model
from ncclbench.moe.routing import (
    KINDS,
    Router,
    Routing,
    RoutingSpec,
    expected_unique,
    expert_hosts,
)
from ncclbench.moe.routing_sampling import RoutingSampler, token_counts
from ncclbench.moe.routing_statistics import remote
from ncclbench.moe.routing_trace import read_trace
from ncclbench.moe.row_routes import GroupRows
from ncclbench.schedule.counter_rng import bits, exponential, key_of, unit, zipf_weights
from tests.helpers.exhaustive import exhaustive_if

DEEPSEEK, GPT_OSS = read_model("deepseek-v3").router(), read_model("gpt-oss-20b").router()


def sampled(
    kind: str, router: Router, ranks: int, tokens: int, *, seed: int = 0, iteration: int = 0, rails: int = 1
) -> Routing:
    hosts = expert_hosts(router.experts, ranks)
    spec = RoutingSpec.parse(kind)
    one = RoutingSampler(
        spec=spec, router=router, seed=seed, iteration=iteration, hosts=hosts, rails=np.arange(ranks) % rails
    )
    return one.sample(np.full(ranks, tokens))


def rows_of(routing: Routing, domains: int = 1) -> GroupRows:
    ranks = len(routing.tokens)
    return GroupRows(routing.experts, routing.router.experts, np.arange(ranks) * domains // ranks, dedup=True)


# The reference table: unique destination ranks per token, and the remote ones of these.
UNIQUE = [
    (DEEPSEEK, "uniform", 8, 5.295, 4.633),
    (DEEPSEEK, "uniform", 16, 6.523, 6.116),
    (DEEPSEEK, "uniform", 32, 7.267, 7.040),
    (DEEPSEEK, "uniform", 64, 7.676, 7.556),
    (DEEPSEEK, "group-limited", 8, 3.95, None),
    (DEEPSEEK, "group-limited", 16, 5.73, None),
    (DEEPSEEK, "group-limited", 32, 6.85, None),
    (DEEPSEEK, "group-limited", 64, 7.49, None),
    (GPT_OSS, "uniform", 4, 2.818, 2.114),
    (GPT_OSS, "uniform", 8, 3.445, 3.014),
    (GPT_OSS, "uniform", 32, 4.0, 3.875),
]


@pytest.mark.parametrize(("router", "kind", "ranks", "unique", "apart"), UNIQUE)
def test_unique_ranks_per_token_match_the_reference(
    router: Router, kind: str, ranks: int, unique: float, apart: float | None
) -> None:
    routing = sampled(kind, router, ranks, 16384 // ranks)
    rows, tokens = rows_of(routing).rank_rows, routing.tokens.sum()
    assert rows.sum() / tokens == pytest.approx(unique, rel=0.005)
    if apart is not None:
        assert remote(rows).sum() / tokens == pytest.approx(apart, rel=0.005)
        assert expected_unique(router, ranks) == pytest.approx(unique, abs=0.001)


@pytest.mark.parametrize(
    ("kind", "domains", "unique"),
    [("uniform", 2, 1.99), ("uniform", 4, 3.61), ("uniform", 8, 5.29), ("group-limited", 2, 1.97),
     ("group-limited", 4, 3.12), ("group-limited", 8, 3.95)],
)  # fmt: skip
def test_unique_domains_per_token_match_the_reference(kind: str, domains: int, unique: float) -> None:
    routing = sampled(kind, DEEPSEEK, 32, 512)
    assert rows_of(routing, domains).domain_rows.sum() / routing.tokens.sum() == pytest.approx(unique, rel=0.005)


@pytest.mark.parametrize(
    ("model", "ranks", "tokens", "megabytes"),
    [("deepseek-v3", 8, 4096, 272), ("deepseek-v3", 32, 4096, 413), ("deepseek-v3", 64, 4096, 444),
     ("gpt-oss-20b", 4, 4096, 49.9), ("gpt-oss-20b", 8, 1024, 17.8)],
)  # fmt: skip
def test_remote_bytes_per_rank_match_the_reference(model: str, ranks: int, tokens: int, megabytes: float) -> None:
    preset = read_model(model)
    rows = rows_of(sampled("uniform", preset.router(), ranks, tokens)).rank_rows
    assert remote(rows).sum(axis=1).mean() * 2 * preset.hidden / 1e6 == pytest.approx(megabytes, rel=0.01)


@pytest.mark.parametrize("kind", ["uniform", "group-limited", "zipf:1.2", "hot-expert:0.5", "hot-rank:0.3"])
def test_choices_are_distinct_known_and_sorted(kind: str) -> None:
    table = sampled(kind, DEEPSEEK, 4, 700).experts
    assert table.min() >= 0
    assert table.max() < 256
    assert np.all(np.diff(table, axis=2) > 0)


def test_routing_is_the_same_on_every_machine() -> None:
    """Recorded bits: a new version of NumPy, or another processor, must sample the same."""
    found = {
        kind: sampled(kind, DEEPSEEK, 4, 300, seed=7, iteration=3).sha256[:16]
        for kind in ("uniform", "group-limited", "zipf:1.1", "hot-rail:0.4", "maxvio:3")
    }
    assert found == WRITTEN_DOWN


WRITTEN_DOWN = {
    "uniform": "43699d29ee63e977",
    "group-limited": "18cc3deaa4d24a20",
    "zipf:1.1": "b21f0887dec70706",
    "hot-rail:0.4": "1b839a31e228486f",
    "maxvio:3": "a7b527a484519ac1",
}


def test_seed_iteration_and_rank_change_the_routing() -> None:
    base = sampled("uniform", DEEPSEEK, 2, 50)
    assert sampled("uniform", DEEPSEEK, 2, 50).sha256 == base.sha256
    assert sampled("uniform", DEEPSEEK, 2, 50, seed=1).sha256 != base.sha256
    assert sampled("uniform", DEEPSEEK, 2, 50, iteration=1).sha256 != base.sha256
    assert not np.array_equal(base.experts[0], base.experts[1])


def test_choices_do_not_depend_on_other_ranks_tokens() -> None:
    hosts = expert_hosts(256, 2)
    one = RoutingSampler(
        spec=RoutingSpec.parse("uniform"), router=DEEPSEEK, seed=0, iteration=0, hosts=hosts, rails=np.zeros(2, int)
    )
    few, many = one.sample(np.array([5, 9])), one.sample(np.array([5, 2000]))
    assert np.array_equal(few.experts[0, :5], many.experts[0, :5])
    assert np.array_equal(few.experts[1, :9], many.experts[1, :9])
    assert np.all(few.experts[0, 5:] == -1)


def test_every_pair_of_experts_is_equally_likely() -> None:
    """Floyd's algorithm without its second branch would sample 0 more often than 5."""
    router = Router(experts=6, top_k=2)
    table = sampled("uniform", router, 1, 30_000).experts[0]
    counts = np.bincount(table[:, 0] * 6 + table[:, 1], minlength=36)
    expected = 30_000 / 15
    pairs = counts[[a * 6 + b for a in range(6) for b in range(a + 1, 6)]]
    assert np.sum((pairs - expected) ** 2 / expected) < 36  # chi-squared, 14 degrees of freedom: p < 0.001


def test_zipf_first_choices_are_proportional_to_weights() -> None:
    router = Router(experts=8, top_k=1)
    load = np.sort(sampled("zipf:1", router, 1, 80_000).load)[::-1]
    weights = 1 / np.arange(1, 9)
    assert load / load.sum() == pytest.approx(weights / weights.sum(), rel=0.03)


def test_popular_expert_depends_on_the_seed() -> None:
    popular = {int(sampled("zipf:2", DEEPSEEK, 1, 200, seed=seed).load.argmax()) for seed in range(6)}
    assert len(popular) > 2


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_hot_expert_gets_its_share(share: float) -> None:
    routing = sampled(f"hot-expert:{share}", DEEPSEEK, 2, 8000)
    expected = share + (1 - share) * 8 / 256 if share else 8 / 256
    # A hot first choice is not sampled again among the others: those add (1 - share) 8/256.
    assert routing.load.max() / 16000 == pytest.approx(expected, rel=0.02 if share else 0.25)


def test_hot_ranks_and_rails_get_the_load() -> None:
    rows = rows_of(sampled("hot-rank:0.5", DEEPSEEK, 8, 1000)).selection_rows.sum(axis=0)
    assert rows.max() > 1.35 * np.sort(rows)[-2]
    rails = rows_of(sampled("hot-rail:0.8", DEEPSEEK, 8, 1000, rails=4)).selection_rows.sum(axis=0)
    by_rail = rails.reshape(2, 4).sum(axis=0)
    assert by_rail.max() > 1.3 * np.sort(by_rail)[-2]
    assert by_rail.max() == rails[np.arange(8) % 4 == by_rail.argmax()].sum()


@pytest.mark.parametrize("target", exhaustive_if(lambda target: target != 2.0, [0.5, 2.0, 10.0]))
def test_target_max_vio_is_reached(target: float) -> None:
    routing = sampled(f"maxvio:{target}", DEEPSEEK, 4, 4096)
    assert routing.max_vio == pytest.approx(target, rel=0.02)
    assert routing.reached is not None
    assert routing.reached > 0


@pytest.mark.parametrize(("kind", "words"), [("maxvio:0.0", "by chance"), ("maxvio:40", "at most 31")])
def test_impossible_max_vio_is_refused(kind: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        sampled(kind, DEEPSEEK, 2, 64)


def test_max_vio_and_capacity_match_hand_counts() -> None:
    table = np.array([[[0, 1], [0, 2], [0, 3]]], np.int32)
    routing = Routing(table, np.array([3]), Router(experts=4, top_k=2))
    assert routing.load.tolist() == [3, 1, 1, 1]
    assert routing.max_vio == pytest.approx(3 / 1.5 - 1)
    assert routing.over_capacity(1.0) == 1  # the capacity is 2, and one expert has 3
    assert routing.over_capacity(2.0) == 0


def test_hash_covers_counts_and_choices() -> None:
    table = np.array([[[0, 1]]], np.int32)
    routing = Routing(table, np.array([1]), Router(experts=4, top_k=2))
    whole = np.array([1, 1, 2, 1], "<i8").tobytes() + np.array([0, 1], "<i4").tobytes()
    assert routing.sha256 == hashlib.sha256(whole).hexdigest()


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_exponential_samples_equal_minus_logarithm(key: int, counter: int) -> None:
    random = bits(key, [counter])
    assert exponential(random)[0] == pytest.approx(-np.log(unit(random))[0], rel=1e-11, abs=1e-15)


def test_keys_depend_on_the_order_of_their_parts() -> None:
    assert len({key_of(1, 2), key_of(2, 1), key_of(1), key_of(1, 2, 0)}) == 4


def test_zipf_weights_are_powers() -> None:
    assert zipf_weights(5, 1.5) == pytest.approx(np.arange(1, 6) ** -1.5, rel=1e-15)
    assert zipf_weights(3, 0.0).tolist() == [1, 1, 1]


def test_uneven_counts_are_within_their_limits() -> None:
    counts = token_counts(100, 5000, 1.0, 0, 0)
    assert (counts.min(), counts.max()) == (0, 100)
    assert counts.mean() == pytest.approx(50, rel=0.03)
    assert set(token_counts(100, 9, 0.0, 0, 0).tolist()) == {100}
    assert token_counts(100, 2000, 0.2, 0, 0).min() == 80


def test_experts_that_do_not_divide_are_assigned_by_floor() -> None:
    hosts = expert_hosts(10, 4)
    assert hosts.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"experts": 4, "top_k": 5}, "top_k = 5 of 4 experts"),
        ({"experts": 0, "top_k": 1}, "must be positive"),
        ({"experts": 10, "top_k": 1, "groups": 4}, "not 4 equal groups"),
        ({"experts": 8, "top_k": 1, "groups": 4, "groups_kept": 5}, "groups_kept must be 1 to 4"),
        ({"experts": 8, "top_k": 5, "groups": 4, "groups_kept": 2}, "hold fewer than 5"),
    ],
)
def test_impossible_router_is_refused(numbers: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Router(**numbers)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("zopf:1", "no routing 'zopf'; there are: uniform"),
        ("zipf", "zipf needs a value: zipf:NUMBER"),
        ("zipf:", "needs a value"),
        ("zipf:x", "needs a number"),
        ("zipf:-1", "from 0 to 20"),
        ("zipf:nan", "from 0 to 20"),
        ("hot-expert:1.5", "from 0 to 1"),
        ("maxvio:inf", "of at least 0"),
        ("uniform:3", "takes no value"),
        ("trace", "trace:FILE"),
    ],
)
def test_malformed_routing_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        RoutingSpec.parse(text)


def test_routing_text_round_trips() -> None:
    for text in ("uniform", "group-limited", "zipf:1.5", "maxvio:2", "trace:a.jsonl"):
        assert str(RoutingSpec.parse(text)) == text
    assert set(KINDS) >= {"uniform", "trace"}


def test_group_limited_needs_groups() -> None:
    with pytest.raises(UsageError, match="needs a router with 2 groups"):
        sampled("group-limited", GPT_OSS, 2, 4)


SMALL = Router(experts=4, top_k=2)
ROWS: list[dict[str, Any]] = [
    {"rank": 0, "token": 0, "experts": [3, 0]},
    {"rank": 0, "token": 1, "experts": [1, 2]},
    {"rank": 2, "token": 0, "experts": [2, 3]},
]


def write(folder: Path, rows: list[dict[str, Any]], kind: str) -> str:
    path = folder / f"trace.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


both_kinds = pytest.mark.parametrize("kind", ["jsonl", "parquet"])


@both_kinds
def test_trace_is_replayed(tmp_path: Path, kind: str) -> None:
    later = [{**row, "iteration": 1} for row in ROWS[:1]]
    path = write(tmp_path, [{**row, "iteration": 0} for row in reversed(ROWS)] + later, kind)
    first, second = read_trace(path, SMALL, 3)
    assert first.tokens.tolist() == [2, 0, 1]
    assert first.experts.tolist() == [[[0, 3], [1, 2]], [[-1, -1], [-1, -1]], [[2, 3], [-1, -1]]]
    assert second.tokens.tolist() == [1, 0, 0]


BAD_ROWS: list[tuple[list[dict[str, Any]], str]] = [
    ([{"rank": 0, "token": 0, "experts": [0, 4]}], "unknown expert: there are 0 to 3"),
    ([{"rank": 0, "token": 0, "experts": [-1, 2]}], "unknown expert"),
    ([*ROWS, {"rank": 1, "token": 0, "experts": [2, 2]}], r"row 4 \(iteration 0, rank 1, token 0\) chooses an expert"),
    ([{"rank": 3, "token": 0, "experts": [0, 1]}], "names a rank that is not in a job of 3"),
    ([{"rank": 0, "token": 0, "experts": [0]}], "tokens have 1 choices, the model 2"),
    ([{"rank": 0, "token": 0, "experts": [0, 1]}, {"rank": 0, "token": 1, "experts": [0]}], r"\[1, 2\] choices"),
    ([{"rank": 0, "token": 1, "experts": [0, 1]}], "are not 0, 1, 2"),
    ([ROWS[0], ROWS[0]], "are not 0, 1, 2"),
    ([{**ROWS[0], "iteration": 1}], "iteration 0 has no tokens"),
    ([{**ROWS[0], "iteration": -1}], "counts below 0"),
]


@pytest.mark.parametrize("name", ["rank", "token", "iteration", "experts"])
def test_number_outside_int64_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    bad: dict[str, Any] = {"rank": 0, "token": 0, "experts": [0, 1], "iteration": 0}
    bad[name] = [0, 1 << 63] if name == "experts" else 1 << 64
    (tmp_path / "t.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(UsageError, match="line 2: "):
        read_trace(str(tmp_path / "t.jsonl"), SMALL, 3)


@both_kinds
@pytest.mark.parametrize(("rows", "words"), BAD_ROWS)
def test_impossible_trace_is_refused_with_its_row(
    tmp_path: Path, kind: str, rows: list[dict[str, Any]], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        read_trace(write(tmp_path, rows, kind), SMALL, 3)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"", "must end in .jsonl or .parquet"),
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b"{\n", "line 1"),
        ("a.jsonl", b'{"rank": 0, "token": 0, "experts": [0, 1], "expert": 3}\n', "line 1: .*unknown field"),
        ("a.jsonl", b'{"rank": 0, "token": "x", "experts": [0, 1]}\n', "line 1"),
        ("a.parquet", b"PAR1", "cannot read the trace"),
    ],
)
def test_malformed_trace_is_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_trace(str(tmp_path / name), SMALL, 3)


def test_missing_trace_or_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the trace"):
        read_trace(str(tmp_path / "none.jsonl"), SMALL, 3)
    pq.write_table(pa.table({"rank": [0]}), tmp_path / "few.parquet")
    with pytest.raises(UsageError, match="has no column token, experts"):
        read_trace(str(tmp_path / "few.parquet"), SMALL, 3)
    pq.write_table(pa.table({"rank": [0.5], "token": [0], "experts": [[0, 1]]}), tmp_path / "real.parquet")
    with pytest.raises(UsageError, match="must be whole numbers"):
        read_trace(str(tmp_path / "real.parquet"), SMALL, 3)


def test_presets_have_sources_and_unknown_names_are_refused() -> None:
    for name in MODELS.names():
        assert read_model(name).sources
    deepseek = read_model("deepseek-v3")
    assert (deepseek.hidden, deepseek.experts, deepseek.top_k, deepseek.moe_layers) == (7168, 256, 8, 58)
    assert deepseek.layout[0].ep == 32
    with pytest.raises(
        UsageError, match=r"no model 'deepseek'; did you mean 'deepseek-v3'. there are: deepseek-v3, gpt-oss-20b"
    ):
        read_model("deepseek")


def test_max_vio_search_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search takes a second, and cases that differ in variant or format share it."""
    found, searched = routing_sampling.bisect_alpha, list[float]()

    def counted(max_vio: Callable[[float], float], target: float, router: Router) -> float:
        searched.append(target)
        return found(max_vio, target, router)

    monkeypatch.setattr(routing_sampling, "bisect_alpha", counted)
    routing_sampling.find_alpha.cache_clear()
    asked = [(2.0, 1), (2.0, 1), (2.5, 1), (2.0, 2), (2.0, 1)]
    alphas = [
        routing_sampling.find_alpha(target, Router(experts=32, top_k=4), seed, 0, (256, 256)) for target, seed in asked
    ]
    assert searched == [2.0, 2.5, 2.0]
    assert alphas[0] == alphas[1] == alphas[4]
    assert len(set(alphas)) == 3
