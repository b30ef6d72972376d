"""Closed pipes and full disks under stdout and stderr change neither results nor exit codes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ncclbench.errors import Exit
from ncclbench.store.run_directory import read_run

Stream = int


@pytest.fixture
def closed() -> Iterator[Stream]:
    """The write end of a pipe without a reader."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.fixture
def full() -> Iterator[Stream]:
    """A file on a full disk."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


def ended(line: list[str], out: Stream, err: Stream, unbuffered: str = "") -> int:
    environ = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    line = [sys.executable, *line]
    return subprocess.run(line, stdout=out, stderr=err, check=False, timeout=120, env=environ).returncode


def says(code: str) -> list[str]:
    return [
        "-c",
        "import sys; from ncclbench.cli.output import tolerate_closed_pipes; tolerate_closed_pipes(); "
        f"{code}; sys.exit(7)",
    ]


@pytest.mark.parametrize(
    "code",
    [
        "print('x' * 300_000)",
        "print('x', flush=True); print('y' * 300_000, flush=True)",
        "sys.stdout.buffer.write(b'x' * 300_000); sys.stdout.flush()",
        "import click; click.echo('x' * 300_000); click.echo(b'y')",
    ],
)
def test_closed_pipe_changes_no_exit_code(code: str, closed: Stream) -> None:
    assert ended(says(code), closed, closed) == 7
    assert ended(says(code), closed, closed, unbuffered="1") == 7


def test_closed_stderr_changes_no_exit_code(closed: Stream) -> None:
    assert ended(says("print('x' * 300_000, file=sys.stderr); sys.stderr.flush()"), subprocess.DEVNULL, closed) == 7


def test_full_disk_is_an_error_only_on_stdout(full: Stream) -> None:
    assert ended(says("print('x', file=sys.stderr, flush=True)"), subprocess.DEVNULL, full) == 7
    assert ended(says("print('x', flush=True)"), full, subprocess.DEVNULL) not in (0, 7)


def test_open_pipe_receives_all_output() -> None:
    done = subprocess.run(
        [sys.executable, *says("print('caf\\u00e9'); print('z', file=sys.stderr)")],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (7, "café\n", "z\n")


@pytest.mark.parametrize("of", ["closed", "full"])
def test_run_finishes_without_readable_progress(of: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    stream: Stream = request.getfixturevalue(of)
    line = f"-m ncclbench run all_reduce -b 8 -e 64 -n 6 --nproc 2 --transport threads -o {tmp_path / 'run'}".split()
    assert ended(line, stream if of == "closed" else subprocess.DEVNULL, stream) == Exit.GOOD
    run = read_run(tmp_path / "run")
    assert [record.status for record in run.records] == ["ok"] * 4
    assert run.events[-1].exit_code == Exit.GOOD


def test_usage_error_on_full_stderr_keeps_its_code(full: Stream) -> None:
    assert ended(["-m", "ncclbench", "bogus"], subprocess.DEVNULL, full) == Exit.USAGE


def test_removed_directory_is_one_line(tmp_path: Path) -> None:
    code = f"import os, runpy, sys; os.chdir({str(tmp_path)!r}); os.rmdir({str(tmp_path)!r}); sys.argv = ['ncclbench', "
    code += "'report', 'run']; from ncclbench.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == Exit.ENVIRONMENT
    assert done.stderr == "ncclbench: error: the current directory no longer exists: cd to another one\n"
