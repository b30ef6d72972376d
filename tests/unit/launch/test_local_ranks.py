"""Local ranks that are lost or do not end: the parent names those that no rank reports, and ends them."""

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
        ([3, 3, -9, 3], False, {}),  # rank 0 has reported it
        ([-9, 3, 3, 3], False, {}),  # rank 1 has reported it
        ([0, 0, -9, 0], False, {2: "SIGKILL"}),  # after the last case no watchdog runs
        ([-11], False, {0: "SIGSEGV"}),
        ([-9, -9, 3, 3], False, {0: "SIGKILL", 1: "SIGKILL"}),  # no rank is left to report it
        ([-9, None, 3, 3], False, {0: "SIGKILL", 1: "does not end"}),
        ([None, None, 3, None], False, {}),  # rank 2 could not start, has reported it, and the others wait for it
        ([None, None, 2, None], False, {}),
        ([0, 0, None, 0], True, {2: "does not end"}),
    ],
)
def test_unreported_lost_ranks_are_named(codes: list[int | None], overdue: bool, lost: dict[int, str]) -> None:
    assert local.unreported_losses(codes, overdue) == lost


def test_rank_that_does_not_end_is_named_and_killed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(local, "END_SECONDS", 0.3)
    monkeypatch.setattr(local, "KILL_SECONDS", 0.1)
    ignores_sigterm = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    ranks = [subprocess.Popen([sys.executable, "-c", code]) for code in ("pass", ignores_sigterm)]
    assert local.wait_for_ranks(ranks, [], tmp_path) is Exit.ENVIRONMENT
    assert ranks[1].poll() is not None
    assert "lost: rank 1 (does not end)" in capsys.readouterr().err
