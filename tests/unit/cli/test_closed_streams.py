"""Whoever reads what a command says may go away: what it does, and the code it ends in, stay what they are."""

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
def deaf() -> Iterator[Stream]:
    """The writing end of a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.fixture
def full() -> Iterator[Stream]:
    """A file on a disk without room."""
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
def test_a_reader_who_is_gone_changes_no_exit_code(code: str, deaf: Stream) -> None:
    assert ended(says(code), deaf, deaf) == 7
    assert ended(says(code), deaf, deaf, unbuffered="1") == 7


def test_nor_does_one_of_stderr(deaf: Stream) -> None:
    assert ended(says("print('x' * 300_000, file=sys.stderr); sys.stderr.flush()"), subprocess.DEVNULL, deaf) == 7


def test_a_full_disk_is_an_error_under_stdout_alone(full: Stream) -> None:
    assert ended(says("print('x', file=sys.stderr, flush=True)"), subprocess.DEVNULL, full) == 7
    assert ended(says("print('x', flush=True)"), full, subprocess.DEVNULL) not in (0, 7)


def test_what_is_said_arrives_where_somebody_listens() -> None:
    done = subprocess.run(
        [sys.executable, *says("print('caf\\u00e9'); print('z', file=sys.stderr)")],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (7, "café\n", "z\n")


@pytest.mark.parametrize("of", ["deaf", "full"])
def test_a_run_is_measured_to_its_end_though_nobody_sees_its_progress(
    of: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    stream: Stream = request.getfixturevalue(of)
    line = f"-m ncclbench run all_reduce -b 8 -e 64 -n 6 --nproc 2 --transport threads -o {tmp_path / 'run'}".split()
    assert ended(line, stream if of == "deaf" else subprocess.DEVNULL, stream) == Exit.GOOD
    run = read_run(tmp_path / "run")
    assert [record.status for record in run.records] == ["ok"] * 4
    assert run.events[-1].exit_code == Exit.GOOD


def test_a_usage_error_that_cannot_be_said_is_one(full: Stream) -> None:
    assert ended(["-m", "ncclbench", "bogus"], subprocess.DEVNULL, full) == Exit.USAGE


def test_a_directory_that_was_removed_is_said_in_a_line(tmp_path: Path) -> None:
    code = f"import os, runpy, sys; os.chdir({str(tmp_path)!r}); os.rmdir({str(tmp_path)!r}); sys.argv = ['ncclbench', "
    code += "'report', 'run']; from ncclbench.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == Exit.ENVIRONMENT
    assert done.stderr == "ncclbench: error: the current directory no longer exists: cd to another one\n"
