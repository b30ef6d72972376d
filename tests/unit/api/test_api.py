"""The public API in a program and a notebook, without the command line."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

import ncclbench
from ncclbench import AcceptRequest, RunRequest, api
from ncclbench.config.request_json import checked, request_from_json, request_json
from ncclbench.errors import Exit, NcclbenchError, UsageError
from ncclbench.launch.request import rank_arguments
from ncclbench.launch.signals import wants_json

if TYPE_CHECKING:
    from ncclbench.api import LoadedRun

SMALL = RunRequest(
    patterns=("all_reduce",), min_bytes=8, max_bytes=64, transport="threads", nproc=2, iterations=6, progress=False
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    out = tmp_path_factory.mktemp("api") / "run"
    return api.run(msgspec.structs.replace(SMALL, out=out)).load()


def test_run_has_a_frame_and_a_notebook_table(measured: LoadedRun) -> None:
    frame = ncclbench.load_run(str(measured.path)).frame()
    assert list(frame["case"]) == [record.case for record in measured.records]
    assert len(frame) == 4
    page = measured._repr_html_()
    assert page.count("<tr>") == 1 + 4
    assert "all_reduce/float32/64/isolated" in page
    assert "proves logic, not a fabric" in page
    assert "all_reduce, isolated" in str(measured.report())


def test_notebook_table_escapes_text(measured: LoadedRun) -> None:
    bad = msgspec.structs.replace(measured.records[0], case="<script>")
    shown = api.LoadedRun(type(measured.run)(measured.path, measured.run.manifest, (bad,), ()))
    assert "&lt;script&gt;" in shown._repr_html_()
    assert "<script>" not in shown._repr_html_()


def test_run_prints_nothing_and_stores_results(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = api.run(msgspec.structs.replace(SMALL, out=tmp_path / "run"))
    assert done.exit_code is Exit.GOOD
    assert capfd.readouterr() == ("", "")
    command = done.load().run.manifest.provenance.command
    assert command[1:3] == ["run", "--request"], "the command that repeats it"
    again = request_from_json(command[3], RunRequest)
    assert (again.patterns, again.iterations) == (("all_reduce",), 6)


def test_run_works_in_a_thread(tmp_path: Path) -> None:
    """Only the main thread may set signal handlers; other threads do not touch them."""
    found: list[Exit] = []
    request = msgspec.structs.replace(SMALL, out=tmp_path / "run")
    thread = threading.Thread(target=lambda: found.append(api.run(request).exit_code))
    thread.start()
    thread.join(60)
    assert found == [Exit.GOOD]


def test_all_errors_are_ncclbench_errors(tmp_path: Path, measured: LoadedRun) -> None:
    for call, words in (
        (lambda: api.load_run(tmp_path), "is no run directory"),
        (lambda: api.load_runs([measured.path, measured.path]), "is named twice"),
        (lambda: api.run(RunRequest()), "name a pattern"),
        (lambda: api.run(RunRequest(patterns=("all_redcue",))), "did you mean 'all_reduce'"),
        (lambda: api.run(RunRequest(patterns=("all_reduce",), nproc="two")), "Expected `int | null`, got `str`"),  # type: ignore[arg-type]
        (lambda: api.run(RunRequest(plan=3j)), "RunRequest"),  # type: ignore[arg-type]
        (lambda: api.compare(measured.path, measured.path), "BASE and NEW are both"),
        (lambda: api.accept(AcceptRequest(profile="cpu-gloo", force=True)), "goes with --baseline"),
    ):
        with pytest.raises(NcclbenchError, match=re.escape(words)):
            call()


def test_text_is_converted_to_a_path() -> None:
    assert checked(RunRequest(out="runs/x")).out == Path("runs/x")  # type: ignore[arg-type]


def test_request_is_one_ascii_argument() -> None:
    request = RunRequest(
        patterns=("all_reduce",),
        out=Path("r/\udcff ü"),
        params={"redop": ["max", "min"]},
        factor=2.0,
        command=("run", "ü"),
    )
    text = request_json(request)
    assert text.isascii()
    assert request_from_json(text, RunRequest) == request
    assert "precision" not in text, "defaults are omitted"
    for wrong in ("{", "[]", '{"patternz":["x"]}', '{"nproc":"2"}', "[" * 100_000):
        with pytest.raises(UsageError, match="not a request of this version"):
            request_from_json(wrong, RunRequest)


def test_too_long_request_is_refused() -> None:
    with pytest.raises(UsageError, match="write the patterns and parameters into a plan file"):
        rank_arguments(RunRequest(patterns=("x" * 140_000,)))


@pytest.mark.parametrize("results", ["none", "table", "json"])
def test_rank_reads_json_option_from_the_request(results: str) -> None:
    request = RunRequest(patterns=("--json",), results=results, command=("run", "--json"))  # type: ignore[arg-type]
    assert wants_json(rank_arguments(request)) is (results == "json")
    assert wants_json(["run", "--json"])
    assert not wants_json(["run", "--request", "{"])


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, ncclbench, ncclbench.api; assert 'load_run' in dir(ncclbench); ncclbench.load_run\n"
        "print([name for name in ('torch', 'numpy', 'pandas', 'scipy', 'pyarrow', 'msgspec') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'load_rum'"):
        ncclbench.load_rum  # noqa: B018  # the look-up is what is tested
