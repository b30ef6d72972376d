"""Floors and ceilings of figures, noise, and too few samples or starts to judge."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from ncclbench.accept.example_runs import ExampleCase, write_example
from ncclbench.accept.profile import load_profile, parse_profile
from ncclbench.errors import Exit
from ncclbench.store.records import Record
from ncclbench.store.verdict import Action, Verdict
from tests.helpers.acceptance import NODE, RAIL, WORLD, G, M, case, example, made, of, only, verdict_on
from tests.helpers.stored import plain

pytestmark = pytest.mark.usefixtures("unsynced")


def test_result_holds_figure_bound_source_and_records(healthy: Path) -> None:
    results = [r for r in of(verdict_on(healthy), "floor", Verdict.PASS) if r.subject == WORLD.id]
    (entry, *rows) = plain(results[0].evidence)
    assert (entry["figure"], entry["tolerance"], entry["basis"]) == (386.6, 0.05, "published")
    assert "coreweave" in entry["source"]
    assert entry["date"]
    assert [row["start"] for row in rows] == [0, 1, 2]
    assert all(row["samples"].endswith(".parquet") and row["low"] < row["figure"] < row["high"] for row in rows)


@pytest.mark.parametrize(("share", "verdict"), [(1.0, Verdict.PASS), (0.96, Verdict.PASS), (0.9, Verdict.FAIL)])
def test_op_below_its_floor_fails(share: float, verdict: Verdict, tmp_path: Path) -> None:
    """10% below 386.6 misses the tolerance of 5%; 4% below is within it."""
    document = made(tmp_path, cases=(NODE, RAIL, case(WORLD, bus_gb_per_s=386.6 * share)))
    assert document.verdict is verdict
    if verdict is Verdict.FAIL:
        assert document.exit_code == Exit.FAIL
        failed = only(document, "floor", Verdict.FAIL)
        assert failed.subject == WORLD.id
        assert failed.action is Action.CHECK_SWITCH
        assert "wanted >= 367.3" in failed.reason


def test_three_samples_are_too_few(tmp_path: Path) -> None:
    document = made(tmp_path, cases=(NODE, RAIL, case(WORLD, samples=3)))
    assert (document.verdict, document.exit_code) == (Verdict.INCONCLUSIVE, Exit.INCONCLUSIVE)
    (floor,) = of(document, "floor", Verdict.INCONCLUSIVE)
    assert "too few samples to judge: 3, needs 6" in floor.reason


def test_profile_can_require_more_samples(healthy: Path) -> None:
    text = load_profile("h100-hgx-ib").text + "\n[limits]\nmin_samples = 61\n"
    document = verdict_on(healthy, parse_profile(text, "p"))
    for check in ("floor", "dispersion"):
        results = of(document, check, Verdict.INCONCLUSIVE)
        assert [r.subject for r in results] == [NODE.id, RAIL.id, WORLD.id]
        assert all("60, needs 61" in r.reason for r in results)


def test_three_bad_samples_do_not_fail_a_rack(tmp_path: Path) -> None:
    document = made(tmp_path, cases=(NODE, RAIL, case(WORLD, samples=3, bus_gb_per_s=100)))
    assert document.verdict is Verdict.INCONCLUSIVE


def test_profile_can_require_more_samples_for_p99(tmp_path: Path) -> None:
    text = load_profile("h100-hgx-ib").text + (
        '\n[limits]\np99_samples = 601\n[[floor]]\nwhere = { pattern = "all_reduce", bytes = "8G", nodes = 8 }\n'
        'metric = "time_us.p99"\nat_most = 1.0\ntolerance = 0.0\nbasis = "measured"\nsource = "s"\ndate = "d"\n'
    )
    document = made(tmp_path, parse_profile(text, "p"), cases=(NODE, case(WORLD, samples=600)))
    (result,) = [r for r in of(document, "floor") if r.subject == WORLD.id and "p99" in r.reason]
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "600, needs 601" in result.reason


@pytest.mark.parametrize(("samples", "judged"), [(60, False), (298, False), (299, True), (600, True)])
def test_p99_is_not_judged_from_too_few_samples(samples: int, judged: bool, tmp_path: Path) -> None:
    floor = (
        '\n[[floor]]\nwhere = { pattern = "all_reduce", bytes = "8G", nodes = 8 }\nmetric = "time_us.p99"\n'
        'at_most = 1000.0\ntolerance = 0.0\nbasis = "measured"\nsource = "s"\ndate = "d"\n'
    )
    rules = parse_profile(load_profile("h100-hgx-ib").text + floor, "p")
    document = made(tmp_path, rules, cases=(NODE, RAIL, case(WORLD, samples=samples)))
    (result,) = [r for r in of(document, "floor") if r.subject == WORLD.id and "p99" in r.reason]
    assert result.verdict is (Verdict.FAIL if judged and samples == 600 else Verdict.INCONCLUSIVE)
    assert ("too few samples" in result.reason) is not (samples == 600)


def test_noise_is_inconclusive_with_a_reason(tmp_path: Path) -> None:
    document = made(tmp_path, cases=(NODE, RAIL, case(WORLD, noise=0.4, samples=12)))
    (result,) = of(document, "dispersion", Verdict.INCONCLUSIVE)
    assert result.subject == WORLD.id
    assert "too noisy" in result.reason
    assert document.verdict is not Verdict.PASS


def test_long_tail_is_inconclusive(tmp_path: Path) -> None:
    def edit(record: Record) -> Record:
        assert record.time_us is not None
        tail = msgspec.structs.replace(record.time_us, p95=3 * record.time_us.p50)
        return msgspec.structs.replace(record, time_us=tail) if record.case == RAIL.id else record

    assert "long tail" in only(made(tmp_path, edit=edit), "dispersion", Verdict.INCONCLUSIVE).reason


def scaled(record: Record, factor: float) -> Record:
    """The record with all times multiplied by `factor`; its samples no longer agree."""
    assert record.time_us is not None
    assert record.bus_gb_per_s is not None
    times = {
        name: value * factor if name not in ("n", "cv") and value is not None else value
        for name, value in msgspec.structs.asdict(record.time_us).items()
    }
    summary = msgspec.convert(times, type(record.time_us))
    return msgspec.structs.replace(record, time_us=summary, bus_gb_per_s=record.bus_gb_per_s / factor, groups=[])


def test_wide_spread_between_starts_is_inconclusive(tmp_path: Path) -> None:
    document = made(tmp_path, edit=lambda r: scaled(r, 0.9) if (r.start, r.case) == (2, WORLD.id) else r)
    (result,) = of(document, "starts", Verdict.INCONCLUSIVE)
    assert result.subject == WORLD.id
    assert re.search(r"1\d\.\d% apart", result.reason)
    assert "limit 5.0%" in result.reason


def test_one_bad_start_of_three_is_inconclusive(tmp_path: Path) -> None:
    document = made(tmp_path, edit=lambda r: scaled(r, 1.2) if (r.start, r.case) == (1, WORLD.id) else r)
    (result,) = of(document, "floor", Verdict.INCONCLUSIVE)
    assert "2 of 3 starts are clearly good, 1 clearly bad" in result.reason


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (ExampleCase(pattern="reduce_scatter", nbytes=8 * G, bus_gb_per_s=400), "no entry for reduce_scatter of 8G"),
        (
            ExampleCase(pattern="all_reduce", nbytes=3 * G, bus_gb_per_s=400),
            "the nearest is: all_reduce, group world, bytes 4G",
        ),
    ],
)
def test_missing_entry_names_the_case_and_the_nearest_entry(odd: ExampleCase, words: str, tmp_path: Path) -> None:
    document = made(tmp_path, cases=(NODE, RAIL, WORLD, odd))
    result = only(document, "floor", Verdict.INCONCLUSIVE)
    assert words in result.reason
    assert "nearest is" in result.reason


def test_interval_across_the_floor_is_inconclusive(tmp_path: Path) -> None:
    at_the_floor = case(WORLD, bus_gb_per_s=386.6 * 0.95, noise=0.02)
    (result,) = of(made(tmp_path, cases=(NODE, RAIL, at_the_floor)), "floor", Verdict.INCONCLUSIVE)
    assert "0 of 3 starts are clearly good" in result.reason
    assert all(row["low"] < 386.6 * 0.95 for row in plain(result.evidence) if "low" in row)


def test_interval_of_a_time_across_the_ceiling_is_inconclusive(tmp_path: Path) -> None:
    """19.2 us and 1.5 times that."""
    rate = 128 * 2 * 7 / 8 / (19.2e-6 * 1.5) / 1e9
    small = ExampleCase(pattern="all_reduce", nbytes=128, bus_gb_per_s=rate, noise=0.02, group="node")
    document = made(tmp_path, cases=(NODE, small), nodes=1)
    (result,) = [r for r in of(document, "floor") if r.subject == small.id]
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "0 of 3 starts are clearly good" in result.reason


def test_two_bad_starts_of_three_fail(tmp_path: Path) -> None:
    document = made(tmp_path, edit=lambda r: scaled(r, 1.2) if r.start > 0 and r.case == WORLD.id else r)
    assert [r.subject for r in of(document, "floor", Verdict.FAIL)] == [WORLD.id]


def test_impossible_rate_is_inconclusive(tmp_path: Path) -> None:
    for number, rate in enumerate((-400.0, 0.0)):

        def edit(record: Record, rate: float = rate) -> Record:
            return msgspec.structs.replace(record, bus_gb_per_s=rate) if record.case == WORLD.id else record

        document = verdict_on(write_example(tmp_path / str(number), example(edit=edit)))
        (result,) = of(document, "floor", Verdict.INCONCLUSIVE)
        assert "no possible figure" in result.reason
        assert not of(document, "floor", Verdict.FAIL)


def test_missed_assumed_figure_is_inconclusive_and_never_fails(tmp_path: Path) -> None:
    slow = (NODE, RAIL, case(WORLD, bus_gb_per_s=100))
    document = made(tmp_path, nodes=4, cases=slow)
    (result,) = of(document, "floor", Verdict.INCONCLUSIVE)
    assert "assumed" in result.reason
    assert document.verdict is Verdict.INCONCLUSIVE


def test_assumed_figures_alone_cannot_pass_a_run(tmp_path: Path) -> None:
    document = made(tmp_path, "b200-hgx", gpu="NVIDIA B200", nodes=1, cases=(case(WORLD, bus_gb_per_s=800),))
    assert of(document, "floor", Verdict.PASS), "the figure is met"
    assert document.verdict is Verdict.INCONCLUSIVE
    assert "no figure was held against a published or measured one" in document.reasons


def test_unmeasured_required_entry_is_inconclusive(tmp_path: Path) -> None:
    document = made(tmp_path, cases=(RAIL, NODE))
    assert document.verdict is Verdict.INCONCLUSIVE
    (missing,) = [r for r in of(document, "floor", Verdict.NOT_RUN) if r.required]
    assert "nodes 8" in missing.subject


def test_result_between_bad_and_good_must_be_monitored(tmp_path: Path) -> None:
    rack = {"gpu": "NVIDIA GB300", "nodes": 36, "ranks_per_node": 4, "domain_nodes": 18}
    inside = ExampleCase(pattern="all_reduce", nbytes=8 * G, bus_gb_per_s=890, group="domain", samples=12)
    for number, (figure, verdict) in enumerate(((220, Verdict.PASS), (180, Verdict.INCONCLUSIVE), (140, Verdict.FAIL))):
        cases = (inside, case(WORLD, bus_gb_per_s=figure, samples=12))
        document = verdict_on(write_example(tmp_path / str(number), example(**rack, cases=cases)), "gb300-nvl72")
        assert document.verdict is verdict, document.reasons


def test_entry_takes_precedence_over_an_exemption_for_noise(tmp_path: Path) -> None:
    """The rate of 128 bytes is exempt, but a time for them is published."""
    rate = 128 * 2 * 7 / 8 / 10e-6 / 1e9
    small = ExampleCase(pattern="all_reduce", nbytes=128, bus_gb_per_s=rate, noise=0.4, samples=12, group="node")
    document = made(tmp_path, cases=(NODE, small), nodes=1)
    assert [r.subject for r in of(document, "dispersion", Verdict.INCONCLUSIVE)] == [small.id]


def test_noise_of_an_exempt_case_is_ignored(tmp_path: Path) -> None:
    small = ExampleCase(pattern="all_reduce", nbytes=M, bus_gb_per_s=40, noise=0.4, samples=12)
    document = made(tmp_path, cases=(NODE, RAIL, WORLD, small))
    verdicts = {(r.check, r.verdict) for r in document.checks if r.subject == small.id}
    assert {check for check, verdict in verdicts if verdict is Verdict.NOT_RUN} == {
        "dispersion", "floor", "skew", "starts",
    }  # fmt: skip
    assert document.verdict is Verdict.PASS
