"""The table, character by character, for runs that are made by hand."""

from pathlib import Path
from typing import Any

import pytest

from ncclbench.config.plugins import load
from ncclbench.store.records import GroupResult, Record, Skew
from ncclbench.store.run_directory import Run, read_run
from ncclbench.store.run_writer import RunWriter
from tests.helpers.stored import manifest, measured_record, record, summary, write_run

MANIFEST: dict[str, Any] = {
    "schema": 1,
    "plan": {"name": "p", "cases": []},
    "topology": {"node_names": ["n0", "n1"]},
    "transport": "nccl",
    "device": "cuda",
    "world_size": 4,
}


def timed(pattern: str = "all_reduce", nbytes: int = 1024, **fields: Any) -> Record:
    chosen: dict[str, Any] = {"transport": "nccl", "world_size": 4, "skew_us": Skew(p50=1.25, max=9.0)}
    return measured_record(pattern, nbytes, **chosen | fields)


def render(path: Path, fields: dict[str, Any], *records: Record) -> str:
    """The table of a run that was stored and read, with RUN for its path."""
    return shown(read_run(write_run(path, *records, **fields)))


def shown(*runs: Run) -> str:
    text = load("reports", "table").render(list(runs))
    assert isinstance(text, str)
    for run in runs:
        text = text.replace(str(run.path), "RUN")
    return text


GOLDEN = """\
# RUN: 4 ranks on 2 nodes over nccl
# time is the median over iterations of the slowest rank; p50 95% is its interval; GB is 1e9 bytes

all_reduce, isolated
    size        count                               time     algbw     busbw               p50 95%    p99   skew
     (B)   (elements)   type      redop   root      (us)    (GB/s)    (GB/s)   #wrong         (us)   (us)   (us)     n
 ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
    1024          256   float32   sum       -1     12.35     0.083     0.124        0    12..12.75   99.5   1.25   120
 1048576       262144   float32   sum       -1   1234568   300.500   450.750      N/A   1000..2000      -   1.25    40

broadcast group=2, pipelined
 size        count                            time    algbw    busbw            p50 95%    p99   skew
  (B)   (elements)   type      redop   root   (us)   (GB/s)   (GB/s)   #wrong      (us)   (us)   (us)   n
 ────────────────────────────────────────────────────────────────────────────────────────────────────────
   64           16   float32   none       1    0.5        -        -        0         -      -      -   4
"""


def test_two_sections_are_rendered_exactly(tmp_path: Path) -> None:
    text = render(
        tmp_path / "run",
        MANIFEST,
        timed(redop="sum"),
        timed(
            nbytes=1 << 20,
            redop="sum",
            wrong=None,
            time_us=summary(n=40, p50=1234567.8, p50_lo=1000.4, p50_hi=2000.0, p99=None),
            alg_gb_per_s=300.5,
            bus_gb_per_s=450.75,
        ),
        timed(
            "broadcast",
            64,
            case="broadcast/float32/64/pipelined/group=2/root=1",
            params={"group": "2", "root": 1},
            timing="pipelined",
            root=1,
            time_us=summary(n=4, p50=0.5, p50_lo=None, p50_hi=None, p99=None),
            skew_us=None,
            alg_gb_per_s=None,
            bus_gb_per_s=None,
        ),
    )
    assert text + "\n" == GOLDEN


def test_a_cpu_run_is_stamped(tmp_path: Path) -> None:
    manifest = MANIFEST | {"device": "cpu", "transport": "gloo"}
    lines = render(tmp_path / "run", manifest, timed()).splitlines()
    assert lines[0] == "# RUN: 4 ranks on 2 nodes over gloo"
    assert lines[1] == "# CPU only: proves logic, not a fabric"


def test_a_gpu_run_is_not_stamped(tmp_path: Path) -> None:
    assert "CPU" not in render(tmp_path / "run", MANIFEST, timed())


def test_a_run_without_records_says_so(tmp_path: Path) -> None:
    assert render(tmp_path / "run", MANIFEST).splitlines()[-1] == "no case has finished"


def test_unmeasured_cases_have_a_reason_and_no_row(tmp_path: Path) -> None:
    text = render(
        tmp_path / "run",
        MANIFEST,
        record("hypercube", 1024, status="skipped", reason="hypercube needs a power of two of ranks"),
        record("scatter", 1024, status="failed", reason="rank 2 died (last seen in timed)", ranks=[2]),
        record("gather", 1024, status="timeout", reason="no progress for 60 s", ranks=[1]),
    )
    assert text.splitlines()[3:] == [
        "hypercube, isolated",
        "! hypercube/float32/1024/isolated: skipped: hypercube needs a power of two of ranks",
        "",
        "scatter, isolated",
        "! scatter/float32/1024/isolated: failed: rank 2 died (last seen in timed)",
        "",
        "gather, isolated",
        "! gather/float32/1024/isolated: timeout: no progress for 60 s",
    ]


def test_a_remark_on_a_sweep_is_written_once(tmp_path: Path) -> None:
    text = render(
        tmp_path / "run",
        MANIFEST,
        *(record("hypercube", 1 << k, status="skipped", reason="needs 2 ranks") for k in range(4, 9)),
    )
    assert text.splitlines()[-1] == "! hypercube/float32/16/isolated: skipped: needs 2 ranks (and 4 more cases)"


def test_wrong_data_have_a_row_and_a_remark(tmp_path: Path) -> None:
    text = render(
        tmp_path / "run", MANIFEST, timed(status="wrong", wrong=17, reason="17 elements differ", notes=["ungated"])
    )
    row = next(line for line in text.splitlines() if line.lstrip().startswith("1024 "))
    assert row.split()[8] == "17"
    assert text.splitlines()[-2:] == [
        "! all_reduce/float32/1024/isolated: wrong: 17 elements differ",
        "! all_reduce/float32/1024/isolated: ungated",
    ]


def test_groups_side_by_side_are_each_shown(tmp_path: Path) -> None:
    groups = [
        GroupResult(ranks=[0, 1], time_us=summary(p50=10.5), bus_gb_per_s=1.25),
        GroupResult(ranks=[2, 3], time_us=summary(p50=77.5), bus_gb_per_s=0.17),
    ]
    text = render(tmp_path / "run", MANIFEST, timed(params={"group": "2"}, groups=groups, group_size=2))
    assert "all_reduce group=2, isolated" in text
    # A slow group must not hide behind the sum of all: the design has every group reported.
    for figure in ("10.5", "77.5", "1.250", "0.170"):
        assert figure in text


def test_a_run_that_was_cut_off_names_the_case(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", manifest(**MANIFEST))
    writer.append(timed())
    writer.event("case", case="all_reduce/float32/2048/isolated")
    assert shown(read_run(tmp_path / "run")).splitlines()[-1] == (
        "! interrupted in all_reduce/float32/2048/isolated; continue it with --resume"
    )


def test_several_runs_are_rendered_one_by_one(tmp_path: Path) -> None:
    render(tmp_path / "a", MANIFEST, timed())
    render(tmp_path / "b", MANIFEST | {"world_size": 8}, timed())
    text = shown(read_run(tmp_path / "a"), read_run(tmp_path / "b"))
    assert [line for line in text.splitlines() if "ranks on" in line] == [
        "# RUN: 4 ranks on 2 nodes over nccl",
        "# RUN: 8 ranks on 2 nodes over nccl",
    ]


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [(0.0123456, "0.01235"), (1.0, "1"), (999.96, "1000"), (12345.6, "12346"), (3e7, "30000000")],
)
def test_times_have_four_digits_and_never_an_exponent(microseconds: float, text: str, tmp_path: Path) -> None:
    row = render(tmp_path / "run", MANIFEST, timed(time_us=summary(p50=microseconds))).splitlines()[-1]
    assert row.split()[5] == text


def test_no_figure_is_cut_however_wide(tmp_path: Path) -> None:
    widest = timed(
        nbytes=1 << 40, time_us=summary(p50=1.5e10, p50_lo=1.25e10, p50_hi=1.75e10, p99=1.9e10), alg_gb_per_s=12345.678
    )
    text = render(tmp_path / "run", MANIFEST, widest)
    assert "…" not in text
    assert "12500000000..17500000000" in text
    assert str(1 << 40) in text


REGIMES = """\
timing regimes side by side; time is the median of the slowest rank
                           size   isolated   pipelined   graph   launch cost
 pattern      type          (B)       (us)        (us)    (us)          (us)
 ───────────────────────────────────────────────────────────────────────────
 all_reduce   float32         8      8.608       80.81   5.474         75.34
 all_reduce   float32   1048576      17.38       58.85       -             -
"""


def test_regimes_are_side_by_side_with_the_launch_cost(tmp_path: Path) -> None:
    """As two H200 showed it; a graph that was skipped implies nothing."""
    seen = {
        8: {"isolated": 8.608, "pipelined": 80.81, "graph": 5.474},
        1 << 20: {"isolated": 17.38, "pipelined": 58.85},
    }
    records = [
        timed(nbytes=nbytes, timing=timing, case=f"all_reduce/float32/{nbytes}/{timing}", time_us=summary(p50=p50))
        for nbytes, times in seen.items()
        for timing, p50 in times.items()
    ]
    text = render(tmp_path / "run", MANIFEST, *records)
    assert [line.rstrip() for line in REGIMES.splitlines()] == [line.rstrip() for line in text.splitlines()[-6:]]
    alone = render(tmp_path / "alone", MANIFEST, *(one for one in records if one.timing == "graph"))
    assert "side by side" not in alone
