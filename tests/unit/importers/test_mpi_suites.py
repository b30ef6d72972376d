"""OSU micro-benchmarks and Intel MPI Benchmarks: the meaning of their columns, and missing fields."""

from pathlib import Path
from typing import Any

import pytest

from ncclbench.errors import UsageError
from ncclbench.importers.common.import_logs import read_log
from ncclbench.importers.common.imported_cases import Reading, Stated
from ncclbench.importers.common.log_file import Log
from ncclbench.measure.compute_overlap import share_percent
from ncclbench.store.records import Record, Skew
from tests.helpers.paths import FIXTURES
from tests.helpers.stored import known


def reading(name: str, **stated: Any) -> Reading:
    path = FIXTURES / name
    ((_, found),) = read_log(Log.of(path.name, path.read_bytes()), Stated(**stated))
    return found


def records(name: str, **stated: Any) -> list[Record]:
    return [one.record for one in reading(name, **stated).cases]


def times(read: list[Record]) -> list[float | None]:
    return [one.time_us.p50 if one.time_us else None for one in read]


def cells(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines() if line.split() and line.split()[0].isdecimal()]


# OSU.


def test_osu_latency_is_half_a_round_trip() -> None:
    for name, dtype in (("osu/osu_latency.txt", "int8"), ("osu/osu_latency_5.9.txt", None)):
        read = records(name)
        rows = cells(FIXTURES / name)
        assert [(one.bytes, *times([one])) for one in read] == [(int(size), float(time)) for size, time in rows]
        assert {(one.pattern, one.dtype, one.world_size, one.transport) for one in read} == {
            ("ping_pong", dtype, 2, "mpi")
        }
        assert read[-1].alg_gb_per_s == pytest.approx(int(rows[-1][0]) / float(rows[-1][1]) / 1e3)


def test_osu_bandwidth_is_in_1e6_bytes_without_time() -> None:
    read = records("osu/osu_bw.txt")
    rows = cells(FIXTURES / "osu" / "osu_bw.txt")
    assert [one.alg_gb_per_s for one in read] == pytest.approx([float(rate) / 1e3 for _, rate in rows])
    assert times(read) == [None] * 3
    assert [one.alg_gb_per_s for one in records("osu/osu_mbw_mr.txt")] == pytest.approx([0.00944, 26.90329])


def test_without_f_only_the_mean_over_ranks_is_known() -> None:
    read = records("osu/osu_allreduce.txt")
    assert times(read) == [1.34, 1.17, 230.90]
    for one in read:
        nothing = (
            one.world_size,
            one.dtype,
            one.skew_us,
            one.launches_per_sample,
            one.warmup,
            one.wrong,
            one.bus_gb_per_s,
        )
        assert nothing == (None,) * 7
        assert (one.timing, known(one.imported).over_ranks) == ("averaged", "mean")


def test_with_f_the_slowest_rank_counts() -> None:
    first, last = records("osu/osu_allreduce_full.txt")
    assert times([first, last]) == [8.84, 1300.50]
    spread = pytest.approx(100.5)
    assert last.skew_us == Skew(p50=spread, max=spread)  # type: ignore[arg-type]
    assert (last.dtype, last.launches_per_sample, known(last.imported).over_ranks) == ("int32", 100, "max")
    assert known(known(last.imported).cells)["Avg Latency"] == 1234.56


def test_the_whole_buffer_needs_the_number_of_ranks() -> None:
    """OSU's size is the message from one rank to another; S is this size times the number of ranks."""
    (unknown, *_), (known, *_) = (records("osu/osu_alltoall_full.txt", world_size=n) for n in (None, 8))
    assert (unknown.bytes, unknown.size_bytes, unknown.alg_gb_per_s, unknown.bus_gb_per_s) == (1, None, None, None)
    assert "--world-size" in unknown.notes[0]
    assert (known.bytes, known.size_bytes, known.count, known.notes) == (8, 8, 1, [])
    assert known.alg_gb_per_s == pytest.approx(8 / 4.6 / 1e3)
    assert known.bus_gb_per_s == pytest.approx(8 / 4.6 / 1e3 * 7 / 8)


def test_failed_validation_is_a_wrong_case() -> None:
    read = records("osu/osu_alltoall_checked.txt")
    assert [(one.status, one.reason) for one in read] == [("ok", None), ("wrong", "OSU's validation says Fail")]
    assert [one.wrong for one in read] == [None, None]  # the log has no count


def test_shell_output_after_a_blank_line_is_not_a_row() -> None:
    text = (FIXTURES / "osu" / "osu_latency.txt").read_text()
    ((_, found),) = read_log(Log.of("log.txt", (text + "\nElapsed 12\n").encode()), Stated())
    assert len(found.cases) == 3
    with pytest.raises(UsageError, match="line 7: Size is 'Elapsed'"):  # it could be a row without its size
        read_log(Log.of("log.txt", (text + "Elapsed 12\n").encode()), Stated())


def test_columns_that_are_not_known_are_left_out_aloud() -> None:
    """For derived datatypes it is not documented whether the size or the transmitted size is the message."""
    text = (FIXTURES / "osu" / "osu_latency.txt").read_text()
    text += text.replace("Latency(us)", "Latency(us)    Transmit Size")
    ((_, found),) = read_log(Log.of("log.txt", text.encode()), Stated())
    assert len(found.cases) == 3
    assert found.warnings == ["line 9: OSU's Latency has columns that are not imported: Transmit Size"]


def test_non_blocking_collective_has_time_and_overlap() -> None:
    first, last = records("osu/osu_iallreduce_full.txt")
    assert (last.pattern, last.params, last.status) == ("all_reduce", {"call": "non-blocking"}, "ok")
    assert times([first, last]) == [2.60, 1260.00]  # with -f, of the slowest rank
    assert last.skew_us == Skew(p50=110.0, max=110.0)
    assert last.overlap is not None
    stated = (last.overlap.share_percent, last.overlap.pure_us, last.overlap.overlapped_us, last.overlap.compute_us)
    assert stated == (77.50, 1200.00, 1480.00, 1210.00)
    assert share_percent(*stated[1:]) == pytest.approx(77.50)  # records use OSU's formula
    assert known(known(last.imported).cells)["MPI_Wait"] == 266.50
    old = records("osu/osu_barrier_and_iallreduce.txt")
    assert [(one.pattern, one.overlap is not None) for one in old] == [("barrier", False), ("all_reduce", True)]
    assert times(old) == [12.57, 2.30]


def test_osu_title_without_a_blank_is_read() -> None:
    read = records("osu/osu_ialltoall.txt", world_size=4)
    assert {one.pattern for one in read} == {"all_to_all"}
    assert [one.bytes for one in read] == [4, 4 * 65536]


def test_tail_latencies_and_validation_are_kept_beside_the_figures() -> None:
    first, last = records("osu/osu_allreduce_tail.txt")
    assert times([first, last]) == [8.84, 1300.50]
    assert (first.status, known(known(first.imported).cells)["P99 Tail Lat"]) == ("ok", 9.90)


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("osu/osu_latency.txt", "95.75", "9x.75", "line 6: Avg Latency is '9x.75'"),
        ("osu/osu_latency.txt", "95.75", "", "line 6: a row of 2 cells has 1"),
        ("osu/osu_latency.txt", "1048576", "10x8576", "line 6: Size is '10x8576'"),
        ("osu/osu_allreduce_full.txt", "1200.00", "9200.00", "line 6: the slowest rank's 1300.5 us is less"),
        ("osu/osu_allreduce_full.txt", " 100\n", " 1.5\n", "line 6: Iterations is '1.5'"),
        ("imb/imb_2018.txt", "88.08", "88,08", "line 41: t[usec] is '88,08'"),
        ("imb/imb_2018.txt", "400.10", "900.10", "line 68: t_max is 420.3, less than t_min, 900.1"),
        ("imb/imb_2018.txt", "       420.30       410.20", "", "line 68: a row of 5 cells has 3"),
    ],
)
def test_a_damaged_line_is_named(name: str, old: str, new: str, words: str) -> None:
    text = (FIXTURES / name).read_text()
    assert text.count(old) == 1 or name.endswith("full.txt")
    with pytest.raises(UsageError) as caught:
        read_log(Log.of("log.txt", text.replace(old, new).encode()), Stated())
    assert str(caught.value).startswith(f"log.txt, {words}")
    ((_, found),) = read_log(Log.of("log.txt", text.replace(old, new).encode()), Stated(skip_damaged=True))
    assert found.damaged[0].startswith(words)


# IMB.


def test_imb_tables_have_their_own_process_counts() -> None:
    read = records("imb/imb_2018.txt")
    assert [(one.pattern, one.world_size) for one in read] == (
        [("ping_pong", 2)] * 3 + [("send_recv", 4)] * 2 + [("all_reduce", 2)] * 3 + [("all_reduce", 4)] * 3
        + [("all_to_all", 4)] * 2 + [("barrier", 4)]
    )  # fmt: skip
    assert len({one.case for one in read}) == len(read)


def test_imb_time_is_of_the_slowest_rank() -> None:
    one = next(one for one in records("imb/imb_2018.txt") if one.world_size == 4 and one.bytes == 8)
    assert (one.pattern, times([one]), one.launches_per_sample, one.dtype, one.redop) == (
        "all_reduce", [18.59], 1000, "float32", "sum",
    )  # fmt: skip
    assert one.skew_us is not None
    assert one.skew_us.max == pytest.approx(18.59 - 4.50)
    assert one.bus_gb_per_s == pytest.approx(8 / 18.59e3 * 2 * 3 / 4)


def test_imb_message_is_a_part_of_the_buffer() -> None:
    one = [one for one in records("imb/imb_2018.txt") if one.pattern == "all_to_all"][-1]
    assert (one.bytes, one.count, one.dtype) == (4 << 20, 1 << 20, "uint8")
    assert one.bus_gb_per_s == pytest.approx((4 << 20) / 990.30e3 * 3 / 4)


def test_groups_rates_and_unknown_columns_of_imb() -> None:
    found = reading("imb/imb_multi.txt")
    multi, uniband = (one.record for one in found.cases)
    assert (multi.pattern, multi.world_size, multi.group_size, multi.params["group"]) == ("all_reduce", 8, 4, "4")
    assert uniband.time_us is None
    assert uniband.alg_gb_per_s == pytest.approx(2.048)
    assert found.version == "2021.3"
    assert "Ibcast has columns that are not imported" in found.warnings[0]


def test_imb_groups_have_rows_and_oversized_ones_are_skipped() -> None:
    """Without its column, the number of the first group would be read as a size."""
    found = reading("imb/imb_groups.txt")
    assert found.warnings == []
    zero, one, fits, memory, time = (one.record for one in found.cases)
    assert [(r.params["place"], r.bytes, r.world_size, *times([r])) for r in (zero, one)] == [
        (0, 1024, 8, 6.00), (1, 1024, 8, 7.00)
    ]  # fmt: skip
    assert (fits.pattern, fits.world_size, fits.status) == ("all_to_all", 8, "ok")
    assert [(r.status, r.time_us, r.bytes // 8) for r in (memory, time)] == [
        ("skipped", None, 4194304), ("skipped", None, 8388608)
    ]  # fmt: skip
    assert str(memory.reason).startswith("IMB: out-of-mem.; needed X=")


def test_imb_mbytes_are_not_used_as_a_rate() -> None:
    """Mbytes were 2**20 bytes in old versions and are 1e6 now; the time is unambiguous."""
    text = (FIXTURES / "imb" / "imb_2018.txt").read_text().replace("11904.70", "11353.21")
    ((_, found),) = read_log(Log.of("x", text.encode()), Stated())
    assert found.cases[2].record.alg_gb_per_s == pytest.approx((1 << 20) / 88.08e3)
