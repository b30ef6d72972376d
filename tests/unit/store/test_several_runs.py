"""Reading several run directories: the message names each unreadable one."""

import json
from pathlib import Path

import pytest

from ncclbench.errors import UsageError
from ncclbench.store.run_directory import read_runs
from tests.helpers.cluster_runs import (
    cluster_manifest,
    rich_run,
    small_run,
)
from tests.helpers.stored import plain


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    return rich_run(tmp_path / "rich")


def test_unreadable_directories_are_named_in_one_line(tmp_path: Path, rich: Path) -> None:
    (tmp_path / "foreign").mkdir()
    newer, damaged = small_run(tmp_path / "newer"), small_run(tmp_path / "damaged")
    (newer / "manifest.json").write_text(json.dumps(plain(cluster_manifest()) | {"schema": 99}))
    with (damaged / "results.jsonl").open("a") as file:
        file.write('{"schema": 1, "case": \n')
    with pytest.raises(UsageError) as refused:
        read_runs([rich, tmp_path / "foreign", newer, damaged, tmp_path / "absent"])
    message = str(refused.value)
    assert message.startswith("4 of 5 runs cannot be read: ")
    assert "\n" not in message
    for words in ("foreign is no run directory", "schema 99", "results.jsonl, line 8 is damaged", "absent is no run"):
        assert words in message


def test_directory_of_runs_names_its_runs(tmp_path: Path) -> None:
    small_run(tmp_path / "runs" / "a")
    with pytest.raises(UsageError, match=r"it has runs in it: .*runs/a\)"):
        read_runs([tmp_path / "runs"])
