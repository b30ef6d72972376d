"""Plans: the expansion to cases, and the refusal of invalid plans."""

import itertools
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncclbench.config.plugins import names
from ncclbench.config.shipped_files import PLANS
from ncclbench.errors import UsageError
from ncclbench.plan.plan import Plan, SettingOverrides, Settings, parse_plan, read_plan, sweep
from ncclbench.schedule import Timing
from ncclbench.store.manifest import PlanRecord
from tests.helpers.stored import known

MINIMAL = 'name = "p"\n[[case]]\npattern = "all_reduce"\nbytes = "1K"\n'


def plan_of(body: str, **overrides: Any) -> Plan:
    return parse_plan('name = "p"\n' + body, "plan.toml", SettingOverrides(**overrides))


def ids(plan: Plan) -> list[str]:
    return [planned.case.id for planned in plan.cases]


def refusal(body: str, **overrides: Any) -> str:
    with pytest.raises(UsageError) as caught:
        plan_of(body, **overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("plan.toml")
    return message


def test_minimal_plan() -> None:
    plan = parse_plan(MINIMAL, "plan.toml")
    (planned,) = plan.cases
    assert plan.name == "p"
    assert planned.case.id == "all_reduce/float32/1024/isolated"
    assert planned.case.params == {}
    assert planned.settings == Settings()


def test_entry_expands_to_all_combinations() -> None:
    plan = plan_of(
        """
        [[case]]
        pattern = "all_reduce"
        bytes = [8, "1K"]
        dtype = ["float32", "int32"]
        timing = ["isolated", "pipelined"]
        params = { redop = ["sum", "max"], group = 2 }
        """
    )
    assert len(plan.cases) == 2 * 2 * 2 * 2
    # Sizes vary fastest, so that a table is sorted by size.
    assert ids(plan)[:3] == [
        "all_reduce/float32/8/isolated/group=2",
        "all_reduce/float32/1024/isolated/group=2",
        "all_reduce/int32/8/isolated/group=2",
    ]
    assert ids(plan)[-1] == "all_reduce/int32/1024/pipelined/group=2/redop=max"
    assert {planned.case.timing for planned in plan.cases} == {Timing.ISOLATED, Timing.PIPELINED}


def test_default_parameters_are_not_in_the_case_id() -> None:
    assert ids(plan_of('[[case]]\npattern = "all_reduce"\nbytes = 8\nparams = { redop = "sum" }')) == [
        "all_reduce/float32/8/isolated"
    ]


def test_a_sweep_from_min_to_max() -> None:
    plan = plan_of('[[case]]\npattern = "broadcast"\nmin_bytes = "1K"\nmax_bytes = "100K"\nfactor = 4\n')
    assert [planned.case.nbytes for planned in plan.cases] == [1024, 4096, 16384, 65536]


def test_the_factor_is_two_unless_given() -> None:
    plan = plan_of('[[case]]\npattern = "broadcast"\nmin_bytes = 8\nmax_bytes = 32\n')
    assert [planned.case.nbytes for planned in plan.cases] == [8, 16, 32]


def test_entry_inherits_defaults() -> None:
    plan = plan_of(
        """
        seed = 9
        [defaults]
        dtype = "float64"
        timing = "pipelined"
        bytes = "2K"
        iterations = 7
        warmup = 3
        params = { redop = "min" }
        [[case]]
        pattern = "all_reduce"
        [[case]]
        pattern = "reduce"
        dtype = "uint8"
        bytes = 64
        warmup = 0
        params = { root = 1 }
        """
    )
    assert ids(plan) == [
        "all_reduce/float64/2048/pipelined/redop=min",
        "reduce/uint8/64/pipelined/redop=min/root=1",
    ]
    assert [(p.settings.iterations, p.settings.warmup, p.settings.seed) for p in plan.cases] == [(7, 3, 9), (7, 0, 9)]


def test_entrys_sweep_overrides_default_sizes() -> None:
    plan = plan_of('[defaults]\nbytes = 8\n[[case]]\npattern = "reduce"\nmin_bytes = 16\nmax_bytes = 32\n')
    assert [planned.case.nbytes for planned in plan.cases] == [16, 32]


def test_entrys_sizes_override_a_default_sweep() -> None:
    plan = plan_of('[defaults]\nmin_bytes = 16\nmax_bytes = 32\n[[case]]\npattern = "reduce"\nbytes = [8]\n')
    assert [planned.case.nbytes for planned in plan.cases] == [8]


def test_overrides_replace_the_plans_settings() -> None:
    body = """
        seed = 9
        [defaults]
        iterations = 7
        check = true
        [[case]]
        pattern = "all_reduce"
        bytes = 8
        timeout = 5
        precision = 0.1
        """
    overrides: dict[str, Any] = {
        "iterations": 50,
        "warmup": 0,
        "precision": 0.5,
        "max_seconds": 0.25,
        "check": False,
        "timeout": 2.0,
        "seed": 4,
    }
    assert plan_of(body, **overrides).cases[0].settings == Settings(**overrides)
    assert plan_of(body).cases[0].settings == Settings(iterations=7, precision=0.1, timeout=5.0, seed=9)


def test_plan_record_survives_json() -> None:
    record = parse_plan(MINIMAL, "plan.toml").as_record()
    assert record.name == "p"
    assert record.starts == 1
    assert [case.id for case in record.cases] == ["all_reduce/float32/1024/isolated"]
    assert known(record.cases[0].settings)["warmup"] == 5
    assert msgspec.json.decode(msgspec.json.encode(record), type=PlanRecord) == record


@pytest.mark.parametrize(
    ("body", "key", "near"),
    [
        ("seeed = 1\n" + MINIMAL.split("\n", 1)[1], "seeed", "seed"),
        ("[default]\nwarmup = 1\n" + MINIMAL.split("\n", 1)[1], "default", "defaults"),
        ("[defaults]\nwarmpu = 1\n" + MINIMAL.split("\n", 1)[1], "defaults.warmpu", "warmup"),
        ('[[case]]\npatern = "all_reduce"\nbytes = 8\n', "case[0].patern", "pattern"),
        (MINIMAL.split("\n", 1)[1] + '[[case]]\npattern = "reduce"\nbyte = 8\n', "case[1].byte", "bytes"),
        ('[[case]]\npattern = "reduce"\nbytes = 8\nmax_second = 1\n', "case[0].max_second", "max_seconds"),
        ('[[cases]]\npattern = "reduce"\nbytes = 8\n', "cases", "case"),
    ],
)
def test_misspelled_key_names_file_path_and_nearest(body: str, key: str, near: str) -> None:
    message = refusal(body)
    assert f"plan.toml: unknown key {key};" in message
    assert f"did you mean {near!r}?" in message


def test_misspelled_parameter_names_all_parameters() -> None:
    message = refusal('[[case]]\npattern = "reduce"\nbytes = 8\nparams = { rot = 1 }\n')
    assert "case[0]" in message
    assert "reduce has no parameter 'rot'; did you mean 'root'? there are: redop, root, group" in message


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ('iterations = "many"', "case[0].iterations"),
        ("iterations = 1.5", "case[0].iterations"),
        ('warmup = "5"', "case[0].warmup"),
        ('check = "yes"', "case[0].check"),
        ("dtype = 32", "case[0].dtype"),
        ("dtype = [1]", "case[0].dtype"),
        ("timing = false", "case[0].timing"),
        ("params = 3", "case[0].params"),
        ('factor = "two"', "case[0].factor"),
        ("max_seconds = []", "case[0].max_seconds"),
    ],
)
def test_wrong_type_is_named_by_its_path(line: str, where: str) -> None:
    assert where in refusal(f'[[case]]\npattern = "reduce"\nbytes = 8\n{line}\n')


@pytest.mark.parametrize("body", ["starts = 'one'\n", "seed = 1.5\n", "defaults = 3\n", "case = 3\n"])
def test_wrong_type_at_top_level_is_refused(body: str) -> None:
    assert body.split()[0] in refusal(body)


def test_case_table_instead_of_a_list_is_refused() -> None:
    assert "write [[case]], not [case]" in refusal('[case]\npattern = "reduce"\nbytes = 8\n')


def test_case_that_is_not_a_table_is_refused() -> None:
    assert "case[0]" in refusal('case = ["reduce"]\n')


def test_plan_without_a_name_is_refused() -> None:
    with pytest.raises(UsageError, match=r"plan\.toml: .*`name`"):
        parse_plan('[[case]]\npattern = "reduce"\nbytes = 8\n', "plan.toml")


@pytest.mark.parametrize("size", ['"1Q"', '"-1K"', "-8", "0", '""', '"0.3"', '"many"', '"99999999T"', "true", "1.5"])
def test_invalid_size_is_refused(size: str) -> None:
    assert "bytes" in refusal(f'[[case]]\npattern = "reduce"\nbytes = {size}\n')


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ("", "no sizes"),
        ("min_bytes = 8", "no sizes"),
        ("max_bytes = 8", "no sizes"),
        ("bytes = 8\nmin_bytes = 8", "exclude each other"),
        ("bytes = 8\nmax_bytes = 8", "exclude each other"),
        ("min_bytes = 16\nmax_bytes = 8", "above max_bytes"),
        ("bytes = []", "empty list"),
        ("min_bytes = 8\nmax_bytes = 16\nfactor = 1", "factor must be above 1"),
        ("min_bytes = 8\nmax_bytes = 16\nfactor = 0", "factor must be above 1"),
        ("min_bytes = 8\nmax_bytes = 16\nfactor = nan", "factor must be above 1"),
        ("min_bytes = 8\nmax_bytes = 16\nfactor = inf", "factor"),
    ],
)
def test_invalid_sizes_are_refused(sizes: str, words: str) -> None:
    message = refusal(f'[[case]]\npattern = "reduce"\n{sizes}\n')
    assert "case[0]" in message
    assert words in message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("iterations = 0", "iterations must be at least 1"),
        ("warmup = 99999999999", "warmup must be at most"),
        ("warmup = -1", "warmup must be at least 0"),
        ("precision = -0.1", "precision must be at least 0"),
        ("precision = nan", "precision must be at least 0"),
        ("max_seconds = -1", "max_seconds must be at least 0"),
        ("max_seconds = inf", "max_seconds"),
        ("timeout = -1", "timeout must be"),
        ("timeout = 0", "timeout must be"),
        ("timeout = inf", "timeout must be"),
        ('dtype = "float31"', "no dtype 'float31'; there are: float32"),
        ('timing = "isolatd"', "did you mean 'isolated'?"),
        ("dtype = []", "empty list"),
        ("params = { redop = [] }", "empty list"),
        ('params = { redop = "mean" }', "redop"),
        ('params = { root = "first" }', "root"),
    ],
)
def test_value_out_of_range_names_its_entry(line: str, words: str) -> None:
    message = refusal(f'[[case]]\npattern = "reduce"\nbytes = 8\n{line}\n')
    assert "case[0]" in message
    assert words in message


def test_unknown_pattern_names_nearest_and_all() -> None:
    message = refusal('[[case]]\npattern = "all_redcue"\nbytes = 8\n')
    assert "did you mean 'all_reduce'?" in message
    for name in names("patterns"):
        assert name in message


def test_entry_without_a_pattern_is_refused() -> None:
    assert "case[0]: no pattern" in refusal("[[case]]\nbytes = 8\n")


def test_empty_plan_is_refused() -> None:
    assert "at least one [[case]]" in refusal("")
    assert "at least one [[case]]" in refusal("case = []\n")


@pytest.mark.parametrize("sizes", ['[1024, "1K"]', "[8, 8]"])
def test_duplicate_case_is_named(sizes: str) -> None:
    message = refusal(f'[[case]]\npattern = "reduce"\nbytes = {sizes}\n')
    assert "reduce/float32/" in message
    assert message.endswith("is given twice")


def test_duplicate_case_of_two_entries_is_named() -> None:
    entry = '[[case]]\npattern = "reduce"\nbytes = 8\n'
    assert "reduce/float32/8/isolated is given twice" in refusal(entry + entry)


def test_plan_declares_its_process_starts() -> None:
    assert parse_plan(MINIMAL, "p").starts == 1
    plan = parse_plan("starts = 3\n" + MINIMAL, "p")
    assert plan.starts == plan.as_record().starts == 3


@pytest.mark.parametrize("starts", [0, -1, 101])
def test_invalid_number_of_starts_is_refused(starts: int) -> None:
    assert f"got {starts}" in refusal(f"starts = {starts}\n" + MINIMAL.split("\n", 1)[1])


def test_plan_with_too_many_cases_is_refused() -> None:
    assert "more than" in refusal(
        '[[case]]\npattern = "reduce"\nmin_bytes = 1048576\nmax_bytes = "1T"\nfactor = 1.0001'
    )


def test_invalid_toml_names_the_line() -> None:
    assert "line 2" in refusal("[[case]\n")


@pytest.mark.parametrize("content", [b"name = 'p'\n\xff\xfe", None])
def test_unreadable_plan_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot read the plan") as caught:
        read_plan(str(path))
    assert str(path) in str(caught.value)


def test_directory_is_not_a_plan(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the plan"):
        read_plan(str(tmp_path))


def test_unknown_plan_names_the_shipped_ones() -> None:
    with pytest.raises(UsageError, match="no plan 'quik'; did you mean 'quick'") as caught:
        read_plan("quik")
    assert ".toml" in str(caught.value)


def test_plan_file_needs_no_suffix(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    path.write_text(MINIMAL)
    assert ids(read_plan(str(path))) == ["all_reduce/float32/1024/isolated"]


def test_patterns_of_a_plan_can_be_selected() -> None:
    body = MINIMAL + '[[case]]\npattern = "reduce"\nbytes = 8\n'
    assert ids(parse_plan(body, "plan.toml", only=["reduce"])) == ["reduce/float32/8/isolated"]
    with pytest.raises(UsageError, match=r"plan\.toml has no case of scatter"):
        parse_plan(body, "plan.toml", only=["reduce", "scatter"])


@pytest.mark.parametrize("name", PLANS.names())
def test_shipped_plans_load_and_have_a_title(name: str) -> None:
    plan = read_plan(name)
    assert plan.name == name
    assert plan.cases
    assert len(PLANS.titles()[name]) > 10


def test_quick_plan_covers_the_main_collectives() -> None:
    patterns = {planned.case.pattern for planned in read_plan("quick").cases}
    assert patterns >= {"all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send_recv"}
    sizes = {planned.case.nbytes for planned in read_plan("quick").cases}
    assert (min(sizes), max(sizes)) == (1 << 10, 16 << 20)


@given(st.integers(1, 1 << 40), st.integers(0, 1 << 40), st.floats(1.05, 64.0))
def test_sweep_grows_from_low_to_high(low: int, extra: int, factor: float) -> None:
    high = low + extra
    sizes = sweep(low, high, factor)
    assert sizes[0] == low
    assert sizes[-1] <= high
    assert all(a < b for a, b in itertools.pairwise(sizes))
    # No size is missing: one more step would exceed the end.
    assert sizes[-1] * factor > high - factor
    # Each size is the geometric one, rounded to a whole byte; repeated small sizes occur once.
    steps = math.log(sizes[-1] / low, factor)
    assert abs(low * factor ** round(steps) - sizes[-1]) <= 0.5 + 1e-9 * sizes[-1]


@given(st.integers(1, 1 << 20), st.integers(0, 20))
def test_sweep_by_two_is_powers_of_two(low: int, doublings: int) -> None:
    assert sweep(low, low << doublings, 2) == [low << k for k in range(doublings + 1)]


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0, -2.0, math.nan, math.inf])
def test_invalid_factor_is_refused(factor: float) -> None:
    with pytest.raises(UsageError, match="factor"):
        sweep(8, 64, factor)


def test_sweep_with_too_many_sizes_is_refused() -> None:
    with pytest.raises(UsageError):
        sweep(1 << 20, 1 << 40, 1.00001)  # 1.4 million sizes


def test_empty_range_is_refused() -> None:
    with pytest.raises(UsageError, match="min_bytes 16 is above max_bytes 8"):
        sweep(16, 8, 2)
