"""Damaged run directories: each is refused with a one-line message, and never read in part."""

import contextlib
import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ncclbench.accept.bundle import write_bundle
from ncclbench.accept.check_context import CheckContext
from ncclbench.accept.example_runs import Example, ExampleCase, write_example
from ncclbench.accept.profile import load_profile
from ncclbench.accept.profile_from_run import make_profile
from ncclbench.accept.verify import verify
from ncclbench.cli.report import command as report
from ncclbench.errors import EnvironmentFault, UsageError
from ncclbench.store.records import GpuReading, GpuState, Json, LedgerRecord, OriginRecord, PhaseResult
from ncclbench.store.run_directory import read_run
from ncclbench.store.run_writer import RunWriter
from ncclbench.store.samples import seconds_of_ranks
from tests.helpers.stored import manifest, record

pytestmark = pytest.mark.usefixtures("unsynced")


def damaged_run(run: Path, name: str, place: tuple[Any, ...], value: Any) -> Path:
    """Replace one value of the first record or event, or of the manifest."""
    lines = (run / name).read_text().splitlines() if name.endswith("l") else [(run / name).read_text()]
    data = found = json.loads(lines[0])
    for key in place[:-1]:
        found = found[key]
    found[place[-1]] = value
    (run / name).write_text("\n".join([json.dumps(data), *lines[1:]]) + "\n")
    return run


LEDGER = LedgerRecord(sent_bytes={"node": 8}, bottleneck_bytes=8)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("bytes",), 10**30),
        (("world_size",), 2**63),
        (("world_size",), 0),
        (("ledger", "sent_bytes"), 1),
        (("ledger", "sent_bytes", "node"), "NaN"),
        (("ledger", "bottleneck_bytes"), 0.5),
        (("phases", 0, "ledger", "sent_bytes", "node"), [None]),
        (("phases", 0, "ledger", "sent_bytes"), 1),
        (("facts", 0, "bases"), [None]),
        (("path",), {"links": 1}),
        (("gpus", 0, "before", "errors"), ["ECC"]),
        (("gpus", 0, "before", "throttled"), 7),
        (("gpus", 0, "after", "clock_seconds"), "now"),
        (("gpus", 0, "warnings"), "hardware slowdown"),
    ],
)
def test_record_of_another_shape_is_a_damaged_line(place: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", manifest())
    phases = [PhaseResult(label="a", ledger=LEDGER)]
    facts: list[dict[str, Json]] = [{"bases": {"selection": {"remote_bytes": 1}}, "mine": [1]}]
    gpus = [GpuReading(rank=0, before=GpuState(), after=GpuState())]
    writer.append(msgspec.structs.replace(record(), ledger=LEDGER, phases=phases, facts=facts, gpus=gpus))
    assert read_run(tmp_path / "run").records[0].ledger == LEDGER
    with pytest.raises(UsageError, match=r"results\.jsonl, line 1 is damaged: "):
        read_run(damaged_run(tmp_path / "run", "results.jsonl", place, value))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((("plan", "starts"), value) for value in (10**12, -5, 0, "x", True)),
        (("topology",), {"domains": [0, 2**63]}),
        (("software",), [{"versions": 10**18}]),
    ],
)
def test_manifest_of_another_shape_is_damaged(place: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    RunWriter.create(tmp_path / "run", manifest(plan={"name": "p", "starts": 2}))
    assert read_run(tmp_path / "run").declared_starts == 2
    with pytest.raises(UsageError, match=r"manifest\.json is damaged: "):
        read_run(damaged_run(tmp_path / "run", "manifest.json", place, value))


IMPORTED: dict[str, Any] = {
    "file": "l",
    "tool": "nccl-tests",
    "tables": [{"devices": [{"rank": 0}], "config": {"x": 1}}],
}
ORIGIN = OriginRecord(tool="nccl-tests", figure="table", source=0, table=0, row=0, placement="in_place")


@pytest.mark.parametrize(
    ("name", "place", "value", "said"),
    [
        ("manifest.json", ("imported", 0), 1, "$.imported[0]"),
        ("manifest.json", ("imported", 0, "tool"), None, "$.imported[0].tool"),
        ("manifest.json", ("imported", 0, "tables", 0, "devices", 0), {}, "$.imported[0].tables[0].devices[0]"),
        ("manifest.json", ("imported", 0, "tables", 0, "config", "x"), [], "$.imported[0].tables[0].config"),
        ("results.jsonl", ("imported",), None, "$.imported"),
        ("results.jsonl", ("imported", "source"), 1, "$.imported.source"),
        ("results.jsonl", ("imported", "table"), -1, "$.imported.table"),
        ("results.jsonl", ("imported", "table"), 1, "$.imported.table"),
        ("results.jsonl", ("imported", "row"), None, "`row` - at `$.imported`"),
        ("results.jsonl", ("imported", "per_iteration"), {"min_us": {}}, "$.imported.per_iteration"),
    ],
)
def test_imported_run_of_another_shape_is_damaged(
    name: str, place: tuple[Any, ...], value: Any, said: str, tmp_path: Path
) -> None:
    writer = RunWriter.create(tmp_path / "run", manifest(imported=[IMPORTED]))
    writer.append(msgspec.structs.replace(record(), imported=ORIGIN))
    for fmt in ("table", "nccl-tests"):
        report.callback((tmp_path / "run",), fmt, None)  # type: ignore[misc]
    where = f"{name}, line 1" if name == "results.jsonl" else name
    with pytest.raises(UsageError, match=f"{re.escape(where)} is damaged: .*{re.escape(said)}") as caught:
        report.callback((damaged_run(tmp_path / "run", name, place, value),), "nccl-tests", None)  # type: ignore[misc]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [{"start": "x"}, {"ranks": 3}, {"software": [1]}])
def test_event_of_another_shape_is_a_damaged_line(value: dict[str, Any], tmp_path: Path) -> None:
    RunWriter.create(tmp_path / "run", manifest()).event("lost", **value)
    with pytest.raises(UsageError, match=r"events\.jsonl, line 1 is damaged: "):
        read_run(tmp_path / "run")


@pytest.mark.parametrize("name", ["results.jsonl", "events.jsonl", "manifest.json", "verdict.json"])
def test_special_file_is_not_read(name: str, tmp_path: Path) -> None:
    """Reading a pipe would never end, and a device would fill the memory."""
    RunWriter.create(tmp_path / "run", manifest())
    (tmp_path / "run" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "run" / name)
    with pytest.raises(UsageError, match=f"{name} is no regular file"):
        report.callback((tmp_path / "run",), "table", None)  # type: ignore[misc]
    with pytest.raises(UsageError) if name == "manifest.json" else contextlib.nullcontext():
        assert any(finding.wrong for finding in verify(tmp_path / "run"))


@pytest.mark.parametrize("name", ["results.jsonl", "events.jsonl", "manifest.json", "verdict.json", "SHA256SUMS"])
def test_unreadable_file_is_an_environment_fault(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_example(
        tmp_path / "run", Example(cases=(ExampleCase(pattern="all_reduce", nbytes=8, bus_gb_per_s=1.0),))
    )
    write_bundle(CheckContext(read_run(run), load_profile("h100-hgx-ib"), None, False))

    whole = Path.open

    def opened(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return whole(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(EnvironmentFault, match=f"^cannot read .*{name}: Permission denied$"):
        verify(run)
    if name != "SHA256SUMS":
        with pytest.raises(EnvironmentFault, match=f"^cannot read .*{name}: Permission denied$"):
            report.callback((run,), "table", None)  # type: ignore[misc]


def test_no_profile_from_a_time_of_zero(tmp_path: Path) -> None:
    run = write_example(tmp_path / "run", Example(cases=(ExampleCase(pattern="all_reduce", nbytes=8, bus_gb_per_s=1),)))
    make_profile(read_run(run), "ours")
    with pytest.raises(UsageError, match="is no golden run"):
        make_profile(read_run(damaged_run(run, "results.jsonl", ("time_us", "p50_hi"), 0)), "ours")


def test_unreadable_samples_remove_only_their_own_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_example(
        tmp_path / "run", Example(cases=(ExampleCase(pattern="all_reduce", nbytes=8, bus_gb_per_s=1),))
    )
    run = read_run(path)
    samples = path / str(run.records[0].samples)
    samples.unlink()
    os.mkfifo(samples)
    with pytest.raises(UsageError, match=r"^samples of .*: .* is no regular file"):
        seconds_of_ranks(run, run.records[0])

    def exists(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", exists)
    with pytest.raises(UsageError, match=r"^samples of .*: cannot read .*: Permission denied$"):
        seconds_of_ranks(run, run.records[0])
