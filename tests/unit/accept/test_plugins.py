"""The example check of docs/acceptance.md, found through an entry point like a third-party check."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ncclbench.accept.check_context import CheckContext
from ncclbench.accept.example_runs import Example, ExampleCase, write_example
from ncclbench.accept.judge import judge
from ncclbench.accept.profile import load_profile
from ncclbench.config import plugins as registry
from ncclbench.store.run_directory import read_run
from ncclbench.store.verdict import Verdict
from tests.helpers.paths import DOCS

pytestmark = pytest.mark.usefixtures("unsynced")

DOC = DOCS / "acceptance.md"


@pytest.fixture
def outsider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The installed example of the documentation."""
    text = DOC.read_text()
    (block,) = re.findall(r"## Add a check in one file\n\n((?:    .*\n|\n)+)", text)
    (tmp_path / "second_check.py").write_text(re.sub(r"^    ", "", block, flags=re.M))
    info = tmp_path / "outsider-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outsider\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ncclbench.checks]\nsecond = second_check\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.forget_distributions()
    yield
    registry.forget_distributions()
    sys.modules.pop("second_check", None)


@pytest.mark.usefixtures("outsider")
def test_documented_check_is_found_and_judges(tmp_path: Path) -> None:
    assert "second" in registry.names("checks")
    quick = Example(cases=(ExampleCase(pattern="all_reduce", nbytes=8 << 30, bus_gb_per_s=440.6, samples=8),), nodes=2)
    slow = replace(quick, cases=(replace(quick.cases[0], bus_gb_per_s=1.0),))
    for name, example, verdict in (("quick", quick, Verdict.PASS), ("slow", slow, Verdict.FAIL)):
        document = judge(CheckContext(read_run(write_example(tmp_path / name, example)), load_profile("h100-hgx-ib")))
        assert [r.verdict for r in document.checks if r.check == "second"] == [verdict]
