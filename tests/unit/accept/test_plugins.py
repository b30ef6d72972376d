"""The example check of docs/acceptance.md, found through an entry point like a third-party check."""

from __future__ import annotations

import re
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
from tests.helpers.third_party import install

pytestmark = pytest.mark.usefixtures("unsynced")

DOC = DOCS / "acceptance.md"


@pytest.fixture
def outsider(site: Path) -> None:
    """The example of the documentation, installed."""
    (block,) = re.findall(r"## Add a check in one file\n\n((?:    .*\n|\n)+)", DOC.read_text())
    entry_points = "[ncclbench.checks]\nsecond = second_check\n"
    install(site, entry_points, second_check=re.sub(r"^    ", "", block, flags=re.M))


@pytest.mark.usefixtures("outsider")
def test_documented_check_is_found_and_judges(tmp_path: Path) -> None:
    assert "second" in registry.names("checks")
    quick = Example(cases=(ExampleCase(pattern="all_reduce", nbytes=8 << 30, bus_gb_per_s=440.6, samples=8),), nodes=2)
    slow = replace(quick, cases=(replace(quick.cases[0], bus_gb_per_s=1.0),))
    for name, example, verdict in (("quick", quick, Verdict.PASS), ("slow", slow, Verdict.FAIL)):
        document = judge(CheckContext(read_run(write_example(tmp_path / name, example)), load_profile("h100-hgx-ib")))
        assert [r.verdict for r in document.checks if r.check == "second"] == [verdict]
