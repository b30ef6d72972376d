"""Logs of nccl-tests, field by field: the report reproduces the imported text or JSON."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ncclbench.config.plugins import load
from ncclbench.errors import UsageError
from ncclbench.importers.common.import_logs import import_logs, read_log
from ncclbench.importers.common.imported_cases import ImportedCase, Stated
from ncclbench.importers.common.log_file import Log
from ncclbench.importers.common.nccl_tests_tables import PLACEMENTS
from ncclbench.schedule.builders import IN_PLACE
from ncclbench.store.records import Record
from ncclbench.store.run_directory import Run, read_run
from tests.helpers.paths import FIXTURES
from tests.helpers.stored import known, plain

NCCL_TESTS = sorted((FIXTURES / "nccl-tests").iterdir())
TEXT = (FIXTURES / "nccl-tests" / "all_reduce.txt").read_text()
PER_ITERATION = (FIXTURES / "nccl-tests" / "all_reduce_per_iteration.txt").read_text()
REPORT = json.loads((FIXTURES / "nccl-tests" / "all_reduce_per_iteration.json").read_text())


def rows_of(text: str) -> list[list[str]]:
    """The cells of each row, that is, of each line that begins with a number."""
    return [line.split() for line in text.splitlines() if line.split() and line.split()[0].isdecimal()]


def comments_of(text: str) -> list[str]:
    """The lines around the rows: settings, devices and footers."""
    kept = ("# nThread", "# Collective", "#  Rank", "# Out of", "# Avg")
    return [line.rstrip() for line in text.splitlines() if line.startswith(kept)]


def found(text: str, **stated: Any) -> list[ImportedCase]:
    return [one for _, reading in read_log(Log.of("log.txt", text.encode()), Stated(**stated)) for one in reading.cases]


def records(text: str, **stated: Any) -> list[Record]:
    return [one.record for one in found(text, **stated)]


def figures(text: str, **stated: Any) -> list[tuple[Any, ...]]:
    """The measured values, without line numbers and surrounding lines."""
    return [
        (r.case, r.count, r.redop, r.root, r.time_us, r.alg_gb_per_s, r.bus_gb_per_s, r.wrong, r.world_size)
        for r in records(text, **stated)
    ]


def imported(path: Path, out: Path) -> Run:
    import_logs([Log.open(path)], out, Stated(), None, ["import"])
    return read_run(out)


def refusal(text: str, **stated: Any) -> str:
    with pytest.raises(UsageError) as caught:
        records(text, **stated)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Import, then export.


@pytest.mark.parametrize("path", NCCL_TESTS, ids=lambda path: path.name)
def test_import_then_export_loses_no_field(path: Path, tmp_path: Path) -> None:
    exported = load("reports", "nccl-tests").render([imported(path, tmp_path / "run")])
    original = path.with_suffix(".txt").read_text()
    assert len(rows_of(original)) >= 9
    assert rows_of(exported) == rows_of(original)  # the JSON is of the same run as the text beside it
    expected = [line.replace(" unalign: 0", "") for line in comments_of(original)]
    assert [line.replace(" unalign: 0", "") for line in comments_of(exported)] == expected


@pytest.mark.parametrize("name", ["all_reduce", "all_reduce_graph", "alltoall"])
def test_exported_text_equals_the_log(name: str, tmp_path: Path) -> None:
    path = FIXTURES / "nccl-tests" / f"{name}.txt"
    exported = load("reports", "nccl-tests").render([imported(path, tmp_path / "run")])
    assert exported + "\n" == path.read_text()


def test_every_cell_is_in_its_record() -> None:
    rows, read = rows_of(PER_ITERATION), records(PER_ITERATION)
    assert len(read) == 2 * len(rows)
    for place, record in enumerate(read):
        size, count, _, redop, root, *cells = rows[place // 2]
        half = cells[:8] if place % 2 == 0 else cells[8:]
        origin = record.imported
        assert origin is not None
        assert origin.placement == PLACEMENTS[place % 2]
        assert (record.bytes, record.size_bytes, record.count) == (int(size), int(size), int(count))
        assert (record.dtype, record.redop, record.root) == ("float32", redop, int(root))
        assert record.time_us is not None
        assert (record.time_us.n, record.time_us.p50, record.time_us.mean) == (1, float(half[0]), float(half[0]))
        assert (record.alg_gb_per_s, record.bus_gb_per_s, record.wrong) == (
            float(half[1]),
            float(half[2]),
            int(half[3]),
        )
        names = ("min_us", "max_us", "p99_us", "cv_pct")
        assert origin.per_iteration == dict(zip(names, map(float, half[4:]), strict=True))


def test_every_figure_of_the_json_is_in_the_records(tmp_path: Path) -> None:
    run = imported(FIXTURES / "nccl-tests" / "all_reduce_per_iteration.json", tmp_path / "run")
    theirs = [(result, name) for result in REPORT["results"] for name in PLACEMENTS]
    table = [record for record in run.records if record.timing == "pipelined"]
    single = [record for record in run.records if record.timing == "isolated"]
    assert len(table) == len(single) == len(theirs) == 18
    for (result, name), record, launches in zip(theirs, table, single, strict=True):
        half, statistics = result[name], result[f"{name}_per_iter"]
        assert record.time_us is not None
        assert (record.time_us.p50, record.alg_gb_per_s, record.bus_gb_per_s, record.wrong) == (
            half["time"], half["alg_bw"], half["bus_bw"], half["nwrong"],
        )  # fmt: skip
        assert (record.bytes, record.count, record.redop, record.root) == (result["size"], result["count"], "sum", -1)
        assert record.imported is not None
        expected = {key: value for key, value in statistics.items() if not key.endswith("times_us")}
        assert record.imported.per_iteration == expected
        assert launches.samples is not None
        samples = pq.read_table(run.path / launches.samples).to_pandas()
        for rank, times in enumerate(statistics["per_process_max_times_us"]):
            kept = samples[samples["rank"] == rank].sort_values("iteration")["seconds"] * 1e6
            assert kept.tolist() == pytest.approx(times, rel=1e-12)
        slowest = samples.groupby("iteration")["seconds"].max() * 1e6
        assert slowest.tolist() == pytest.approx(statistics["times_us"], rel=1e-12)
        assert launches.time_us is not None
        assert launches.time_us.n == 200
        assert (launches.time_us.min, launches.time_us.max) == pytest.approx(
            (statistics["min_us"], statistics["max_us"])
        )
        assert launches.skew_us is not None


# Lines around the rows.


@pytest.mark.parametrize(
    "prefix",
    [
        "[1,0]<stdout>:",
        "[1,0]<stdout>: ",
        "[prterun-host-77@1,0]<stdout>: ",
        "Thu Jun 10 12:00:00 2026[1,0]<stdout>:",
        "2026-11-23T02:23:07.123456789Z ",
        "0: ",
        "  0: ",
        "[0] ",
        "\x1b[32m",
    ],
)
@pytest.mark.parametrize("text", [TEXT, PER_ITERATION], ids=["plain", "with -I"])
def test_launcher_prefix_changes_nothing(prefix: str, text: str) -> None:
    assert figures("".join(f"{prefix}{line}\n" for line in text.splitlines())) == figures(text)


NOISE = [
    "node0:1612:1700 [0] NCCL INFO Connected all rings",
    "node1:1613:1701 [1] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM",
    "[2026-11-23 02:23:07] node0:1612:1700 [0] init.cc:12 NCCL WARN something",
    "srun: job 12 queued and waiting for resources",
    "",
]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_foreign_lines_between_rows_change_nothing(ending: str) -> None:
    lines = [piece for line in TEXT.splitlines() for piece in (line, *NOISE)]
    assert figures(ending.join(lines)) == figures(TEXT)


@pytest.mark.parametrize("cut", [52, 84, 116])  # after the root, the first half, and the second
@pytest.mark.parametrize("blank", ["", " "])
def test_nccl_log_inside_a_row_changes_nothing(cut: int, blank: str) -> None:
    lines = TEXT.splitlines()
    place = next(k for k, line in enumerate(lines) if line.split()[:1] == ["32"])
    row = lines[place]
    head, tail = row[:cut], row[cut:]
    torn = [f"{head}{blank}node0:1612:1700 [0] NCCL INFO Connected all trees", NOISE[1], tail]
    assert figures("\n".join([*lines[:place], *torn, *lines[place + 1 :]])) == figures(TEXT)


def test_row_merged_with_nccls_line_is_not_guessed() -> None:
    """`0` before a host name that begins with a digit: 0 and 10-0-0-1, or 010 and -0-0-1."""
    text = TEXT.replace("    N/A    10.73", "   0 10-9:1:2 [0] NCCL INFO x", 1)
    assert "line 13: NCCL's log begins in the middle of this row" in refusal(text.replace("0 10-9", "010-9"))


def test_runs_in_one_log_are_separate_tables() -> None:
    other = (FIXTURES / "nccl-tests" / "alltoall.txt").read_text()
    read = records(TEXT + other + TEXT)
    assert [one.pattern for one in read] == ["all_reduce"] * 30 + ["all_to_all"] * 30 + ["all_reduce"] * 30
    assert [known(one.imported).table for one in read] == [0] * 30 + [1] * 30 + [2] * 30


def test_tables_of_several_processes_are_separated() -> None:
    """A build without MPI under mpirun gives N jobs of one process with interleaved lines."""
    lines = [f"[1,{rank}]<stdout>:{line}" for line in TEXT.splitlines() for rank in (0, 1)]
    ((_, reading),) = read_log(Log.of("log", "\n".join(lines).encode()), Stated())
    assert [one.record.time_us for one in reading.cases] == [one.time_us for one in records(TEXT)] * 2
    assert any("a build without MPI" in warning for warning in reading.warnings)


def test_nccls_path_messages_are_kept() -> None:
    said = ["Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0", "Using network Socket"]
    read = records("".join(f"node0:1:2 [0] NCCL INFO {line}\n" for line in said) + TEXT)
    said_of_path = {"network": "Socket", "gdr": False, "links": ["NET/Socket"]}
    assert all(one.path is not None and said_of_path.items() <= plain(one.path).items() for one in read)
    assert any("sockets" in note for note in read[0].notes)
    assert records(TEXT)[0].path is None


# Kinds of tables.


def test_timing_regime_is_read_from_the_log() -> None:
    settings = "agg iters: 1 validation: 0 graph: 0"
    graph, grouped = TEXT.replace("graph: 0", "graph: 20"), TEXT.replace("agg iters: 1", "agg iters: 4")
    blocking = TEXT.replace("#\n# Using", "# Blocking Enabled: wait for completion and barrier\n#\n# Using", 1)
    assert settings in TEXT
    expected = [
        (TEXT, "pipelined", 100),
        (graph, "graph", 2000),
        (grouped, "pipelined", 400),
        (blocking, "blocking", 100),
    ]
    for text, timing, launches in expected:
        read = records(text)
        assert {(one.timing, one.launches_per_sample, one.warmup) for one in read} == {(timing, launches, 5)}
    assert {one.timing for one in records(TEXT.replace(" time ", " cputime "))} == {"cpu_time"}


def test_half_that_the_pattern_measures_has_no_parameter() -> None:
    """So that imported and measured cases compare; the patterns are built from `IN_PLACE`."""
    for pattern in ("all_reduce", "all_gather", "broadcast", "alltoall"):
        read = records(TEXT.replace("all_reduce_perf", f"{pattern}_perf"))
        ours = "in_place" if read[0].pattern in IN_PLACE else "out_of_place"
        plain = {known(one.imported).placement for one in read if "placement" not in one.params}
        assert plain == {ours}
    assert records(TEXT)[1].case == "all_reduce/float32/8/pipelined"
    assert records(TEXT)[0].case == "all_reduce/float32/8/pipelined/placement=out_of_place"


def test_wrong_elements_make_a_wrong_case() -> None:
    text = TEXT.replace("    N/A    10.73", "       3    10.73", 1)
    wrong = [one for one in records(text) if one.status == "wrong"]
    assert [(one.wrong, one.reason) for one in wrong] == [(3, "nccl-tests counted 3 wrong elements")]
    assert {one.wrong for one in records(TEXT)} == {None}


def test_missing_time_is_none() -> None:
    text = TEXT.replace("    10.86    0.00    0.00    N/A", "      N/A     N/A     N/A    N/A", 1)
    skipped = [one for one in records(text) if one.status == "skipped"]
    assert [(one.bytes, one.time_us, one.alg_gb_per_s) for one in skipped] == [(32, None, None)]


def test_rooted_and_reduced_cases_have_pattern_parameters() -> None:
    text = TEXT.replace("all_reduce_perf", "broadcast_perf").replace("     sum      -1", "    none       3")
    assert records(text)[1].case == "broadcast/float32/8/pipelined/root=3"
    assert records(TEXT.replace("     sum      -1", "     max      -1"))[1].params == {"redop": "max"}


@pytest.mark.parametrize(("colours", "group"), [([0, 0, 1, 1], "2"), ([0, 1, 0, 1], "split"), ([0, 0, 0, 0], None)])
def test_concurrent_groups_are_read_from_the_devices(colours: list[int], group: str | None) -> None:
    devices = [
        f"#  Rank  {r} Group  {c} Pid   16 on  node0 device  {r} [0000:00:06] H200" for r, c in enumerate(colours)
    ]
    lines = [line for line in TEXT.splitlines() if not line.startswith("#  Rank")]
    place = lines.index("# Using devices") + 1
    read = records("\n".join([*lines[:place], *devices, *lines[place:]]))
    assert {(one.world_size, one.group_size, one.params.get("group")) for one in read} == {
        (4, 2 if group else 4, group)
    }
    assert bool(read[0].notes) == (group is not None)


OLD = """\
# nThread 1 nGpus 2 minBytes 8 maxBytes 8 step: 2(factor) warmup iters: 5 iters: 20 validation: 1
#
# Using devices
#   Rank  0 Pid  99 on  node0 device  0 [0x06] Tesla V100
#
#                                                     out-of-place                    in-place
#       size         count    type   redop     time   algbw   busbw  error     time   algbw   busbw  error
#        (B)    (elements)                     (us)  (GB/s)  (GB/s)           (us)  (GB/s)  (GB/s)
           8             2   float     sum    20.15    0.00    0.00  1e-07    19.71    0.00    0.00  2e-07
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 0.0001
"""


def test_old_version_lacks_collective_and_wrong_count() -> None:
    assert "line 7: nothing says what the table measures; say it with --pattern" in refusal(OLD)
    read = records(OLD, pattern="all_reduce")
    assert [(one.wrong, one.root, one.world_size, known(one.imported).error) for one in read] == [
        (None, None, 1, 1e-07), (None, None, 1, 2e-07),
    ]  # fmt: skip
    assert records("mpirun -np 2 ./build/all_reduce_perf -b 8\n" + OLD)[0].pattern == "all_reduce"
    assert "the log says all_reduce, not broadcast" in refusal(TEXT, pattern="broadcast")
    assert "the log says 2, not 3" in refusal(TEXT, world_size=3)


def test_timestamp_after_a_row_is_not_a_figure(tmp_path: Path) -> None:
    lines = [
        line.rstrip()
        + ("            timestamp" if "algbw" in line else "  2026-11-23 02:23:07" if rows_of(line) else "")
        for line in TEXT.splitlines()
    ]
    text = "\n".join(lines)
    assert figures(text) == figures(TEXT)
    (tmp_path / "log").write_text(text)
    assert rows_of(load("reports", "nccl-tests").render([imported(tmp_path / "log", tmp_path / "run")])) == rows_of(
        text
    )


def test_a_replay_has_only_the_second_half(tmp_path: Path) -> None:
    line = TEXT.splitlines()[12]
    text = TEXT.replace(line, line[:52] + " " * 32 + line[84:])
    read = [one for one in records(text) if one.bytes == 32]
    assert [(known(one.imported).placement, one.time_us and one.time_us.p50) for one in read] == [("in_place", 10.73)]
    (tmp_path / "log").write_text(text)
    assert load("reports", "nccl-tests").render([imported(tmp_path / "log", tmp_path / "run")]) + "\n" == text


# Damage.


def replaced(line: int, old: str, new: str) -> str:
    lines = TEXT.splitlines()
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("line", "old", "new", "words"),
    [
        (14, "   128 ", "   1x8 ", "size is '1x8'"),
        (14, "   32 ", "   -32 ", "count is '-32'"),
        (14, "float", "flo,t", "type is 'flo,t'"),
        (14, "-1", "-2", "root is '-2'"),
        (14, "10.98", "10,98", "out_of_place time is '10,98'"),
        (14, "10.98", "-10.98", "out_of_place time is -10.98, which cannot be"),
        (14, "10.72", "1_0.72", "in_place time is '1_0.72'"),
        (14, "10.72", "", "a row of 13 cells has 12"),
        (14, "10.72", "10.72 7", "a row of 13 cells has 14"),
        (14, "   128 ", "   1" + "0" * 30 + " ", "which is no whole number"),
        (26, "2147483648     536870912     float     sum      -1", "2147483648", "a row of 13 cells has 9"),
    ],
)
def test_a_damaged_line_is_named(line: int, old: str, new: str, words: str) -> None:
    message = refusal(replaced(line, old, new))
    assert message.startswith(f"log.txt, line {line}: ")
    assert words in message
    assert "--skip-damaged" in message


def test_damaged_line_can_be_skipped() -> None:
    ((_, reading),) = read_log(Log.of("x", replaced(14, "10.98", "?").encode()), Stated(skip_damaged=True))
    assert [(one.record.bytes) for one in reading.cases] == [r.bytes for r in records(TEXT) if r.bytes != 128]
    assert reading.damaged == ["line 14: out_of_place time is '?', which is no number"]


@pytest.mark.parametrize("cells", range(1, 13))
def test_log_cut_inside_a_row_is_damaged(cells: int) -> None:
    lines = TEXT.splitlines()[:15]
    end = [match.end() for match in re.finditer(r"\S+", lines[-1])][cells - 1]
    lines[-1] = lines[-1][:end]
    assert refusal("\n".join(lines)).startswith(f"log.txt, line 15: a row of 13 cells has {cells}")


def test_log_cut_between_rows_keeps_them_with_a_warning() -> None:
    ((_, reading),) = read_log(Log.of("x", "\n".join(TEXT.splitlines()[:15]).encode()), Stated())
    assert len(reading.cases) == 8
    assert "no end" in reading.warnings[0]
    assert reading.tables[0]["concluded"] is False


# JSON.


def changed_json(path: str, value: Any) -> str:
    report = json.loads(json.dumps({**REPORT, "results": REPORT["results"][:2]}))
    *outer, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place: Any = report
    for key in outer:
        place = place[key]
    place[last] = value
    return json.dumps(report)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("version", 4, "version 4 of nccl-tests' JSON; this ncclbench reads 1 to 3"),
        ("results", {}, "$.results"),
        ("results.0.size", "8", "$.results[0].size"),
        ("results.0.size", -8, "results[0].size is -8"),
        ("results.1.root", "first", "results[1].root is 'first'"),
        ("results.1.type", "a/b", "results[1].type is 'a/b'"),
        ("results.0.out_of_place.time", "soon", "results[0].out_of_place.time is 'soon'"),
        ("results.0.in_place.bus_bw", -1.0, "results[0].in_place.bus_bw is '-1.0'"),
        ("results.0.in_place_per_iter.times_us", [1.0, "x"], "$.results[0].in_place_per_iter.times_us[1]"),
        ("results.0.in_place_per_iter.times_us", [1.0], "a process has 200 times, and others 1"),
        ("results.0.in_place_per_iter.times_us.7", -1.0, "a time is negative"),
        ("config.devices", 3, "config.devices"),
    ],
)
def test_damaged_json_names_the_path(path: str, value: Any, words: str) -> None:
    message = refusal(changed_json(path, value))
    assert message.startswith("log.txt, line 1: ")
    assert words in message


def test_cut_json_names_its_last_line() -> None:
    text = json.dumps({**REPORT, "results": REPORT["results"][:1]}, indent=1)
    half = text[: len(text) // 2]
    assert f"line {half.rstrip().count(chr(10)) + 1}: no whole JSON" in refusal(half)


def test_json_nan_and_null_are_nothing() -> None:
    (first, *_) = records(changed_json("results.0.out_of_place", {"time": "nan", "alg_bw": None, "bus_bw": "nan"}))
    assert (first.status, first.time_us, first.alg_gb_per_s, first.wrong) == ("skipped", None, None, None)


def test_json_keeps_no_secret_and_names_the_reduction(tmp_path: Path) -> None:
    text = changed_json(
        "env", ["NCCL_NVLS_ENABLE=0", "AWS_SECRET_ACCESS_KEY=hunter2", "NCCL_AUTH_TOKEN=hunter2", "HOME=/x"]
    )
    (tmp_path / "log.json").write_text(text)
    run = imported(tmp_path / "log.json", tmp_path / "run")
    assert run.manifest.provenance.variables == {"NCCL_NVLS_ENABLE": "0"}
    kept = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"hunter2" not in kept
    assert {known(one.imported).over_ranks for one in run.records} == {"mean"}
    slowest = records(changed_json("args", ["all_reduce_perf", "-a", "3"]))
    assert {known(one.imported).over_ranks for one in slowest} == {"max"}


def test_json_of_processes_with_several_gpus_has_samples_without_a_rank(tmp_path: Path) -> None:
    """With two GPUs per process, the log has the slower time of both without naming the GPU."""
    report = json.loads(changed_json("version", 3))
    for result in report["results"]:
        for name in PLACEMENTS:
            del result[f"{name}_per_iter"]["per_process_max_times_us"]
    (tmp_path / "log.json").write_text(json.dumps(report))
    run = imported(tmp_path / "log.json", tmp_path / "run")
    timed = [one for one in run.records if one.samples]
    assert len(timed) == 4
    for one in timed:
        assert one.skew_us is None
        table = pq.read_table(run.path / str(one.samples))
        assert table.column("rank").null_count == table.num_rows == 200


def test_unknown_fields_are_none() -> None:
    bare = "\n".join(line for line in TEXT.splitlines() if rows_of(line) or "algbw" in line)
    for one in records(bare, pattern="all_reduce"):
        nothing = (one.world_size, one.group_size, one.warmup, one.launches_per_sample, one.started, one.tolerance)
        assert nothing == (None,) * 6
        assert known(one.imported).version is None
