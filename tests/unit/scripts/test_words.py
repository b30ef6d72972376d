"""The check of banned words: what it finds, and what it must leave alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import SCRIPTS

SCRIPT = SCRIPTS / "words.py"


def found(name: str, text: str, tmp_path: Path) -> list[str]:
    """The lines that the script prints of a file in its own checkout, without their paths."""
    scripts = tmp_path / "scripts"
    scripts.mkdir(exist_ok=True)
    script = scripts / "words.py"
    script.write_text(SCRIPT.read_text())
    (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, script, tmp_path / name], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == bool(done.stdout), done.stderr
    return [line.removeprefix(f"{name}:").partition(";")[0] for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("A rank\nwho waits, and whoever comes.\n", ["2: 'who'", "2: 'whoever'"]),
        ("Nobody claims a seat.", ["1: 'Nobody'", "1: 'claims'", "1: 'seat'"]),
        ("The rank is\ntold so.", ["1: 'is told'"]),
        ("There is one row a case.", ["1: 'one row a case'"]),
        ("Room, roads; (book) door. knocked pulse", 6 * ["1"]),
    ],
)
def test_words_of_a_text_are_found_with_their_lines(text: str, lines: list[str], tmp_path: Path) -> None:
    shown = found("page.md", text, tmp_path)
    assert len(shown) == len(lines)
    assert all(line.startswith(start) for line, start in zip(shown, lines, strict=True))


@pytest.mark.parametrize(
    "text",
    [
        "headroom, facebook, notebook, whose, the, here, RESEAT_OR_REBOOT, impulse, outdoor",
        "see https://example.com/book/who?door=1",
        "He et al. 2016; a ResourceClaim and a PersistentVolumeClaim of Kubernetes",
        "one half of a row; one of a case",
    ],
)
def test_what_only_looks_like_one_is_left_alone(text: str, tmp_path: Path) -> None:
    assert found("page.md", text, tmp_path) == []


def test_of_python_comments_strings_and_defined_names_are_read(tmp_path: Path) -> None:
    text = """import book
class RankSeat:  # Who
    def take_room(self, door):
        self.pulse = book.road()
print(f"{book.seat} a claim")
"""
    assert found("module.py", text, tmp_path) == [
        "2: 'Who'",
        "2: 'Seat'",
        "3: 'room'",
        "3: 'door'",
        "4: 'pulse'",
        "5: 'claim'",
    ]


def test_the_name_of_a_file_counts(tmp_path: Path) -> None:
    assert found("_door.py", "", tmp_path) == ["1: 'door'"]
