"""The bundle, its formats, redaction, and every kind of tampering."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

from ncclbench.accept import verdict_formats as formats
from ncclbench.accept.bundle import SUMS, sums, write_bundle
from ncclbench.accept.check_context import CheckContext
from ncclbench.accept.example_runs import Example, ExampleCase, with_warning, write_example
from ncclbench.accept.profile import load_profile
from ncclbench.accept.redact import Redactor, redact, redactor_for
from ncclbench.accept.verify import verify
from ncclbench.errors import UsageError
from ncclbench.store import events
from ncclbench.store.files import line_hash
from ncclbench.store.run_directory import read_run
from ncclbench.store.run_writer import RunWriter
from ncclbench.store.verdict import CheckResult, ProfileReference, RunVerdict, StartCounts, Verdict
from tests.helpers.stored import known, like

pytestmark = pytest.mark.usefixtures("unsynced")

G = 1 << 30
EXAMPLE = Example(
    cases=(
        ExampleCase(pattern="all_reduce", nbytes=8 * G, bus_gb_per_s=440.6, samples=12),
        ExampleCase(pattern="send_recv", nbytes=G, bus_gb_per_s=48, group="rail", samples=12, slow={3: 2.0}),
    ),
    nodes=2,
)


def accept(path: Path, baseline: Path | None = None, *, forced: bool = False) -> RunVerdict:
    base = read_run(baseline) if baseline else None
    return write_bundle(CheckContext(read_run(path), load_profile("h100-hgx-ib"), base, forced))


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    write_example(folder / "base", EXAMPLE)
    path = write_example(folder / "run", EXAMPLE)
    accept(path, folder / "base")
    return path


@pytest.fixture
def run(judged: Path, tmp_path: Path) -> Path:
    shutil.copytree(judged, tmp_path / "run")
    return tmp_path / "run"


def errors_by_part(path: Path) -> dict[str, str]:
    return {finding.part: "; ".join(finding.wrong) for finding in verify(path) if finding.wrong}


def test_bundle_is_complete_and_verifies(run: Path) -> None:
    assert errors_by_part(run) == {}
    stated = {line.partition("  ")[2] for line in (run / SUMS).read_text().splitlines()}
    there = {file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file()}
    assert stated == there - {SUMS, ".lock"}
    assert {"verdict.json", "accept/junit.xml", "accept/checks.csv", "accept/metrics.prom"} <= stated


def test_sums_have_the_format_of_sha256sum(run: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_second_verdict_without_baseline_verifies(run: Path) -> None:
    first = (run / "verdict.json").read_bytes()
    accept(run)
    assert errors_by_part(run) == {}
    assert (run / "verdict.json").read_bytes() != first, "without the baseline the verdict is another"
    assert not (run / "accept/baseline.json").exists()


def resum(run: Path) -> None:
    """Write new sums, as a careful forger does."""
    (run / SUMS).write_text(sums(run))


def edit_lines(file: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    file.write_bytes(b"".join(line + b"\n" for line in change(file.read_bytes().splitlines())))


def faster(lines: list[bytes]) -> list[bytes]:
    record = json.loads(lines[-1])
    record["groups"][3]["bus_gb_per_s"] *= 2
    return [*lines[:-1], json.dumps(record).encode()]


def edit_record(run: Path) -> None:
    edit_lines(run / "results.jsonl", faster)


def add_record(run: Path) -> None:
    edit_lines(run / "results.jsonl", lambda lines: [*lines, lines[-1].replace(b'"start":2', b'"start":0')])


def remove_record(run: Path) -> None:
    edit_lines(run / "results.jsonl", lambda lines: lines[:-1])


def replace_samples(run: Path) -> None:
    first, second, *_ = sorted((run / "samples").iterdir())
    shutil.copyfile(second, first)


def delete_samples(run: Path) -> None:
    sorted((run / "samples").iterdir())[0].unlink()


def remove_event(run: Path) -> None:
    edit_lines(run / "events.jsonl", lambda lines: lines[:3] + lines[4:])


def remove_first_event(run: Path) -> None:
    edit_lines(run / "events.jsonl", lambda lines: lines[1:])


def remove_last_event(run: Path) -> None:
    edit_lines(run / "events.jsonl", lambda lines: lines[:-1])


def add_event(run: Path) -> None:
    def change(lines: list[bytes]) -> list[bytes]:
        return [*lines, events.encode("note", line_hash(lines[-1]), {}).rstrip()]

    edit_lines(run / "events.jsonl", change)


def delete_start(run: Path) -> None:
    edit_lines(run / "results.jsonl", lambda lines: [x for x in lines if json.loads(x)["start"] != 2])
    edit_lines(run / "events.jsonl", lambda lines: [x for x in lines if json.loads(x).get("start") != 2])


def declare_fewer_starts(run: Path) -> None:
    delete_start(run)
    text = (run / "manifest.json").read_text().replace('"starts": 3', '"starts": 2')
    (run / "manifest.json").write_text(text)


def edit_verdict(run: Path) -> None:
    text = (run / "verdict.json").read_text()
    assert text.count('"verdict": "FAIL"') > 1
    (run / "verdict.json").write_text(text.replace('"verdict": "FAIL"', '"verdict": "PASS"'))


def drop_a_stamp(run: Path) -> None:
    text = (run / "verdict.json").read_text()
    (run / "verdict.json").write_text(text.replace('"synthetic"', ""))


def garble_verdict(run: Path) -> None:
    text = (run / "verdict.json").read_text()
    (run / "verdict.json").write_text(text.replace('"starts"', '"begins"'))


def delete_verdict(run: Path) -> None:
    (run / "verdict.json").unlink()


def soften_profile(run: Path) -> None:
    file = run / "accept/profile.toml"
    file.write_text(file.read_text().replace("fraction = 0.92", "fraction = 0.1"))


def edit_baseline(run: Path) -> None:
    file = run / "accept/baseline.json"
    data = json.loads(file.read_bytes())
    for record in data["records"]:
        for name in ("p50", "p50_lo", "p50_hi"):
            record["time_us"][name] /= 2
    file.write_text(json.dumps(data))


def edit_manifest(run: Path) -> None:
    text = (run / "manifest.json").read_text()
    (run / "manifest.json").write_text(text.replace("HBM3", "HBM4"))


def edit_junit(run: Path) -> None:
    (run / "accept/junit.xml").write_text("<testsuites/>")


# A change, the message of the sums, and the part that names the change after new sums.
TAMPERINGS: list[tuple[Callable[[Path], None], str, str]] = [
    (edit_record, "results.jsonl was changed", "records: not what the event log has the hash of"),
    (add_record, "results.jsonl was changed", "records: not what the event log has the hash of"),
    (remove_record, "results.jsonl was changed", "records: is gone or was changed"),
    (replace_samples, ".parquet was changed", "records: is not the file that was measured"),
    (delete_samples, ".parquet is gone", "records: is gone"),
    (remove_event, "events.jsonl was changed", "chain: line 4 does not follow"),
    (remove_first_event, "events.jsonl was changed", "chain: line 1 does not follow"),
    (remove_last_event, "events.jsonl was changed", "chain: ends with 'end' and not with the verdict"),
    (add_event, "events.jsonl was changed", "chain: ends with 'note'"),
    (delete_start, "results.jsonl was changed", "starts: says that 3 starts are there; there are 2"),
    (declare_fewer_starts, "manifest.json was changed", "starts: says 3 declared starts, the manifest 2"),
    (edit_verdict, "verdict.json was changed", "verdict: verdict is 'PASS', but follows as 'FAIL'"),
    (drop_a_stamp, "verdict.json was changed", "verdict: stamps is"),
    (garble_verdict, "verdict.json was changed", "schema: verdict.json does not follow its schema"),
    (delete_verdict, "verdict.json is gone", "schema: there is no verdict.json"),
    (soften_profile, "profile.toml was changed", "verdict: profile is"),
    (edit_baseline, "baseline.json was changed", "verdict: baseline of"),
    (edit_manifest, "manifest.json was changed", "verdict: "),
]


@pytest.mark.parametrize(("tamper", "by_sums", "by_part"), TAMPERINGS, ids=lambda x: getattr(x, "__name__", ""))
def test_tampering_is_named(tamper: Callable[[Path], None], by_sums: str, by_part: str, run: Path) -> None:
    tamper(run)
    assert by_sums in errors_by_part(run)["sums"]
    resum(run)
    found = errors_by_part(run)
    part, _, words = by_part.partition(": ")
    assert words in found[part], found


def test_sums_name_a_changed_format(run: Path) -> None:
    edit_junit(run)
    assert errors_by_part(run) == {"sums": "accept/junit.xml was changed"}


def test_chain_names_a_replaced_verdict_with_new_sums(run: Path) -> None:
    edit_verdict(run)
    resum(run)
    assert "not the one that the event log names" in errors_by_part(run)["chain"]


def test_missing_sums_are_reported(run: Path) -> None:
    (run / SUMS).unlink()
    assert "there is no SHA256SUMS" in errors_by_part(run)["sums"]


def test_sums_must_cover_all_required_files(run: Path) -> None:
    text = "".join(line for line in (run / SUMS).read_text().splitlines(keepends=True) if "results" not in line)
    (run / SUMS).write_text(text)
    assert "results.jsonl is not covered" in errors_by_part(run)["sums"]


def test_sums_cannot_name_files_outside_the_run(run: Path) -> None:
    with (run / SUMS).open("a") as file:
        file.write(f"{'0' * 64}  ../../etc/passwd\n")
    assert "lies outside" in errors_by_part(run)["sums"]


def test_file_added_later_is_noted_and_no_error(run: Path) -> None:
    (run / "report.html").write_text("<p>")
    (finding, *_) = verify(run)
    assert (finding.wrong, finding.note) == ((), "not covered: report.html")


def test_newer_verdict_or_run_is_refused_with_a_message(run: Path) -> None:
    text = (run / "verdict.json").read_text()
    (run / "verdict.json").write_text(text.replace('"schema": 1', '"schema": 2', 1))
    assert "verdict.json has schema 2" in errors_by_part(run)["schema"]
    (run / "verdict.json").write_text(text)
    text = (run / "manifest.json").read_text()
    (run / "manifest.json").write_text(text.replace('"schema": 1', '"schema": 9', 1))
    assert "has schema 9" in errors_by_part(run)["schema"] + errors_by_part(run)["verdict"]


def test_directory_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run directory"):
        verify(tmp_path)


def test_run_killed_between_record_and_event_verifies(tmp_path: Path) -> None:
    path = write_example(tmp_path / "run", replace(EXAMPLE, made=2))
    edit_lines(path / "events.jsonl", lambda lines: lines[:-2])
    accept(path)
    assert errors_by_part(path) == {}


# Redaction.


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with hosts, addresses and serials in all possible fields."""

    def edit(record: Any) -> Any:
        record = with_warning(record, 3, "NVLink 2 replay errors rose by 1")
        notes = ["n0001 was slow", "10.1.2.3:4791 to fe80::ec0d:9aff:fe8e:1", "N0001 is another"]
        path = like(record.path, warnings=["on n0000.cluster: port GUID 0x1070fd0300b1c2d4", "ec:0d:9a:8e:00:01"])
        return msgspec.structs.replace(record, notes=notes, path=path)

    path = write_example(tmp_path_factory.mktemp("named") / "run", replace(EXAMPLE, edit=edit))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["ranks"][0]["device"]["uuid"] = "GPU-0f3c1f5e-58a4-3d86-6ea7-0bdbdd4a8f5a"
    manifest["ranks"][0]["gpu"] = "00000000:18:00.0"
    manifest["provenance"]["variables"] = {"MASTER_ADDR": "n0000", "NCCL_SOCKET_IFNAME": "eth0"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


SECRETS = (
    "n0000", "n0001", "10.1.2.3", "fe80::ec0d", "0x1070fd0300b1c2d4", "ec:0d:9a:8e:00:01", "1320023000000", "0f3c1f5e",
)  # fmt: skip


def contents(path: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.suffix != ".parquet":
            yield file.name, file.read_text().lower()


def test_redacted_bundle_has_no_names_and_verifies(named: Path, tmp_path: Path) -> None:
    assert all(any(secret in text for _, text in contents(named)) for secret in SECRETS), "they are there to be found"
    target = tmp_path / "handed-on"
    redact(named, target, redactor_for([named], ""))
    before, after = accept(named), accept(target)
    for name, text in contents(target):
        assert not [secret for secret in SECRETS if secret in text], name
    assert errors_by_part(target) == {}
    assert (after.verdict, after.exit_code) == (before.verdict, before.exit_code)
    assert "redacted" in after.stamps
    assert "redacted" not in before.stamps
    manifest = read_run(target).manifest
    assert manifest.ranks[0].gpu == "00000000:18:00.0", "a slot is no machine"
    assert known(manifest.provenance.variables)["NCCL_SOCKET_IFNAME"] == "eth0"


def test_redaction_hashes_are_equal_in_every_file(named: Path, tmp_path: Path) -> None:
    redactor = redactor_for([named], "")
    for name in ("one", "two"):
        redact(named, tmp_path / name, redactor)
    assert (tmp_path / "one/results.jsonl").read_bytes() == (tmp_path / "two/results.jsonl").read_bytes()
    host = known(read_run(tmp_path / "one").manifest.topology).node_names[1]
    assert re.fullmatch(r"host-[0-9a-f]{12}", host)
    assert f"{host} was slow" in read_run(tmp_path / "one").records[0].notes
    keyed = redactor_for([named], "a secret")
    assert keyed.text("n0001") != redactor.text("n0001") == host


def test_redaction_overwrites_only_a_redacted_copy(named: Path, tmp_path: Path) -> None:
    redactor = redactor_for([named], "")
    redact(named, tmp_path / "copy", redactor)
    redact(named, tmp_path / "copy", redactor)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="is no redacted run"):
        redact(named, tmp_path / "mine", redactor)


@pytest.mark.parametrize(
    "text",
    [
        "2.28.9+cuda13",
        "12:30:05.123",
        "all_reduce/float32/8/isolated",
        "0000:18:00.0",
        "std::bad_alloc",
        "n10 is not n1x",
        "1.5",
    ],
)
def test_text_that_resembles_an_address_is_kept(text: str) -> None:
    assert Redactor(["n1"], [], b"").text(text) == text


# Formats.


def document(*results: CheckResult) -> RunVerdict:
    return RunVerdict(
        schema=1,
        verdict=Verdict.FAIL,
        reasons=["r"],
        profile=ProfileReference(name='p"\\\n', sha256=""),
        stamps=[],
        starts=StartCounts(declared=3, present=2),
        exit_code=1,
        judged_by="",
        baseline=None,
        checks=list(results),
    )


RESULTS = (
    CheckResult(check="floor", subject="=cmd()", verdict=Verdict.FAIL, reason='<slow> & "bad"\x00\x1b[31m'),
    CheckResult(check="floor", subject="b", verdict=Verdict.PASS, reason="fine, really"),
    CheckResult(check="floor", subject="c", verdict=Verdict.NOT_RUN, reason="not measured"),
    CheckResult(check="skew", subject='quo"te\\d\n', verdict=Verdict.INCONCLUSIVE, reason="noisy"),
)


def test_junit_is_valid_xml_for_any_reason() -> None:
    root = ElementTree.fromstring(formats.junit(document(*RESULTS)))
    _, floor, skew = root
    assert floor.attrib == {"name": "floor", "tests": "3", "failures": "1", "errors": "0", "skipped": "1"}
    assert [child.tag for case in floor for child in case] == ["failure", "skipped"]
    assert floor[0][0].attrib["message"] == 'FAIL: <slow> & "bad"\ufffd\ufffd[31m'
    assert skew[0][0].tag == "error"


def test_csv_has_no_formula() -> None:
    rows = list(csv.DictReader(io.StringIO(formats.checks_csv(document(*RESULTS)))))
    assert [row["subject"] for row in rows] == ["'=cmd()", "b", "c", 'quo"te\\d\n']
    assert rows[1]["reason"] == "fine, really"


def test_prometheus_text_is_escaped_and_has_counts() -> None:
    text = formats.prometheus(document(*RESULTS))
    pattern = re.compile(r'(?:# (?:HELP|TYPE) .*|[a-z_]+\{(?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)+\} \d+)')
    assert all(pattern.fullmatch(line) for line in text.splitlines()), text
    assert 'ncclbench_accept_checks{profile="p\\"\\\\\\n",check="floor",verdict="PASS"} 1' in text
    assert 'kind="present"} 2' in text


def test_profile_hash_is_that_of_the_file(run: Path) -> None:
    text = (run / "accept/profile.toml").read_bytes()
    assert json.loads((run / "verdict.json").read_text())["profile"]["sha256"] == hashlib.sha256(text).hexdigest()


def test_redaction_replaces_keys_and_prefers_the_longest_name() -> None:
    redactor = Redactor(["n1", "n1.cluster.example"], ["SN-1"], b"")
    whole = redactor.hash("host", "n1.cluster.example")
    assert redactor.text("n1.cluster.example") == whole
    counters = {"n1.cluster.example": {"SN-1": 3}, "n1": [1]}
    assert redactor.data(counters) == {
        whole: {redactor.hash("id", "sn-1"): 3},
        redactor.hash("host", "n1"): [1],
    }


def test_run_with_an_active_writer_is_not_judged(tmp_path: Path) -> None:
    """The line of a verdict between two lines of the writer would break the chain of events."""
    path = write_example(tmp_path / "run", EXAMPLE)
    writer = RunWriter.resume(path, read_run(path).manifest)
    with pytest.raises(UsageError, match=r"another ncclbench is writing in .*; judge it when it has ended"):
        accept(path)
    writer.event("warning", text="still here")
    stale = read_run(path)
    writer.event("end", exit_code=0)
    with pytest.raises(UsageError, match="written to while it was read"):
        write_bundle(CheckContext(stale, load_profile("h100-hgx-ib"), None, False))
    accept(path)  # the writer still exists, but has written its `end`
    assert errors_by_part(path) == {}
