"""Ranks that were started here and are gone, or do not end: who says so, and that nobody is waited for without end."""

import subprocess
import sys
from pathlib import Path

import pytest

from ncclbench.errors import Exit
from ncclbench.launch import local_ranks as local


@pytest.mark.parametrize(
    ("codes", "overdue", "lost"),
    [
        ([0, 0], False, {}),
        ([3, 3, -9, 3], False, {}),  # rank 0 has said it
        ([-9, 3, 3, 3], False, {}),  # rank 1 has
        ([0, 0, -9, 0], False, {2: "SIGKILL"}),  # after the last case nobody watches
        ([-11], False, {0: "SIGSEGV"}),
        ([-9, -9, 3, 3], False, {0: "SIGKILL", 1: "SIGKILL"}),  # and nobody is left who would
        ([-9, None, 3, 3], False, {0: "SIGKILL", 1: "does not end"}),
        ([None, None, 3, None], False, {}),  # rank 2 could not start, has said so, and the others wait for it
        ([None, None, 2, None], False, {}),
        ([0, 0, None, 0], True, {2: "does not end"}),
    ],
)
def test_what_no_rank_has_said_is_said(codes: list[int | None], overdue: bool, lost: dict[int, str]) -> None:
    assert local._unreported(codes, overdue) == lost


def test_a_rank_that_does_not_end_after_the_others_is_named_and_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(local, "_END_SECONDS", 0.3)
    monkeypatch.setattr(local, "_KILL_SECONDS", 0.1)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    ranks = [subprocess.Popen([sys.executable, "-c", code]) for code in ("pass", deaf)]
    assert local._watch(ranks, [], tmp_path) is Exit.ENVIRONMENT
    assert ranks[1].poll() is not None
    assert "lost: rank 1 (does not end)" in capsys.readouterr().err
