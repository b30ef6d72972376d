"""Shell completion through the interface that bash uses."""

import os
import subprocess
import sys

import pytest


def completions(line: str) -> set[str]:
    """The completions of the last word of `line` in bash."""
    words = line.split(" ")
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['ncclbench']; from ncclbench.__main__ import main; main()"],
        env={
            **os.environ,
            "_NCCLBENCH_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    return {answer.partition(",")[2] for answer in done.stdout.splitlines()}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ncclbench run all_re", {"all_reduce"}),
        ("ncclbench run --plan accept-q", {"accept-quick"}),
        ("ncclbench run --dtype bfl", {"bfloat16"}),
        ("ncclbench run --timing ", {"all", "isolated", "pipelined", "graph"}),
        ("ncclbench run --transport cupy", {"cupy_nccl"}),
        ("ncclbench report --format mark", {"markdown"}),
        ("ncclbench import --format os", {"osu"}),
        ("ncclbench accept --profile cpu-g", {"cpu-gloo"}),
    ],
)
def test_names_are_completed(line: str, expected: set[str]) -> None:
    assert completions(line) == expected
