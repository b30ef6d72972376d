"""Comparison of a run with an earlier run of the same kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ncclbench.accept.example_runs import write_example
from ncclbench.store.run_directory import read_run
from ncclbench.store.verdict import Verdict
from tests.helpers.acceptance import NODE, RAIL, WORLD, case, example, of, only, verdict_on

pytestmark = pytest.mark.usefixtures("unsynced")


def test_comparable_baseline_is_compared(healthy: Path, tmp_path: Path) -> None:
    base = read_run(healthy)
    slower = (case(NODE, bus_gb_per_s=478 * 0.97), RAIL, case(WORLD, bus_gb_per_s=386.6 * 0.9))
    document = verdict_on(write_example(tmp_path / "made", example(cases=slower)), baseline=base)
    (result,) = of(document, "baseline", Verdict.FAIL)
    assert result.subject == WORLD.id
    assert "11.1% slower" in result.reason
    assert {row["run"] for row in result.evidence} == {"baseline", "this"}
    assert len(of(document, "baseline", Verdict.PASS)) == 2


@pytest.mark.parametrize(
    ("base", "now", "words"),
    [
        ({"starts": 1}, {}, "only 1 process start compared, needs 3"),
        ({}, {"noise": 0.3}, "the spans of the starts overlap"),
        ({"samples": 3}, {}, "too few samples to compare"),
    ],
)
def test_baseline_with_too_little_data_never_fails_a_run(
    base: dict[str, Any], now: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """The run is 20% slower than each baseline."""
    usual = case(WORLD, bus_gb_per_s=480, samples=base.get("samples", 60))
    before = write_example(tmp_path / "before", example(cases=(usual,), starts=base.get("starts", 3)))
    after = write_example(tmp_path / "after", example(cases=(case(WORLD, bus_gb_per_s=400, **now),), seed=2))
    (result,) = of(verdict_on(after, baseline=read_run(before)), "baseline", Verdict.INCONCLUSIVE)
    assert words in result.reason
    sure = write_example(tmp_path / "sure", example(cases=(case(WORLD, bus_gb_per_s=480),)))
    quiet = write_example(tmp_path / "quiet", example(cases=(case(WORLD, bus_gb_per_s=400),)))
    assert of(verdict_on(quiet, baseline=read_run(sure)), "baseline", Verdict.FAIL), "which would fail otherwise"


@pytest.mark.parametrize(
    "change",
    [
        {"transport": "cupy_nccl"},
        {"nodes": 4},
        {"software": {0: {"versions": {"nccl": "2.27.3"}}}},
        {"gpu": "NVIDIA H100 80GB HBM3e"},
        {"domain_nodes": 2},
    ],
)
def test_incomparable_baseline_is_refused_unless_forced(change: dict[str, Any], healthy: Path, tmp_path: Path) -> None:
    base = read_run(write_example(tmp_path / "base", example(**change)))
    refused = verdict_on(healthy, baseline=base)
    assert "not compared with base" in only(refused, "baseline", Verdict.INCONCLUSIVE).reason
    assert "forced" not in refused.stamps
    forced = verdict_on(healthy, baseline=base, forced=True)
    assert "forced" in forced.stamps
    assert not of(forced, "baseline", Verdict.INCONCLUSIVE)


def test_case_that_one_run_lacks(healthy: Path, tmp_path: Path) -> None:
    base = read_run(write_example(tmp_path / "base", example(cases=(NODE, RAIL))))
    document = verdict_on(healthy, baseline=base)
    assert "has no such case" in of(document, "baseline", Verdict.INCONCLUSIVE)[0].reason
    other = verdict_on(base.path, baseline=read_run(healthy))
    assert of(other, "baseline", Verdict.NOT_RUN)[0].required
