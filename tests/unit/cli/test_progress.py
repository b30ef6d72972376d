"""Progress output: in place on a terminal, plain lines in a pipe, and no escape sequence from outside."""

import io
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from ncclbench.cli.progress import BarListener
from ncclbench.errors import Exit
from tests.helpers.cluster_runs import collective
from tests.helpers.stored import like

COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9](;|m)")
SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def listener(**options: object) -> tuple[BarListener, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, height=40, **options)  # type: ignore[arg-type]
    return BarListener(console), out


def shown_at_last(out: io.StringIO) -> str:
    """The text of the last drawing: everything after the last clearing of lines."""
    return SEQUENCE.sub("", out.getvalue().rpartition("\x1b[2K")[2])


def test_view_shows_progress_results_and_warnings() -> None:
    view, out = listener()
    view.started(Path("runs/x"), 12, 0, 6, "gloo")
    for k in range(10):
        record, _ = collective(1 << (10 + k), notes=["ungated: it must synchronise with the host"])
        view.began(k, record.case)
        view.finished(record)
    view.began(10, "all_to_all/float32/1/isolated/[red]x[/red]")
    text = shown_at_last(out)
    assert "10/12" in text
    assert "all_to_all/float32/1/isolated/[red]x[/red]" in text  # not interpreted as markup
    assert "all_reduce/float32/524288/isolated" in text
    assert "all_reduce/float32/1024/isolated" not in text  # only the last ones
    assert "! ungated: it must synchronise with the host (10 cases)" in text
    view.ended(None, [], Exit.GOOD, None)


def test_bad_results_stay_after_the_view(capsys: pytest.CaptureFixture[str]) -> None:
    view, out = listener()
    view.started(Path("runs/x"), 1, 0, 6, "gloo")
    record, _ = collective(1024)
    view.finished(like(record, status="wrong", wrong=3, reason="3 elements differ"))
    view.ended(None, [], Exit.WRONG_DATA, "wrong data")
    assert "WRONG: 3 elements differ" in SEQUENCE.sub("", out.getvalue())
    assert "wrong data" in capsys.readouterr().err


def test_nothing_is_drawn_during_a_case() -> None:
    view, out = listener()
    before = threading.enumerate()
    view.started(Path("runs/x"), 1, 0, 6, "gloo")
    view.began(0, "a case")
    assert threading.enumerate() == before  # no thread draws
    view.ended(None, [], Exit.GOOD, None)
    assert out.getvalue()


@pytest.mark.parametrize("no_color", [True, False])
def test_no_color_is_respected(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("COLORTERM", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    view, out = listener()
    view.started(Path("runs/x"), 1, 0, 6, "gloo")
    view.finished(collective(1024)[0])
    view.ended(None, [], Exit.GOOD, None)
    assert bool(COLOUR.search(out.getvalue())) is not no_color


RUN = ("run", "all_reduce", "-b", "8", "-e", "16", "--transport", "threads", "--nproc", "2", "-n", "3", "-o")


def test_terminal_output_is_redrawn_in_place(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ncclbench", *RUN, str(tmp_path / "run")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 65536):
            seen += chunk
    except OSError:  # the other end is closed, because the program has ended
        pass
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    text = seen.decode()
    assert "\x1b[2K" in text  # lines are cleared and redrawn
    assert "2/2" in SEQUENCE.sub("", text)
    assert "[1/2]" not in text
    assert "\x1b" not in out  # stdout has plain results


def test_piped_output_is_plain_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ncclbench", *RUN, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "\x1b" not in done.stdout + done.stderr
    assert [line[:5] for line in done.stderr.splitlines()[1:]] == ["[1/2]", "[2/2]"]
