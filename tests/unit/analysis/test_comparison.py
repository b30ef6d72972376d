"""compare: its statistics, checked with SciPy and by simulation, its refusals and its exit codes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ncclbench.analysis.comparison import ALPHA, MARGIN, Comparison, compare
from ncclbench.analysis.run_sets import Side, read_side
from ncclbench.analysis.significance import bootstrap, cliff, compute, holm, kruskal, student
from ncclbench.cli import main
from ncclbench.errors import UsageError
from ncclbench.store.run_writer import RunWriter
from ncclbench_reports.common.comparison_formats import RENDERERS
from tests.helpers.cluster_runs import CASE, HOSTILE, cluster_manifest, collective, small_run
from tests.helpers.stored import like

values = st.floats(-5, 5).map(lambda value: round(value, 2))
sides = st.tuples(st.lists(values, min_size=2, max_size=7), st.lists(values, min_size=2, max_size=7))


# ---- statistics ------------------------------------------------------------------------------------------------------


@given(sides)
def test_kruskal_wallis_equals_scipy(pair: tuple[list[float], list[float]]) -> None:
    base, new = pair
    ours = float(kruskal(np.array([base]), np.array([new]))[0])
    if len({*base, *new}) == 1:
        assert ours == 1.0
    else:
        assert ours == pytest.approx(stats.kruskal(base, new).pvalue, rel=1e-9, abs=1e-12)


@given(sides)
def test_students_t_equals_scipy(pair: tuple[list[float], list[float]]) -> None:
    base, new = pair
    slower, faster = (float(p[0]) for p in student(np.array([base]), np.array([new])))
    if min(np.std(base), np.std(new)) > 1e-3:  # scipy warns of samples without variation
        assert slower == pytest.approx(stats.ttest_ind(new, base, alternative="greater").pvalue, rel=1e-6, abs=1e-12)
        assert faster == pytest.approx(stats.ttest_ind(new, base, alternative="less").pvalue, rel=1e-6, abs=1e-12)


def test_difference_without_variation_is_certain() -> None:
    base_CM = np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    new_CN = np.array([[1.5, 1.5], [0.5, 0.5], [1.0, 1.0]])
    slower, faster = student(base_CM, new_CN)
    assert slower.tolist() == [0.0, 1.0, 0.5]
    assert faster.tolist() == [1.0, 0.0, 0.5]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_equals_its_definition(p: list[float]) -> None:
    adjusted = holm(np.array(p))
    order = sorted(range(len(p)), key=lambda k: p[k])
    rejected: set[int] = set()
    # Reject the smallest p while it is below alpha over the number of remaining hypotheses.
    for step, k in enumerate(order):
        if p[k] * (len(p) - step) > ALPHA:
            break
        rejected.add(k)
    assert {k for k in range(len(p)) if adjusted[k] <= ALPHA} == rejected
    assert (adjusted >= np.array(p)).all()


def test_cliffs_delta_counts_pairs() -> None:
    assert cliff(np.array([[1.0, 2.0]]), np.array([[3.0, 2.0]]))[0] == pytest.approx(3 / 4)
    assert cliff(np.array([[1.0, 2.0]]), np.array([[1.0, 2.0]]))[0] == 0


def test_bootstrap_covers_the_true_ratio() -> None:
    rng = np.random.default_rng(5)
    base_CM, new_CN = rng.normal(0, 0.02, (300, 12)), rng.normal(0.05, 0.02, (300, 12))
    low_C, high_C = bootstrap(base_CM, new_CN, 0)
    covered = ((low_C <= 0.05) & (high_C >= 0.05)).mean()
    assert 0.88 <= covered <= 1.0
    assert (low_C < high_C).all()


def verdicts(base_PCM: Any, new_PCN: Any) -> Any:
    """Whether each of P pairs is 'worse' in each of C cases, decided as in `compare`."""
    pairs, cases = base_PCM.shape[:2]
    slower_PC = np.empty((pairs, cases), dtype=bool)
    for k in range(pairs):
        p_slower, _ = student(base_PCM[k], new_PCN[k])
        ratio = np.exp(np.median(new_PCN[k], axis=1) - np.median(base_PCM[k], axis=1))
        slower_PC[k] = (holm(p_slower) <= ALPHA) & (ratio > 1 + MARGIN)
    return slower_PC


@pytest.mark.parametrize("cases", [1, 20])
def test_false_alarms_stay_below_5_percent(cases: int) -> None:
    """1,000 pairs of runs with 5 starts and 2% between starts; one false case makes a pair a false alarm."""
    rng = np.random.default_rng(7)
    base_PCM, new_PCN = (rng.normal(0, 0.02, (1000, cases, 5)) for _ in range(2))
    assert verdicts(base_PCM, new_PCN).any(axis=1).mean() <= 0.05


def test_5_percent_slowdown_is_found_with_2_percent_noise() -> None:
    rng = np.random.default_rng(8)
    base_PCM, new_PCN = (rng.normal(shift, 0.02, (1000, 1, 5)) for shift in (0, np.log(1.05)))
    assert verdicts(base_PCM, new_PCN).mean() >= 0.95


def test_slowdown_of_all_of_twenty_cases_is_found() -> None:
    rng = np.random.default_rng(9)
    base_PCM, new_PCN = (rng.normal(shift, 0.02, (1000, 20, 5)) for shift in (0, np.log(1.05)))
    assert verdicts(base_PCM, new_PCN).any(axis=1).mean() >= 0.95


def test_twenty_cases_raise_false_alarms_without_holm() -> None:
    """The mutation that the simulation of false alarms must catch."""
    rng = np.random.default_rng(7)
    base_CM, new_CN = (rng.normal(0, 0.02, (20_000, 5)) for _ in range(2))
    p_slower, _ = student(base_CM, new_CN)
    assert (p_slower.reshape(1000, 20) <= ALPHA).any(axis=1).mean() > 0.3


def test_compute_returns_ratios_not_logarithms() -> None:
    found = compute(np.log(np.full((1, 3), 100.0)), np.log(np.full((1, 3), 150.0)))
    assert found.ratio[0] == pytest.approx(1.5)
    assert found.low[0] == pytest.approx(1.5)
    assert found.high[0] == pytest.approx(1.5)


# ---- from runs to verdicts -------------------------------------------------------------------------------------------


def side(path: Path, scale: float, starts: int = 5, **fields: Any) -> Path:
    for k in range(starts):
        small_run(path / str(k), scale=scale * (1 + 0.002 * ((3 * k) % 5)), **fields)
    return path


def compared(base: Path, new: Path, **options: Any) -> Comparison:
    return compare(read_side(base), read_side(new), **options)


@pytest.mark.parametrize(("scale", "word"), [(1.0, "same"), (1.06, "worse"), (0.94, "better")])
def test_verdicts(scale: float, word: str, tmp_path: Path) -> None:
    found = compared(side(tmp_path / "base", 1.0), side(tmp_path / "new", scale))
    assert found.verdict == word
    timed = [case for case in found.cases if case.ratio is not None]
    assert len(timed) == 6
    for case in timed:
        assert case.verdict == word
        assert case.ratio == pytest.approx(scale, rel=0.01)
        assert case.ratio is not None
        assert case.ratio_lo is not None
        assert case.ratio_hi is not None
        assert case.ratio_lo <= case.ratio <= case.ratio_hi
        assert (case.base_starts, case.new_starts) == (5, 5)
    (skipped,) = (case for case in found.cases if case.ratio is None)
    assert skipped.verdict == "not comparable"
    assert skipped.reason == "BASE is skipped: no CUDA graphs on the host"


def test_starts_of_one_run_count_as_starts(tmp_path: Path) -> None:
    for name, scale in (("base", 1.0), ("new", 1.2)):
        writer = RunWriter.create(tmp_path / name, cluster_manifest())
        for start in range(3):
            record, _ = collective(1024, scale=scale * (1 + start / 500), start=start)
            writer.append(record)
    (case,) = compared(tmp_path / "base", tmp_path / "new").cases
    assert (case.base_starts, case.new_starts, case.verdict) == (3, 3, "worse")


def test_one_start_per_side_needs_ten_percent_and_adds_a_remark(tmp_path: Path) -> None:
    small_run(tmp_path / "base")
    for name, scale, word in (("near", 1.06, "same"), ("far", 1.5, "worse")):
        small_run(tmp_path / name, scale=scale)
        found = compared(tmp_path / "base", tmp_path / name)
        assert found.verdict == word
        assert "one process start per side" in found.remarks[0]


def test_failed_case_is_worse_and_missing_case_not_comparable(tmp_path: Path) -> None:
    fine, _ = collective(1024)
    other, _ = collective(2048)
    wrong = like(fine, status="wrong", reason="17 elements differ", wrong=17)
    for name, records in (("base", [fine, other]), ("new", [wrong])):
        writer = RunWriter.create(tmp_path / name, cluster_manifest())
        for record in records:
            writer.append(record)
    first, second = compared(tmp_path / "base", tmp_path / "new").cases
    assert (first.verdict, first.reason) == ("worse", "NEW is wrong: 17 elements differ")
    assert (second.verdict, second.reason) == ("not comparable", "NEW has no such case")


UNLIKE: dict[str, tuple[dict[str, Any], str]] = {
    "ranks": ({"world_size": 8}, "fabric.ranks was 6, and now is 8"),
    "transport": ({"transport": "nccl"}, "fabric.transport was 'gloo', and now is 'nccl'"),
    "simulated": ({"simulated": True}, "fabric.simulated was False, and now is True"),
    "topology": ({"topology": {"nodes": [0] * 6, "node_names": ["n0"]}}, "fabric.nodes[2] was 1, and now is 0"),
    "processor": ({"provenance": {"cpu": "another"}}, "fabric.cpu was None, and now is 'another'"),
    "settings": (
        {"plan": {"name": "made", "cases": [{"id": CASE, "settings": {"warmup": 50}}]}},
        f"settings.{CASE}.warmup was 5, and now is 50",
    ),
}


@pytest.mark.parametrize("what", sorted(UNLIKE))
def test_incomparable_sides_are_refused_unless_forced(what: str, tmp_path: Path) -> None:
    fields, words = UNLIKE[what]
    small_run(tmp_path / "base")
    small_run(tmp_path / "new", **fields)
    with pytest.raises(UsageError, match="not comparable: ") as refused:
        compared(tmp_path / "base", tmp_path / "new")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    forced = compared(tmp_path / "base", tmp_path / "new", force=True)
    assert any(words in line for line in forced.forced)
    for fmt, render in RENDERERS.items():
        assert fmt == "json" or "forced" in render(forced)


def test_incomparable_runs_of_one_side_are_refused(tmp_path: Path) -> None:
    small_run(tmp_path / "base" / "0")
    small_run(tmp_path / "base" / "1", world_size=8)
    small_run(tmp_path / "new")
    with pytest.raises(UsageError, match=r"base/1: fabric\.ranks was 6, and now is 8"):
        compared(tmp_path / "base", tmp_path / "new")


def test_another_record_version_is_refused(tmp_path: Path) -> None:
    base = read_side(small_run(tmp_path / "base"))
    run = read_side(small_run(tmp_path / "new")).runs[0]
    later = Side("new", (dataclasses.replace(run, manifest=like(run.manifest, schema=2)),))
    with pytest.raises(UsageError, match=r"record version\.manifest was 1, and now is 2"):
        compare(base, later)


def test_measuring_time_and_versions_may_differ(tmp_path: Path) -> None:
    small_run(tmp_path / "base")
    plan = {"name": "made", "cases": [{"id": CASE, "settings": {"warmup": 5, "max_seconds": 9, "timeout": 1}}]}
    small_run(tmp_path / "new", plan=plan, provenance={"versions": {"torch": "9"}, "ncclbench": "0.1"})
    found = compared(tmp_path / "base", tmp_path / "new")
    assert any("versions.torch was '2.13.0', and now is '9'" in remark for remark in found.remarks)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ncclbench(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["ncclbench", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, out, err

    return call


@pytest.mark.parametrize(("scale", "code"), [(1.0, 0), (1.2, 1), (0.8, 0)])
def test_exit_codes(scale: float, code: int, ncclbench: Callable[..., Any], tmp_path: Path) -> None:
    side(tmp_path / "base", 1.0)
    side(tmp_path / "new", scale)
    left, out, err = ncclbench("compare", str(tmp_path / "base"), str(tmp_path / "new"))
    assert left == code, err
    assert out.splitlines()[-1].startswith({0: ("same: ", "better: "), 1: ("worse: ",)}[code])


def test_nothing_to_compare_is_inconclusive(ncclbench: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("base", "new"):
        RunWriter.create(tmp_path / name, cluster_manifest())
    code, out, _ = ncclbench("compare", str(tmp_path / "base"), str(tmp_path / "new"))
    assert code == 5
    assert out.splitlines()[-1] == "not comparable: no cases"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere", "base"), "nowhere is no run directory"),
        (("base", "empty"), "empty is no run directory, and has none in it"),
        (("base", "base"), "BASE and NEW are both base"),
        (("base", "new", "--format", "htm"), "did you mean 'html'?"),
        (("base", "new", "--margin", "-1"), "--margin must be from 0 to below 1, got -1"),
        (("base", "new", "--margin", "nan"), "--margin must be"),
        (("base",), "NEW"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: tuple[str, ...],
    words: str,
    ncclbench: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    small_run(Path("base"))
    small_run(Path("new"))
    Path("empty").mkdir()
    code, out, err = ncclbench("compare", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_all_formats_have_the_same_figures_and_escape_names(tmp_path: Path) -> None:
    for name, scale in (("base", 1.0), ("new", 1.2)):
        for k in range(3):
            writer = RunWriter.create(tmp_path / name / str(k), cluster_manifest())
            record, _ = collective(1024, scale=scale * (1 + k / 300))
            writer.append(like(record, case=HOSTILE))
    found = compared(tmp_path / "base", tmp_path / "new")
    (case,) = msgspec.json.decode(RENDERERS["json"](found))["cases"]
    assert case["verdict"] == "worse"
    for fmt in ("table", "markdown", "html"):
        text = RENDERERS[fmt](found)
        assert f"{case['ratio']:.2f}" in text
        assert "\u202e" not in text
        assert fmt == "table" or "<script>alert" not in text
