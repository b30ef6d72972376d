"""`ncclbench import`: the run directory, refusals, and no partial output."""

import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from ncclbench.cli.import_ import command
from ncclbench.config.plugins import load, names
from ncclbench.errors import EnvironmentFault, NcclbenchError, UsageError
from ncclbench.importers.common import import_logs as _store
from ncclbench.importers.common.imported_cases import Stated
from ncclbench.importers.common.log_file import LONGEST_LINE, Log
from ncclbench.store import events, run_writer
from ncclbench.store.run_directory import read_run
from ncclbench.store.run_writer import RunWriter
from tests.helpers.exhaustive import exhaustive_if
from tests.helpers.paths import FIXTURES
from tests.helpers.stored import known, plain

ALL = sorted(path for folder in ("nccl-tests", "osu", "imb") for path in (FIXTURES / folder).iterdir())
TEXT = FIXTURES / "nccl-tests" / "all_reduce.txt"


def run_import(*args: object) -> str:
    done = CliRunner().invoke(command, [str(arg) for arg in args], catch_exceptions=False, standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.output


def refused(*args: object) -> str:
    with pytest.raises(NcclbenchError) as caught:
        run_import(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


OF_EACH_TOOL = [next(path for path in reversed(ALL) if path.parent == folder) for folder in {p.parent for p in ALL}]


@pytest.mark.parametrize("path", exhaustive_if(lambda path: path not in OF_EACH_TOOL, ALL), ids=lambda path: path.name)
def test_every_report_reads_every_imported_fixture(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert f"cases into {out}" in run_import(path, "-o", out)
    run = read_run(out)
    assert run.interrupted_in is None
    assert events.broken_link(out / "events.jsonl") is None
    assert len({one.case for one in run.records}) == len(run.records)
    for name in names("reports"):
        if name != "html" or path in OF_EACH_TOOL:  # the HTML report takes as long as all others together
            assert load("reports", name).render([run])
    for one in run.records:
        assert one.imported is not None
        assert (one.imported.file, one.started) == (path.name, None)
        assert run.manifest.imported[one.imported.source].tool == one.imported.tool


def test_imported_manifest_names_the_log_not_this_machine(tmp_path: Path) -> None:
    run_import(TEXT, "-o", tmp_path / "run")
    manifest = read_run(tmp_path / "run").manifest
    (source,) = manifest.imported
    assert source.sha256 == hashlib.sha256(TEXT.read_bytes()).hexdigest()
    assert (source.file, source.tool, source.version, source.cases) == (
        TEXT.name,
        "nccl-tests",
        "2.19.6",
        30,
    )
    assert (manifest.transport, manifest.device, manifest.world_size) == ("nccl", "cuda", 2)
    assert known(manifest.topology).node_names == ["node0"]
    assert manifest.ranks[1].gpu == "0000:00:07"
    assert not {"cpu", "platform", "python", "cores", "launcher"} & set(plain(manifest.provenance))


def test_table_shows_the_imported_files(tmp_path: Path) -> None:
    run_import(TEXT, FIXTURES / "osu" / "osu_bw.txt", "-o", tmp_path / "run")
    table = load("reports", "table").render([read_run(tmp_path / "run")])
    assert "# imported from all_reduce.txt (nccl-tests 2.19.6)\n# imported from osu_bw.txt" in table
    assert "median" not in table  # imported figures are means
    assert "2 ranks on ? nodes over several transports" in table
    assert "24.013" in table  # a rate without a time is shown too


def test_repeated_cases_are_all_kept(tmp_path: Path) -> None:
    run_import(TEXT, TEXT, "-o", tmp_path / "run")
    cases = [one.case for one in read_run(tmp_path / "run").records]
    assert len(set(cases)) == 60
    assert "all_reduce/float32/8/pipelined/occurrence=2" in cases


def test_log_of_several_tools_is_read() -> None:
    """In any order: a table ends where another tool begins, and old versions do not name themselves."""
    parts = [
        TEXT,
        FIXTURES / "osu" / "osu_allreduce.txt",
        FIXTURES / "imb" / "imb_2018.txt",
        FIXTURES / "osu" / "osu_bw.txt",
    ]
    alone = sum(len(reading.cases) for part in parts for _, reading in _store.read_log(Log.open(part), Stated()))
    for order in (parts, parts[::-1], [*parts[1:], parts[0]]):
        text = "\n".join(part.read_text() for part in order)
        for version in (
            "",
            "# nccl-tests version 2.19.6 nccl-headers=22809 nccl-library=22809\n",
        ):  # older versions do not print it
            log = Log.of("x", text.replace(version, "").encode())
            assert sum(len(reading.cases) for _, reading in _store.read_log(log, Stated())) == alone


def test_json_summary_is_the_last_line(tmp_path: Path) -> None:
    answer = json.loads(run_import(TEXT, "-o", tmp_path / "run", "--json").splitlines()[-1])
    assert (answer["run"], answer["exit_code"], len(answer["records"])) == (str(tmp_path / "run"), 0, 30)


def test_non_empty_directory_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("x")
    assert "is not empty; name another directory" in refused(TEXT, "-o", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]
    assert "is a file" in refused(TEXT, "-o", tmp_path / "run" / "mine")


def test_empty_or_new_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()  # of a run that was killed before it began
    run_import(TEXT, "-o", tmp_path / "run")
    run_import(TEXT, "-o", tmp_path / "a" / "b" / "run")
    assert len(read_run(tmp_path / "a" / "b" / "run").records) == 30
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("fails_at", ["append", "event", "create", "rename"])
def test_failed_import_leaves_nothing(fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def full(*_args: Any, **_kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        raise OSError(28, "No space left on device")

    if fails_at == "create":
        monkeypatch.setattr(run_writer, "write_whole", full)
    elif fails_at == "rename":
        monkeypatch.setattr(Path, "replace", full)
    else:
        monkeypatch.setattr(RunWriter, fails_at, full)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EnvironmentFault, match="No space left"):
        run_import(TEXT, "-o", tmp_path / "new" / "run")
    assert calls == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_unreadable_log_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text(TEXT.read_text().replace("11.68", "11.6x"))
    assert "bad.txt, line 12: out_of_place time is '11.6x'" in refused(
        TEXT, tmp_path / "bad.txt", "-o", tmp_path / "run"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "nothing of a format that can be imported; there are: imb, nccl-tests"),
        (b"hello\n", "nothing of a format"),
        (b"\x00\xff" * 100, "nothing of a format"),
        (b'{"version": 3', "nothing of a format"),
        (b'{"version": 3, "args": [', "line 1: no whole JSON"),
        (b"# OSU MPI Latency Test v7.5\n# Size   Latency (us)\n", "no result in it; it looks like osu"),
    ],
)
def test_file_that_is_not_a_log_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    assert words in refused(tmp_path / "x", "-o", tmp_path / "run")


def test_unreadable_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cannot read" in refused(tmp_path / "none", "-o", tmp_path / "run")
    assert "is no file" in refused(tmp_path, "-o", tmp_path / "run")
    with pytest.raises(UsageError, match="cannot read"):
        Log.open(Path("a\0b"))
    monkeypatch.setattr("ncclbench.importers.common.log_file.MOST_BYTES", 100)
    assert "larger than" in refused(TEXT, "-o", tmp_path / "run")


def test_flags_are_checked(tmp_path: Path) -> None:
    assert "did you mean 'osu'" in refused(TEXT, "-o", tmp_path / "run", "--format", "osx")
    assert "did you mean 'all_reduce'" in refused(TEXT, "-o", tmp_path / "run", "--pattern", "all_reduse")
    assert "no result of osu in it; it looks like nccl-tests" in refused(
        TEXT, "-o", tmp_path / "run", "--format", "osu"
    )
    with pytest.raises(click.BadParameter, match="not in the range"):
        run_import(TEXT, "-o", tmp_path / "run", "--world-size", 2**31)
    osu = FIXTURES / "osu" / "osu_latency.txt"
    assert "the log says ping_pong, not all_reduce: leave --pattern out" in refused(
        osu, "-o", tmp_path / "run", "--pattern", "all_reduce"
    )
    (tmp_path / "log.gz").write_bytes(gzip.compress(osu.read_bytes()))
    assert "log.gz is compressed (gzip); unpack it first" in refused(tmp_path / "log.gz", "-o", tmp_path / "run")


def test_other_encodings_are_read(tmp_path: Path) -> None:
    for encoding in ("utf-16", "utf-8-sig"):
        (tmp_path / encoding).write_bytes(TEXT.read_text().encode(encoding))
        run_import(tmp_path / encoding, "-o", tmp_path / f"{encoding}.run")
        assert len(read_run(tmp_path / f"{encoding}.run").records) == 30


def test_terminal_sequences_are_not_imported(tmp_path: Path) -> None:
    name = "x\x1b]0;owned\x07\u202e.txt"
    (tmp_path / name).write_text(TEXT.read_text().replace("node0", "no\x1b[31mde\x070"))
    run_import(tmp_path / name, "-o", tmp_path / "run")
    run = read_run(tmp_path / "run")
    for one in ("table", "nccl-tests"):
        assert load("reports", one).render([run]).replace("\n", "").isprintable()


def test_undecodable_file_name_is_kept(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.txt"
    Path(os.fsdecode(path)).write_bytes(TEXT.read_bytes())
    run_import(os.fsdecode(path), "-o", tmp_path / "run")
    assert read_run(tmp_path / "run").manifest.imported[0].file == "\ufffd.txt"


def test_importer_is_found_by_module_name() -> None:
    assert names("importers") == ["imb", "nccl-tests", "nccl-tests-json", "osu"]
    for name in names("importers"):
        module = load("importers", name)
        assert module.__doc__
        assert callable(module.recognises)
        assert callable(module.read)


# Run time is bounded for any file: lines of a megabyte from the beginnings of every regular expression, and many lines.
# The time limit of the test suite would end a hang.

LETTERS = [
    "#",
    " ",
    "1",
    "-",
    "[",
    "a",
    ":",
    ".",
    "# ",
    "1 ",
    "[1",
    "# Rank ",
    "1:",
    "a:1:1 ",
    "N/A ",
    " NCCL ",
    "\x1b[",
]


@pytest.mark.parametrize("letters", LETTERS)
@pytest.mark.parametrize("path", [TEXT, FIXTURES / "osu" / "osu_latency.txt", FIXTURES / "imb" / "imb_2018.txt"])
def test_megabyte_line_is_handled(letters: str, path: Path) -> None:
    long = letters * (1_000_000 // len(letters))
    for before in ("", "# ", "[1,0]<stdout>:", "8 2 float sum -1"):
        text = f"{before}{long}\n" + path.read_text() + before + long + "\n"
        log = Log.of("x", text.encode())
        assert max(len(line.text) for line in log.lines) <= LONGEST_LINE
        try:
            found = _store.read_log(log, Stated())
        except UsageError as error:
            said = str(error)
            assert len(said) < 400
        else:
            assert found[0][1].cases
