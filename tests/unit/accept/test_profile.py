"""The shipped profiles compared with published figures, and the refusals of invalid profiles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncclbench.accept.check_context import CheckContext
from ncclbench.accept.conditions import read_test, release_of
from ncclbench.accept.example_runs import Example, ExampleCase, write_example
from ncclbench.accept.judge import judge
from ncclbench.accept.profile import load_profile, parse_profile
from ncclbench.accept.profile_from_run import make_profile
from ncclbench.config.shipped_files import PROFILES
from ncclbench.errors import UsageError
from ncclbench.plan.plan import read_plan
from ncclbench.store.records import Record
from ncclbench.store.run_directory import read_run
from ncclbench.store.verdict import Verdict
from tests.helpers.stored import known, like

pytestmark = pytest.mark.usefixtures("unsynced")

G = 1 << 30
H100, H200, B200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA B200"
GB200, GB300 = "NVIDIA GB200", "NVIDIA GB300"
HGX: dict[str, Any] = {"ranks_per_node": 8}
OFF, ABSENT, UNSAID = ({**HGX, "nvls": state} for state in ("off", "unavailable", "unknown"))
RACK: dict[str, Any] = {"ranks_per_node": 4, "domain_nodes": 18}
PASS, FAIL, OPEN = Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE

# profile, GPU, nodes, layout, S in GB, GB/s of an all-reduce over all ranks, verdict of the floor, source.
FIGURES = [
    ("h100-hgx-ib", H100, 1, HGX, 8, 480, PASS, "nccl-tests#212"),
    ("h100-hgx-ib", H100, 1, HGX, 8, 476, PASS, "nccl-tests#212: expected"),
    ("h100-hgx-ib", H100, 1, HGX, 8, 367, FAIL, "nccl#1455: as without NVLS, which is on"),
    ("h100-hgx-ib", H100, 1, ABSENT, 8, 367, FAIL, "nccl#1455: NVLS is missing, not switched off"),
    ("h100-hgx-ib", H100, 1, UNSAID, 8, 367, FAIL, "the log does not state that NVLS was off"),
    ("h100-hgx-ib", H100, 1, OFF, 8, 367, PASS, "nccl#1455: NVLS off"),
    ("h100-hgx-ib", H100, 1, OFF, 8, 330, FAIL, "nccl#1455: less"),
    ("h100-hgx-ib", H100, 1, {**OFF, "ranks_per_node": 6}, 8, 367, PASS, "as 4 and 8"),
    ("h100-hgx-ib", H100, 1, {**OFF, "ranks_per_node": 4}, 8, 367, PASS, "nccl#1455: 4 GPUs, with NVLS or without"),
    ("h100-hgx-roce", H100, 1, OFF, 8, 367, PASS, "nccl#1455: NVLS off"),
    ("h100-hgx-ib", H100, 1, {"ranks_per_node": 4}, 8, 367, PASS, "nccl#1455: 4 GPUs"),
    ("h100-hgx-ib", H100, 1, {"ranks_per_node": 5}, 8, 420, PASS, "nccl-tests#290"),
    ("h100-hgx-ib", H100, 1, {"ranks_per_node": 6}, 8, 440, PASS, "nccl-tests#290"),
    ("h100-hgx-ib", H100, 1, {"ranks_per_node": 7}, 8, 460, PASS, "nccl-tests#290"),
    ("h100-hgx-ib", H100, 2, HGX, 8, 440.6, PASS, "coreweave/nccl-tests"),
    ("h100-hgx-ib", H100, 2, HGX, 8, 330, FAIL, "nccl#1221: without NVLS"),
    ("h100-hgx-ib", H100, 8, HGX, 8, 386.6, PASS, "coreweave/nccl-tests"),
    ("h100-hgx-ib", H100, 8, HGX, 8, 200, FAIL, "half of it"),
    ("h100-hgx-ib", H100, 8, HGX, 8, 3, FAIL, "aicr#2689: sockets"),
    ("h100-hgx-ib", H100, 4, HGX, 8, 200, OPEN, "no figure for 4 nodes"),
    ("h100-hgx-roce", H100, 1, HGX, 8, 480, PASS, "nccl-tests#212"),
    ("h100-hgx-roce", H100, 2, HGX, 8, 430, PASS, "nccl#1221: with NVLS"),
    ("h100-hgx-roce", H100, 2, HGX, 8, 330, OPEN, "nccl#1221: without"),
    ("h100-hgx-roce", H100, 2, HGX, 8, 200, FAIL, "half of it"),
    ("h200-hgx", H200, 1, HGX, 8, 475, PASS, "nccl-tests#272"),
    ("h200-hgx", H200, 1, HGX, 8, 367, FAIL, "as without NVLS, which is on"),
    ("h200-hgx", H200, 1, ABSENT, 8, 367, FAIL, "NVLS is missing, not switched off"),
    ("h200-hgx", H200, 1, OFF, 8, 367, PASS, "as 8 H100 with NVLS off"),
    ("h200-hgx", H200, 1, OFF, 8, 330, OPEN, "less, but nothing is published"),
    ("b200-hgx", B200, 2, HGX, 8, 690, PASS, "coreweave/nccl-tests"),
    ("b200-hgx", B200, 2, HGX, 8, 440.6, FAIL, "what H100 reach"),
    ("gb200-nvl72", GB200, 18, RACK, 8, 835, PASS, "coreweave/nccl-tests"),
    ("gb200-nvl72", GB200, 18, RACK, 8, 847, PASS, "coreweave/nccl-tests: in place"),
    ("gb200-nvl72", GB200, 18, RACK, 8, 600, FAIL, "Azure grades: failure"),
    ("gb200-nvl72", GB200, 36, RACK, 16, 810, PASS, "coreweave/nccl-tests"),
    ("gb200-nvl72", GB200, 36, RACK, 16, 406, FAIL, "what 1440 GPUs reach"),
    ("gb200-nvl72", GB200, 360, RACK, 16, 406, PASS, "coreweave/nccl-tests"),
    ("gb200-nvl72", GB200, 360, RACK, 16, 200, FAIL, "half of it"),
    ("gb300-nvl72", GB300, 18, RACK, 8, 895, PASS, "aicr#2787"),
    ("gb300-nvl72", GB300, 18, RACK, 8, 937, PASS, "Azure grades: good"),
    ("gb300-nvl72", GB300, 18, RACK, 8, 800, FAIL, "under aicr#2787's floor of 823"),
    ("gb300-nvl72", GB300, 36, RACK, 8, 387, PASS, "aicr#1413"),
    ("gb300-nvl72", GB300, 36, RACK, 8, 201, PASS, "Azure grades: good"),
    ("gb300-nvl72", GB300, 36, RACK, 8, 185, OPEN, "Azure grades: warning"),
    ("gb300-nvl72", GB300, 36, RACK, 8, 149, FAIL, "Azure grades: failure"),
]


@pytest.mark.parametrize(("profile", "gpu", "nodes", "layout", "size", "figure", "verdict", "whose"), FIGURES)
def test_verdicts_on_published_figures(
    profile: str, gpu: str, nodes: int, layout: dict[str, Any], size: int, figure: float, verdict: Verdict, whose: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    case = ExampleCase(pattern="all_reduce", nbytes=size * G, bus_gb_per_s=figure, samples=12, noise=0.001)
    path = write_example(tmp_path / "run", Example(cases=(case,), gpu=gpu, nodes=nodes, **layout))
    document = judge(CheckContext(read_run(path), load_profile(profile)))
    (fabric,) = [r for r in document.checks if r.check == "fabric"]
    assert fabric.verdict is PASS
    floors = [r for r in document.checks if r.check == "floor" and r.subject == case.id]
    assert [r.verdict for r in floors] == [verdict], (whose, [r.reason for r in floors])


@pytest.mark.parametrize(("figure", "verdict"), [(46, PASS), (49, PASS), (40, FAIL), (25, FAIL)])
def test_verdicts_on_rates_of_a_400g_nic(figure: float, verdict: Verdict, tmp_path: Path) -> None:
    """nccl-tests#290 and #267: 46 to 49 of 50 GB/s."""
    case = ExampleCase(pattern="send_recv", nbytes=G, bus_gb_per_s=figure, group="rail", samples=12, noise=0.001)
    path = write_example(tmp_path / "run", Example(cases=(case,), nodes=2))
    document = judge(CheckContext(read_run(path), load_profile("h100-hgx-ib")))
    assert [r.verdict for r in document.checks if r.check == "floor" and r.subject == case.id] == [verdict]


def test_verdicts_on_published_latencies(tmp_path: Path) -> None:
    def floors(pattern: str, nbytes: int, nodes: int, p50_us: float) -> list[Verdict]:
        members = nodes * 8
        rate = nbytes * 2 * (members - 1) / members / (p50_us / 1e6) / 1e9
        case = ExampleCase(pattern=pattern, nbytes=nbytes, bus_gb_per_s=rate, samples=12, noise=0.001)
        path = write_example(tmp_path / f"{nbytes}-{nodes}-{p50_us}", Example(cases=(case,), nodes=nodes))
        document = judge(CheckContext(read_run(path), load_profile("h100-hgx-ib")))
        return [r.verdict for r in document.checks if r.check == "floor" and r.subject == case.id]

    assert floors("all_reduce", 128, 1, 19.2) == [PASS]
    assert floors("all_reduce", 1 << 20, 1, 32.4) == [PASS]
    assert floors("all_reduce", 8, 16, 72) == [PASS]
    assert floors("all_reduce", 128, 1, 60) == [FAIL]
    assert floors("all_reduce", 8, 16, 200) == [FAIL]


@pytest.mark.parametrize(
    ("nvls", "stamped"), [("on", False), ("off", True), ("unavailable", False), ("unknown", False)]
)
def test_floor_of_the_other_nvls_state_is_not_required(nvls: str, stamped: bool, tmp_path: Path) -> None:
    case = ExampleCase(pattern="all_reduce", nbytes=8 * G, bus_gb_per_s=480, samples=12, noise=0.001)
    path = write_example(tmp_path / "run", Example(cases=(case,), nodes=1, nvls=nvls))
    document = judge(CheckContext(read_run(path), load_profile("h100-hgx-ib")))
    assert not [r for r in document.checks if r.check == "floor" and r.required and "all_reduce" in r.subject]
    assert ("NVLS switched off" in document.stamps) is stamped


def test_nvls_that_differs_between_starts_is_unknown(tmp_path: Path) -> None:
    def edit(record: Record) -> Record:
        switched_off = like(known(record.path), nvls=False, nvls_switched_off=True)
        return msgspec.structs.replace(record, path=switched_off) if record.start == 1 else record

    case = ExampleCase(pattern="all_reduce", nbytes=8 * G, bus_gb_per_s=367, samples=12, noise=0.001)
    path = write_example(tmp_path / "run", Example(cases=(case,), nodes=1, edit=edit))
    document = judge(CheckContext(read_run(path), load_profile("h100-hgx-ib")))
    assert [r.verdict for r in document.checks if r.check == "floor" and r.subject == case.id] == [FAIL]


NAMES = PROFILES.names()


def test_names_of_the_shipped_profiles() -> None:
    wanted = {"h100-hgx-ib", "h100-hgx-roce", "h200-hgx", "b200-hgx", "gb200-nvl72", "gb300-nvl72", "cpu-gloo", "lab"}
    assert set(NAMES) == wanted


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_a_source_and_every_plan_exists(name: str) -> None:
    rules = load_profile(name)
    profile = rules.profile
    assert profile.name == name
    plan = read_plan(profile.plan)
    assert plan.starts >= profile.limits.min_starts
    for rule in rules.floors:
        assert len(rule.floor.source) > 10
        assert rule.floor.date.startswith("2026-")
        assert (rule.floor.basis == "published") <= ("#" in rule.floor.source or "coreweave" in rule.floor.source)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("cpu-gloo", "lab")])
def test_every_gpu_profile_refuses_sockets(name: str, tmp_path: Path) -> None:
    rules = load_profile(name)
    gpu = rules.profile.fabric.gpu[0].rstrip("*")
    layout = RACK if "nvl72" in name else HGX
    nodes = 36 if "nvl72" in name else 2
    case = ExampleCase(pattern="all_reduce", nbytes=8 * G, bus_gb_per_s=900, samples=8)
    path = write_example(
        tmp_path / "run", Example(cases=(case,), gpu=gpu, nodes=nodes, links=("NET/Socket",), starts=1, **layout)
    )
    document = judge(CheckContext(read_run(path), rules))
    assert [r.verdict for r in document.checks if r.check == "path"] == [FAIL]


MINIMAL = """schema = 1
name = "p"
title = "t"
plan = "quick"
[fabric]
device = "cpu"
transports = ["gloo"]
[[bound]]
name = "nic"
gb_per_s = 50.0
source = "s"
date = "d"
[[floor]]
where = { pattern = "all_reduce" }
at_least = 1.0
tolerance = 0.1
basis = "measured"
source = "s"
date = "d"
"""


def refusal(old: str, new: str) -> str:
    assert MINIMAL.count(old) >= 1
    with pytest.raises(UsageError) as refused:
        parse_profile(MINIMAL.replace(old, new), "mine.toml")
    message = str(refused.value)
    assert message.startswith("mine.toml")
    assert "\n" not in message
    return message


def test_minimal_profile_is_valid() -> None:
    assert parse_profile(MINIMAL, "mine.toml").floors[0].limit == pytest.approx(0.9)


FLOOR_AT = "at_least = 1.0"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("title =", "tittle =", "did you mean 'title'?"),
        ("transports =", "transport =", "unknown key fabric.transport; did you mean 'transports'?"),
        ("tolerance =", "tolerence =", "unknown key floor[0].tolerence; did you mean 'tolerance'?"),
        ("{ pattern =", "{ patern =", "floor[0].where: unknown key patern; did you mean 'pattern'?"),
        ("gb_per_s =", "gbps =", "unknown key bound[0].gbps"),
        (FLOOR_AT, "at_least = 1.0\nat_most = 2.0", "exactly one of at_least, at_most and fraction"),
        (FLOOR_AT, "at_least = 1.0\nfraction = 0.5\nof = 'nic'", "exactly one of"),
        (FLOOR_AT, "", "exactly one of"),
        (FLOOR_AT, "at_most = 1.0", "rates are at least, times at most"),
        (FLOOR_AT, "at_least = 1.0\nmetric = 'time_us.p50'", "rates are at least, times at most"),
        (FLOOR_AT, "at_least = 1.0\nmetric = 'busbw'", "no metric 'busbw'"),
        (FLOOR_AT, "fraction = 0.5", "fraction and of go together"),
        (FLOOR_AT, "fraction = 0.5\nof = 'nix'", "no bound 'nix'; did you mean 'nic'?"),
        (FLOOR_AT, "at_least = -1.0", "above 0"),
        (FLOOR_AT, "at_least = nan", "above 0"),
        (FLOOR_AT, "at_least = inf", "finite"),
        (FLOOR_AT, "at_least = 1.0\ngood = 0.5", "good 0.5 is no better than what fails"),
        (FLOOR_AT, "at_least = '1'", "floor[0].at_least"),
        ("tolerance = 0.1", "tolerance = 1.0", "tolerance must be a share"),
        ("tolerance = 0.1", "tolerance = -0.1", "tolerance must be a share"),
        ('basis = "measured"', 'basis = "felt"', "basis"),
        ('basis = "measured"\nsource = "s"', 'basis = "measured"\nsource = " "', "needs a source and a date"),
        ('pattern = "all_reduce" }', 'pattern = "all_reduce", bytes = { min = "2G", max = "1G" } }', "above max"),
        ('pattern = "all_reduce" }', 'pattern = "all_reduce", bytes = "1Q" }', "positive size"),
        ('pattern = "all_reduce" }', 'pattern = "all_reduce", nodes = { mim = 2 } }', "did you mean 'min'?"),
        ('pattern = "all_reduce" }', 'pattern = "all_reduce", nodes = {} }', "tests nothing"),
        ('pattern = "all_reduce" }', 'pattern = "all_reduce", nodes = [] }', "must be a value"),
        ('{ pattern = "all_reduce" }', "{ nodes = 2 }", "needs a pattern"),
        ('device = "cpu"', 'device = "cuda"', "must name GPUs"),
        ('device = "cpu"', 'device = "cpu"\ngpu = ["H100"]', "none if it is cpu"),
        ('device = "cpu"', 'device = "tpu"', "device"),
        ("schema = 1", "schema = 2", "use a newer one"),
        ("schema = 1", "", "schema"),
        ("[[floor]]", "[limits]\nmin_samples = 3\n[[floor]]", "limits.min_samples must be at least 6"),
        ("[[floor]]", "[limits]\nmin_starts = 0\n[[floor]]", "limits.min_starts must be at least 1"),
        ("[[floor]]", "[limits]\nmedian_width = nan\n[[floor]]", "finite"),
        ("[[floor]]", "[limits]\nfleet_alpha = 0.0\n[[floor]]", "between 0 and 1"),
        ("[[floor]]", "[wanted.versions]\nnccl = { version = 'new' }\n[[floor]]", "like '>=2.27,<3'"),
        ("[[floor]]", "[wanted.versions]\nnccl = { version = '~=2.27' }\n[[floor]]", "like '>=2.27,<3'"),
        ("[[floor]]", "[wanted.versions]\nnccl = { version = '==2.*' }\n[[floor]]", "like '>=2.27,<3'"),
        ("[[floor]]", "[wanted.versions]\nnccl = { version = '' }\n[[floor]]", "like '>=2.27,<3'"),
        ("[[bound]]", '[[bound]]\nname = "nic"\ngb_per_s = 1.0\nsource = "s"\ndate = "d"\n[[bound]]', "stands twice"),
        ("[[floor]]", "[floor]", "write [[floor]], not [floor]"),
        ("schema = 1", "schema = 1\n[[", "not a TOML file"),
    ],
)
def test_invalid_profile_is_refused(old: str, new: str, words: str) -> None:
    assert words in refusal(old, new)


def test_two_entries_for_the_same_cases_are_refused() -> None:
    floor = MINIMAL[MINIMAL.index("[[floor]]") :]
    with pytest.raises(UsageError, match=r"floor\[1\] has the same where and metric as floor\[0\]"):
        parse_profile(MINIMAL + floor.replace("1.0", "2.0"), "mine.toml")


def test_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'h100-hgx-ib'"):
        load_profile("h100-hgx-bi")
    with pytest.raises(UsageError, match="cannot read the profile"):
        load_profile("/nowhere/mine.toml")


@pytest.mark.parametrize(
    ("raw", "good", "bad"),
    [
        ("NET/IB*", ["NET/IB", "net/ib/0"], ["NET/Socket", None, 3]),
        (8, [8, 8.0, "8"], [9, "9", None, True]),
        ([8, "x*"], [8, "xy"], [7, "y"]),
        ({"min": "1K", "max": "2K"}, [1024, 2048], [1023, 2049, "1500", None]),
        ({"none_of": ["NET/Socket*"]}, ["NET/IB"], ["NET/Socket", None]),
        ({"one_of": ["IB", "RoCE"]}, ["IB", ["IB", "RoCE"]], [["IB", "Socket"]]),
        ({"version": ">=2.27,<3"}, ["2.27", "2.28.9+cuda13", "v2.30"], ["2.26.9", "3.0", "new", None]),
        ({"version": "==2.28"}, ["2.28.0"], ["2.28.1"]),
        ({"version": ">=6.8,!=6.9"}, ["6.8.0-45-generic", "6.9.1"], ["6.9.0+x", "6.7", "generic", ""]),
        ({"present": False}, [None], ["x", 0, ""]),
        ({"present": True}, ["x", 0], [None]),
        (True, [True], [1, "x", False, None]),
    ],
)
def test_conditions(raw: object, good: list[object], bad: list[object]) -> None:
    test = read_test(raw, "here")
    assert [test.holds(value) for value in good] == [True] * len(good)
    assert [test.holds(value) for value in bad] == [False] * len(bad)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_versions_are_ordered_as_numbers(one: list[int], other: list[int]) -> None:
    a, b = (".".join(map(str, parts)) for parts in (one, other))
    length = max(len(one), len(other))
    padded = [parts + [0] * (length - len(parts)) for parts in (one, other)]
    assert read_test({"version": f">={b}"}, "here").holds(a) is (padded[0] >= padded[1])
    assert str(release_of(a)) == a


@given(st.text(max_size=30))
def test_any_text_is_a_condition_or_is_refused(text: str) -> None:
    assert read_test(text, "here").holds("__import__('os')") in (True, False)


GOLDEN = Example(
    cases=(
        ExampleCase(pattern="all_reduce", nbytes=8 * G, bus_gb_per_s=386.6, noise=0.01),
        ExampleCase(pattern="send_recv", nbytes=G, bus_gb_per_s=48, group="rail", noise=0.01),
    ),
    nodes=4,
)


def test_profile_from_a_golden_run_passes_equal_runs(tmp_path: Path) -> None:
    rules = parse_profile(make_profile(read_run(write_example(tmp_path / "golden", GOLDEN)), "ours"), "ours")
    assert {rule.floor.basis for rule in rules.floors} == {"measured"}
    for seed in range(5):
        again = write_example(tmp_path / str(seed), replace(GOLDEN, seed=seed))
        document = judge(CheckContext(read_run(again), rules))
        assert document.verdict is PASS, document.reasons


def test_profile_from_a_golden_run_fails_slower_runs(tmp_path: Path) -> None:
    rules = parse_profile(make_profile(read_run(write_example(tmp_path / "golden", GOLDEN)), "ours"), "ours")
    slow = tuple(replace(case, bus_gb_per_s=0.9 * case.bus_gb_per_s) for case in GOLDEN.cases)
    document = judge(CheckContext(read_run(write_example(tmp_path / "slow", replace(GOLDEN, cases=slow))), rules))
    assert document.verdict is FAIL
    other = write_example(tmp_path / "other", replace(GOLDEN, cases=slow, gpu=B200))
    assert judge(CheckContext(read_run(other), rules)).verdict is OPEN


def test_tolerance_follows_from_the_spread_of_the_golden_run(tmp_path: Path) -> None:
    noisy = replace(GOLDEN, cases=tuple(replace(case, noise=0.2) for case in GOLDEN.cases))
    tolerances = []
    for name, golden in (("quiet", GOLDEN), ("noisy", noisy)):
        text = make_profile(read_run(write_example(tmp_path / name, golden)), name)
        tolerances.append(max(rule.floor.tolerance for rule in parse_profile(text, name).floors))
    assert tolerances[0] == 0.03
    assert tolerances[1] > 0.05


def test_golden_run_of_one_start_gives_only_assumed_figures(tmp_path: Path) -> None:
    text = make_profile(read_run(write_example(tmp_path / "golden", replace(GOLDEN, starts=1))), "ours")
    assert {rule.floor.basis for rule in parse_profile(text, "ours").floors} == {"assumed"}


def test_no_profile_from_an_empty_or_wrong_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has measured nothing"):
        make_profile(read_run(write_example(tmp_path / "none", replace(GOLDEN, made=0))), "ours")
    wrong = (replace(GOLDEN.cases[0], wrong=1),)
    with pytest.raises(UsageError, match="is no golden run"):
        make_profile(read_run(write_example(tmp_path / "wrong", replace(GOLDEN, cases=wrong))), "ours")
