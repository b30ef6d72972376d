"""The run directory: it reads back as written, and a kill or a full disk loses no finished case."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ncclbench.errors import EnvironmentFault, UsageError
from ncclbench.store import events
from ncclbench.store.files import line_hash
from ncclbench.store.records import GroupResult, LedgerRecord, PhaseResult, Record, Skew, Summary
from ncclbench.store.run_directory import first_difference, read_run
from ncclbench.store.run_writer import RunWriter, check_target
from ncclbench.store.samples import write_samples
from tests.helpers.stored import manifest, record

MANIFEST: dict[str, Any] = {
    "schema": 1,
    "plan": {"name": "p", "starts": 1, "cases": [{"id": "a", "settings": {"warmup": 5}}, {"id": "b"}]},
    "topology": {"world_size": 2, "nodes": [0, 0], "node_names": ["n0"]},
    "transport": "gloo",
    "device": "cpu",
    "world_size": 2,
}
SECONDS_RNK = np.arange(12, dtype=np.float64).reshape(2, 3, 2) * 1e-6


def numbered(number: int = 0, **fields: Any) -> Record:
    return record(nbytes=1024 << number, **fields)


FULL = numbered(
    params={"redop": "max", "group": "2"},
    reason="a reason\nwith a second line",
    wrong=0,
    wrong_ranks=[1],
    tolerance=0.5,
    notes=["ungated"],
    warmup=5,
    stopped="precision",
    launches_per_sample=20,
    count=256,
    size_bytes=1024,
    redop="max",
    root=1,
    group_size=2,
    time_us=Summary(n=6, min=1.0, p50=2.5, p50_lo=1.0, p50_hi=4.0, p95=None, p99=None, max=4.0, mean=2.5, cv=0.4),
    skew_us=Skew(p50=0.5, max=1.5),
    alg_gb_per_s=0.4096,
    bus_gb_per_s=0.4096,
    phases=[PhaseResult(label="bit_0", ledger=LedgerRecord(sent_bytes={"node": 1024}))],
    groups=[
        GroupResult(
            ranks=[0, 2],
            time_us=Summary(
                n=1, min=1.0, p50=1.0, p50_lo=None, p50_hi=None, p95=None, p99=None, max=1.0, mean=1.0, cv=None
            ),
            bus_gb_per_s=1.0,
        )
    ],
    ledger=LedgerRecord(sent_bytes={"self": 0, "node": 2048}, bottleneck_bytes=1024),
    ranks=[1],
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two finished cases."""
    path = tmp_path / "run"
    writer = RunWriter.create(path, manifest(**MANIFEST))
    writer.event("start", command=["run"])
    for number in range(2):
        writer.append(numbered(number), ["total", "bit_0"], SECONDS_RNK)
    return path


def test_written_run_reads_back(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", manifest(**MANIFEST))
    writer.event("start", command=["run", "all_reduce"])
    stored = writer.append(FULL, ["total", "bit_0"], SECONDS_RNK)
    skipped = writer.append(numbered(1, status="skipped", reason="needs 2 nodes"))
    writer.event("end", exit_code=0)
    back = read_run(tmp_path / "run")
    assert back.manifest == manifest(**MANIFEST)
    assert back.records == (stored, skipped)
    assert stored == msgspec.structs.replace(FULL, samples=stored.samples)
    assert skipped.samples is None
    assert [event.kind for event in back.events] == ["start", "result", "result", "end"]
    assert back.events[0].command == ["run", "all_reduce"]
    assert back.interrupted_in is None


def test_record_is_one_json_line_with_documented_names(run: Path) -> None:
    lines = (run / "results.jsonl").read_text().splitlines()
    assert len(lines) == 2
    first = json.loads(lines[0])
    assert first["schema"] == 1
    assert first["case"] == "all_reduce/float32/1024/isolated"
    assert set(first) >= {
        "pattern", "params", "transport", "timing", "dtype", "bytes", "world_size", "status", "reason", "wrong",
        "warmup", "time_us", "skew_us", "alg_gb_per_s", "bus_gb_per_s", "phases", "groups", "ledger", "samples",
        "started",
    }  # fmt: skip


def test_reader_ignores_unknown_fields(run: Path) -> None:
    results = run / "results.jsonl"
    line = json.loads(results.read_text().splitlines()[0]) | {"invented_later": [1]}
    results.write_text(json.dumps(line) + "\n")
    assert read_run(run).records[0].bytes == 1024


def test_samples_have_exactly_the_documented_columns(run: Path) -> None:
    samples = read_run(run).records[0].samples
    assert samples is not None
    table = pq.read_table(run / samples)
    assert table.schema.remove_metadata() == pa.schema(
        [
            ("rank", pa.int32()),
            ("iteration", pa.int32()),
            ("phase", pa.dictionary(pa.int32(), pa.string())),
            ("seconds", pa.float64()),
        ]
    )


def test_samples_keep_rank_and_iteration_of_every_value(tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    write_samples(path, ["total", "größe"], SECONDS_RNK)
    rows = pq.read_table(path).to_pylist()
    assert len(rows) == SECONDS_RNK.size
    found = {(row["rank"], row["iteration"], row["phase"]): row["seconds"] for row in rows}
    for (rank, iteration, column), seconds in np.ndenumerate(SECONDS_RNK):
        assert found[rank, iteration, ("total", "größe")[column]] == seconds


def test_samples_need_not_be_contiguous(tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    write_samples(path, ["a", "b"], np.asfortranarray(SECONDS_RNK))
    assert pq.read_table(path).column("seconds").to_pylist() == SECONDS_RNK.ravel().tolist()


def test_no_temporary_file_is_left(run: Path) -> None:
    assert not list(run.rglob("*.tmp"))
    assert len(list((run / "samples").iterdir())) == 2


def test_last_record_of_a_case_replaces_its_first(run: Path) -> None:
    writer = RunWriter(run)
    writer.append(numbered(0, status="failed", reason="rank 1 died"))
    back = read_run(run)
    assert [(r.bytes, r.status) for r in back.records] == [(1024, "failed"), (2048, "ok")]


def test_second_writer_does_not_overwrite_samples(run: Path) -> None:
    before = {path.name: path.read_bytes() for path in (run / "samples").iterdir()}
    RunWriter(run).append(numbered(0), ["total"], SECONDS_RNK[:, :, :1])
    after = {path.name: path.read_bytes() for path in (run / "samples").iterdir()}
    assert len(after) == 3
    assert before.items() <= after.items()


def test_case_that_began_and_did_not_end_is_named(run: Path) -> None:
    RunWriter(run).event("case", case="all_reduce/float32/4096/isolated")
    assert read_run(run).interrupted_in == "all_reduce/float32/4096/isolated"
    RunWriter(run).event("lost", ranks=[1], reason="died")
    assert read_run(run).interrupted_in is None


@pytest.mark.parametrize("name", ["results.jsonl", "events.jsonl"])
def test_torn_last_line_is_ignored_on_read_and_cut_on_resume(name: str, run: Path) -> None:
    whole = (run / name).read_bytes()
    back = read_run(run)
    (run / name).write_bytes(whole + whole.splitlines()[0][:-7])
    assert read_run(run) == back
    RunWriter.resume(run, manifest(**MANIFEST))
    assert (run / name).read_bytes() == whole


def test_chain_continues_after_a_torn_line(run: Path) -> None:
    with (run / "events.jsonl").open("ab") as file:
        file.write(b'{"time":"2026-01-01T')
    writer = RunWriter.resume(run, manifest(**MANIFEST))
    writer.event("resume", finished=2)
    assert events.broken_link(run / "events.jsonl") is None
    assert [event.kind for event in read_run(run).events] == ["start", "result", "result", "resume"]


def test_every_event_has_the_hash_of_the_line_before(run: Path) -> None:
    lines = (run / "events.jsonl").read_bytes().splitlines()
    previous = [json.loads(line)["previous"] for line in lines]
    assert previous == ["0" * 64, *(line_hash(line) for line in lines[:-1])]
    assert events.broken_link(run / "events.jsonl") is None


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        pytest.param(lambda lines: [lines[0].replace(b'"run"', b'"ran"'), *lines[1:]], 2, id="edited"),
        pytest.param(lambda lines: [lines[0], lines[1].replace(b"ok", b"OK"), lines[2]], 3, id="edited-later"),
        pytest.param(lambda lines: lines[1:], 1, id="first-removed"),
        pytest.param(lambda lines: [lines[0], lines[2]], 2, id="removed"),
        pytest.param(lambda lines: [lines[0], lines[0], *lines[1:]], 2, id="doubled"),
        pytest.param(lambda lines: [lines[0], b'{"kind":"result","previous":"x"}', *lines[1:]], 2, id="inserted"),
        pytest.param(lambda lines: [lines[0], lines[2], lines[1]], 2, id="swapped"),
        pytest.param(lambda lines: [*lines[:2], b"not json"], 3, id="garbage"),
        pytest.param(lambda lines: [*lines[:2], b"[1]"], 3, id="no-object"),
        pytest.param(lambda lines: [*lines[:2], b'{"kind":"end"}'], 3, id="no-hash"),
    ],
)
def test_changed_log_is_detected(change: Any, broken: int, run: Path) -> None:
    path = run / "events.jsonl"
    path.write_bytes(b"\n".join(change(path.read_bytes().splitlines())) + b"\n")
    assert events.broken_link(path) == broken


def test_missing_log_has_no_broken_link(tmp_path: Path) -> None:
    assert events.broken_link(tmp_path / "events.jsonl") is None
    assert events.read_events(tmp_path / "events.jsonl") == []


def changed(path: str, value: Any) -> dict[str, Any]:
    """The manifest with one changed value; `path` is keys and indices, joined with dots."""
    manifest: dict[str, Any] = json.loads(json.dumps(MANIFEST))
    *outer, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place: Any = manifest
    for key in outer:
        place = place[key]
    place[last] = value
    return manifest


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("plan.name", "q", "plan.name was 'p', and now is 'q'"),
        ("plan.cases.0.settings.warmup", 9, "plan.cases[0].settings.warmup was 5, and now is 9"),
        ("plan.cases.1.id", "c", "plan.cases[1].id was 'b', and now is 'c'"),
        ("plan.cases", [], "plan.cases had 2 entries, and now has 0"),
        ("topology.nodes", [0, 1], "topology.nodes[1] was 0, and now is 1"),
        ("topology.node_names.0", "n1", "topology.node_names[0] was 'n0', and now is 'n1'"),
        ("transport", "nccl", "transport was 'gloo', and now is 'nccl'"),
        ("world_size", 4, "world_size was 2, and now is 4"),
    ],
)
def test_resume_refuses_another_run_and_names_the_difference(path: str, value: Any, words: str, run: Path) -> None:
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(UsageError) as caught:
        RunWriter.resume(run, manifest(**changed(path, value)))
    assert str(caught.value) == f"cannot resume {run}: {words}"
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}


def test_resume_ignores_time_and_machine_state(run: Path) -> None:
    RunWriter.resume(run, manifest(**MANIFEST | {"started": "2027-01-01T00:00:00Z", "provenance": {"python": "3.13"}}))


def test_tuple_equals_list_and_whole_float_equals_integer() -> None:
    assert first_difference([1, 2], (1, 2), "x") is None
    assert first_difference({"a": 4}, {"a": 4.0}, "x") is None
    assert first_difference({"a": 4}, {}, "x") == "x.a was 4, and now is None"
    assert first_difference({}, {"b": 1}, "x") == "x.b was None, and now is 1"


def test_newer_manifest_is_refused(run: Path) -> None:
    (run / "manifest.json").write_text(json.dumps({**MANIFEST, "schema": 2}))
    with pytest.raises(UsageError, match=r"manifest\.json has schema 2; this ncclbench reads up to 1"):
        read_run(run)


def test_newer_record_is_refused_with_its_line(run: Path) -> None:
    results = run / "results.jsonl"
    first, second = results.read_text().splitlines()
    results.write_text(first + "\n" + second.replace('"schema":1', '"schema":7') + "\n")
    with pytest.raises(UsageError, match=r"results\.jsonl, line 2 has schema 7"):
        read_run(run)


@pytest.mark.parametrize("schema", ["true", "-1", "0", "1.0", "null"])
def test_schema_below_1_or_of_another_type_is_refused(schema: str, run: Path) -> None:
    results = run / "results.jsonl"
    line = results.read_text().splitlines()[0]
    results.write_text(line.replace('"schema":1', f'"schema":{schema}') + "\n")
    with pytest.raises(UsageError, match=r"results\.jsonl, line 1 has no schema number"):
        read_run(run)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("topology", "two nodes"), ("topology", ["n0"]), ("topology", {"node_names": "n0"})],
        *[("topology", {"node_names": [1]}), ("topology", {"nodes": {"0": 0}})],
        *[("plan", []), ("world_size", "2"), ("transport", 7), ("ranks", [1]), ("provenance", 3)],
    ],
)
def test_manifest_of_other_types_names_the_field(field: str, value: Any, run: Path) -> None:
    (run / "manifest.json").write_text(json.dumps({**MANIFEST, field: value}))
    with pytest.raises(UsageError, match=rf"manifest\.json is damaged: .* at `\$\.{field}") as refused:
        read_run(run)
    assert "\n" not in str(refused.value)


def test_disk_failure_at_creation_reports_that_nothing_was_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ncclbench.store.run_writer.write_whole", full)
    with pytest.raises(EnvironmentFault, match="No space left on device; nothing was stored; name another directory"):
        RunWriter.create(tmp_path / "new", manifest(**MANIFEST))


@pytest.mark.parametrize("content", ["{}", '{"schema": "1"}', "[]"])
def test_manifest_without_a_schema_is_refused(content: str, run: Path) -> None:
    (run / "manifest.json").write_text(content)
    with pytest.raises(UsageError, match=r"manifest\.json"):
        read_run(run)


@pytest.mark.parametrize("line", ["{", '{"schema":1}', '{"schema":1,"case":3}', "[1]", "\x00\x00"])
def test_damaged_record_names_its_line(line: str, run: Path) -> None:
    results = run / "results.jsonl"
    first, second = results.read_text().splitlines()
    results.write_text("\n".join([first, line, second]) + "\n")
    with pytest.raises(UsageError, match=r"results\.jsonl, line 2"):
        read_run(run)


def test_damaged_event_names_its_file_and_line(run: Path) -> None:
    path = run / "events.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b"{", *lines[1:]]) + b"\n")
    with pytest.raises(UsageError, match=r"events\.jsonl, line 2 is damaged"):
        read_run(run)


def test_event_of_another_type_is_damaged(run: Path) -> None:
    with (run / "events.jsonl").open("ab") as file:
        file.write(b"[1, 2]\n")
    with pytest.raises(UsageError, match=r"events\.jsonl"):
        assert read_run(run).interrupted_in is None


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe"])
def test_directory_without_a_run_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_run(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_non_empty_directory_is_refused(run: Path) -> None:
    with pytest.raises(UsageError, match="is not empty"):
        RunWriter.create(run, manifest(**MANIFEST))


def test_directory_is_created_with_its_parents(tmp_path: Path) -> None:
    RunWriter.create(tmp_path / "a" / "b" / "c", manifest(**MANIFEST))
    assert read_run(tmp_path / "a" / "b" / "c").records == ()


def test_empty_directory_is_accepted(tmp_path: Path) -> None:
    RunWriter.create(tmp_path, manifest(**MANIFEST))
    assert read_run(tmp_path).manifest == manifest(**MANIFEST)


def test_file_as_target_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(UsageError, match="is a file"):
        check_target(path, resume=False)
    with pytest.raises(UsageError, match="is a file"):
        check_target(path / "below", resume=False)


def test_resume_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no run directory"):
        check_target(tmp_path, resume=True)


def test_directory_without_permission_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel's answer to a user without permission; for root, chmod has no effect.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path or not mode & os.W_OK)
    with pytest.raises(UsageError, match="no permission to write in"):
        check_target(tmp_path / "run", resume=False)


def contents(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(run.rglob("*.jsonl"))}


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_full_disk_keeps_stored_cases(failing: int, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, second or third fsync fails: that of the samples, their folder, or the record's line."""
    before = contents(run)
    writer = RunWriter(run)
    calls = 0
    real = os.fsync

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(EnvironmentFault) as caught:
        writer.append(numbered(2), ["total", "bit_0"], SECONDS_RNK)
    assert "could not store all_reduce/float32/4096/isolated: " in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert contents(run) == before
    assert len(read_run(run).records) == 2
    # When the disk has space again, the same writer continues.
    writer.append(numbered(2), ["total", "bit_0"], SECONDS_RNK)
    assert [r.bytes for r in read_run(run).records] == [1024, 2048, 4096]


def test_full_disk_does_not_break_the_event_chain(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter(run)
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", lambda _handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(EnvironmentFault, match="event case"):
            writer.event("case", case="x")
    writer.event("end", exit_code=3)
    assert events.broken_link(run / "events.jsonl") is None
    assert read_run(run).events[-1].kind == "end"


# A real file-size limit: the kernel writes half of a line and refuses the rest, as on a full disk.
_UNTIL_FULL = """
import resource, sys
from pathlib import Path
from ncclbench.errors import EnvironmentFault
from ncclbench.store.manifest import Manifest
from ncclbench.store.run_writer import RunWriter
from ncclbench.store.records import Record

run = Path(sys.argv[1])
writer = RunWriter.create(run, Manifest())
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
for k in range(1000):
    try:
        writer.append(Record(case=f"case-{k}", pattern="p", transport="t", timing="isolated", dtype="uint8",
                             bytes=k, world_size=1, status="ok", started="now"))
    except EnvironmentFault as fault:
        print(k, fault)
        break
"""


@pytest.mark.parametrize("limit", [2000, 2345])
def test_half_written_line_is_removed(limit: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", _UNTIL_FULL, str(run), str(limit)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    stored, _, message = done.stdout.partition(" ")
    assert "could not store case-" in message
    assert int(stored) >= 2
    content = (run / "results.jsonl").read_bytes()
    assert content.endswith(b"\n")
    assert len(content) <= limit
    assert [r.case for r in read_run(run).records] == [f"case-{k}" for k in range(int(stored))]


_FOREVER = """
import sys
from pathlib import Path
import numpy as np
from ncclbench.store.manifest import Manifest
from ncclbench.store.run_writer import RunWriter
from ncclbench.store.records import Record

run, manifest = Path(sys.argv[1]), Manifest(transport="t", world_size=2)
writer = RunWriter.resume(run, manifest) if run.exists() else RunWriter.create(run, manifest)
print(writer.path, flush=True)
k = 0
while True:
    case = f"{sys.argv[2]}-{k}"
    writer.event("case", case=case)
    writer.append(
        Record(case=case, pattern="p", transport="t", timing="isolated", dtype="uint8", bytes=k, world_size=2,
               status="ok", started="now", notes=["x" * (k % 7) * 1000]),
        ["total", "phase"], np.full((2, 50, 2), k, dtype=np.float64))
    print(case, flush=True)
    k += 1
"""


def test_kill_at_any_time_loses_no_finished_case(tmp_path: Path) -> None:
    """After repeated SIGKILL and resume, every record that the writer reported as stored is complete."""
    run, reported = tmp_path / "run", []
    generator = random.Random(4)
    for attempt in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", _FOREVER, str(run), str(attempt)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline()  # the run directory is open
            for _ in range(generator.randrange(1, 4)):
                reported.append(process.stdout.readline().strip())
            until = time.monotonic() + generator.uniform(0.0, 0.02)  # a random time within the next few records
            while time.monotonic() < until:
                pass
            process.send_signal(signal.SIGKILL)
            reported += process.stdout.read().split("\n")[:-1]  # complete lines that it reported before the kill
        back = read_run(run)
        cases = [r.case for r in back.records]
        assert set(reported) <= set(cases)
        assert len(cases) <= len(reported) + attempt + 1  # at most one per process was stored and not yet reported
        assert events.broken_link(run / "events.jsonl") is None
        for stored in back.records:
            assert stored.samples is not None
            assert pq.read_table(run / stored.samples).column("seconds").to_pylist() == [stored.bytes] * 200
    assert len({case.split("-")[0] for case in reported}) == 6  # every process stored a record
