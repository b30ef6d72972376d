"""Importers read or refuse any file in one line, and every record that they read can be stored and shown.

Three methods: hypothesis generates files and edits real logs; a fixed number of mutations, equal in every run, damages
real logs; and atheris follows branches for at most 20 seconds, if the extra `fuzz` is installed.
`scripts/fuzz_importers.py` runs atheris without a limit.
"""

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ncclbench.config.plugins import load, names
from ncclbench.errors import UsageError
from ncclbench.importers.common import import_logs as _store
from ncclbench.importers.common.imported_cases import Reading, Stated
from ncclbench.importers.common.log_file import Log
from ncclbench.store.records import Record
from ncclbench.store.run_directory import read_run
from tests.helpers.paths import FIXTURES, SCRIPTS

ALL = sorted(path for folder in ("nccl-tests", "osu", "imb") for path in (FIXTURES / folder).iterdir())
MUTANTS = int(os.environ.get("NCCLBENCH_MUTANTS", "60"))  # of each log


def read_or_refuse(content: bytes, stated: Stated, only: str | None = None) -> list[Reading]:
    """The readings; none if the file is refused with one short line that names it."""
    refusal: str | None = None
    readings: list[Reading] = []
    try:
        readings = [reading for _, reading in _store.read_log(Log.of("log.txt", content), stated, only)]
    except UsageError as error:
        refusal = str(error)
    assert refusal is None or (refusal.startswith("log.txt") and "\n" not in refusal and len(refusal) < 500)
    for reading in readings:
        for one in reading.cases:
            sound(one.record)
    return readings


def sound(record: Record) -> None:
    """Check the invariants that every reader of a record needs."""
    assert msgspec.json.decode(msgspec.json.encode(record), type=Record) == record
    assert 0 <= record.bytes < 1 << 63
    assert record.status in ("ok", "wrong", "skipped")
    if record.time_us is not None:
        assert 0 <= record.time_us.min <= record.time_us.p50 <= record.time_us.max < float("inf")
    for rate in (record.alg_gb_per_s, record.bus_gb_per_s):
        assert rate is None or 0 <= rate < float("inf")


# Generated logs.

WORDS = [
    "# nccl-tests version 2.19.6",
    "# Collective test starting: all_reduce_perf",
    "#  Rank  0 Group  0 Pid 1 on h device  0 [0] X",
    "# size count type redop root time algbw busbw #wrong time algbw busbw #wrong",
    "# size count time algbw",
    "8 2 float sum -1 1.5 0.1 0.1 0 1.5 0.1 0.1 N/A",
    "8 2 float sum -1",
    "h:1:2 [0] NCCL INFO x",
    "8 2 float sum -1h:1:2 [0] NCCL INFO",
    "1.5 0.1 0.1 0 1.5 0.1 0.1 N/A",
    "# Avg bus bandwidth : 1",
    "# Out of bounds values : 0 OK",
    "[1,0]<stdout>:8 2",
    "0: 8 2",
    "# OSU MPI Latency Test v7.5",
    "# OSU MPI Allreduce Latency Test v5.8",
    "# Datatype: MPI_INT.",
    "# Size       Avg Latency(us)",
    "# Size  Bandwidth (MB/s)",
    "1 2.5",
    "1",
    "# Benchmarking Allreduce",
    "# #processes = 4",
    "# #processes = 0",
    "#bytes #repetitions t_min[usec] t_max[usec] t_avg[usec]",
    "8 1000 1.0 2.0 1.5",
    "8 0 0 0 0",
    "#repetitions t_avg[usec]",
    "#bytes",
    "# Size Validation",
    "# Avg Latency(us)",
    "1e308 1e999",
    "-1 -1",
    "nan inf",
    "٣ ²",
    "999999999999999999999999999999",
    "0x10 1_0",
]
made_up = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=30)), max_size=25).map("\n".join)


@given(text=made_up, pattern=st.sampled_from([None, "all_reduce"]), skip=st.booleans())
def test_any_lines_are_read_or_refused(text: str, pattern: str | None, skip: bool) -> None:
    content = text.encode("utf-8", errors="surrogatepass")
    for name in (None, *names("importers")):
        read_or_refuse(content, Stated(pattern=pattern, skip_damaged=skip), name)


@given(content=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    for name in (None, *names("importers")):
        read_or_refuse(content, Stated(pattern="all_reduce"), name)


REPORT = json.loads((FIXTURES / "nccl-tests" / "all_reduce_per_iteration.json").read_text())
SMALL = {**REPORT, "results": REPORT["results"][:1]}
for _half in ("in_place_per_iter", "out_of_place_per_iter"):
    SMALL["results"][0][_half].update(times_us=[1.5, 2.5], per_process_max_times_us=[[1.5, 1.0], [1.0, 2.5]])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@given(data=st.data())
def test_any_json_value_is_read_or_refused(data: st.DataObject) -> None:
    report = json.loads(json.dumps(SMALL))
    for _ in range(data.draw(st.integers(1, 3))):
        place = report
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = data.draw(st.sampled_from(keys))
            if not (isinstance(place[key], dict | list) and place[key]) or data.draw(st.integers(0, 3)) == 0:
                place[key] = data.draw(values)
                break
            place = place[key]
    read_or_refuse(json.dumps(report).encode(), Stated(pattern=None), "nccl-tests-json")


@pytest.mark.parametrize("bracket", ["[", '{"a":', '{"results":['])
def test_deeply_nested_json_is_refused(bracket: str) -> None:
    content = ('{"version":3,"args":[],"nccl_version":1,"x":' + bracket * 100_000).encode()
    assert read_or_refuse(content, Stated()) == []


# Damaged logs.


def _bits(content: bytearray, chance: random.Random) -> None:
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def _cut(content: bytearray, chance: random.Random) -> None:
    del content[chance.randrange(len(content)) :]


def _hole(content: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(content))
    del content[start : start + chance.randrange(1, 60)]


def _twice(content: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(content))
    content[start:start] = content[start : start + chance.randrange(1, 400)]


def _number(content: bytearray, chance: random.Random) -> None:
    spans = [match.span() for match in re.finditer(rb"\d+", bytes(content))]
    start, stop = chance.choice(spans)
    content[start:stop] = chance.choice(
        [b"", b"-1", b"0", b"1e400", b"nan", b"9" * 25, b"9" * 5000, b"1.2.3", b"x", b"\xd9\xa3"]
    )


def _stranger(content: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(content))
    content[start:start] = chance.choice(
        [b"\n", b"\r", b"#", b"\x00", b"\x1b[31m", b"h:1:2 [0] NCCL INFO x\n", b" ", b'"', b"\xff"]
    )


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (_bits, _cut, _hole, _twice, _number, _stranger)


def mutant(content: bytes, seed: str) -> bytes:
    chance = random.Random(seed)
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 5])):
        if changed and re.search(rb"\d", changed):
            chance.choice(MUTATIONS)(changed, chance)
    return bytes(changed)


def small(path: Path) -> bytes:
    return json.dumps(SMALL).encode() if path.suffix == ".json" else path.read_bytes()


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_a_damaged_log_is_read_or_refused(path: Path, tmp_path: Path) -> None:
    read = refused = 0
    for number in range(MUTANTS):
        content = mutant(small(path), f"{path.name} {number}")
        readings = read_or_refuse(content, Stated(pattern=None))
        read, refused = read + bool(readings), refused + (not readings)
        read_or_refuse(content, Stated(skip_damaged=True, pattern="all_reduce"))
        if readings and number % 25 == 0:
            _store.import_logs([Log.of("log", content)], tmp_path / str(number), Stated(), None, [])
            run = read_run(tmp_path / str(number))
            assert load("reports", "table").render([run])
            assert load("reports", "nccl-tests").render([run])
    assert read  # otherwise the mutations would cover only the refusals
    assert refused


# Longer inputs are slow and repeat the same lines; the fuzzer cuts them too.
STARTS = {path.name: small(path)[:6000] for path in ALL}
TOKENS = sorted({token for content in STARTS.values() for token in re.findall(rb"[^\s\d]{2,20}", content)})
positions = st.integers(0, 6000)
edits = st.one_of(
    st.tuples(st.just("insert"), positions, st.one_of(st.sampled_from(TOKENS), st.binary(max_size=20))),
    st.tuples(st.just("overwrite"), positions, st.one_of(st.sampled_from(TOKENS), st.binary(max_size=20))),
    st.tuples(st.just("delete"), positions, st.binary(min_size=1, max_size=200)),  # as many bytes as drawn
    st.tuples(st.just("append"), positions, st.sampled_from([*STARTS.values()])),  # of another log, from there on
)


def edited(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    for kind, where, data in changes:
        at = min(where, len(content))
        if kind == "append":
            content += data[at : at + 2000]
        else:
            kept = at + (0 if kind == "insert" else len(data))
            content = content[:at] + (b"" if kind == "delete" else data) + content[kept:]
    return content


@settings(max_examples=300)
@given(name=st.sampled_from([*STARTS]), changes=st.lists(edits, min_size=1, max_size=6))
def test_edited_log_is_read_or_refused(name: str, changes: list[tuple[str, int, bytes]]) -> None:
    content = edited(STARTS[name], changes)
    for stated in (Stated(), Stated(pattern="all_reduce", world_size=2, skip_damaged=True)):
        read_or_refuse(content, stated)


CELLS = re.compile(r"\S+")


@pytest.mark.parametrize("name", ["all_reduce", "all_reduce_per_iteration", "alltoall"])
def test_damaged_cell_never_becomes_a_figure(name: str) -> None:
    """Each cell of each row is replaced by text that is not a number; the error always names the line."""
    text = (FIXTURES / "nccl-tests" / f"{name}.txt").read_text()
    lines = text.splitlines()
    places = [k for k, line in enumerate(lines) if line.split()[:1] and line.split()[0].isdecimal()]
    for place in places[:: max(1, len(places) // 4)]:
        for match in CELLS.finditer(lines[place]):
            damaged = f"{lines[place][: match.start()]}{match[0][:1]}?{match[0][1:]}{lines[place][match.end() :]}"
            with pytest.raises(UsageError, match=f"^log.txt, line {place + 1}: "):
                _store.read_log(
                    Log.of("log.txt", "\n".join([*lines[:place], damaged, *lines[place + 1 :]]).encode()), Stated()
                )


@pytest.mark.exhaustive
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed: it is in the extra fuzz"
)
def test_atheris_finds_nothing_in_a_bounded_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPTS / "fuzz_importers.py"),
            "-runs=2000",
            "-max_total_time=20",
            "-seed=1",
            f"-artifact_prefix={tmp_path}/",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ended = re.search(r"Done (\d+) runs", done.stderr)
    assert ended, done.stderr[-3000:]
    assert int(ended[1]) > len(ALL)  # more than the initial logs
