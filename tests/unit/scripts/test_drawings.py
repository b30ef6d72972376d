"""The drawings and the page of the fabric catalogue are made from the patterns, and up to date."""

import importlib.util
import re
from types import ModuleType
from xml.etree import ElementTree

import pytest

from ncclbench.config.plugins import load
from ncclbench.plan.plan import read_plan
from tests.helpers.paths import DOCS, SCRIPTS


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_patterns", SCRIPTS / "draw_patterns.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DRAW = script()
DRAWN = list(DRAW.DRAWN)


@pytest.mark.parametrize("pattern", DRAWN)
def test_a_drawing_is_what_the_schedule_says_today(pattern: str) -> None:
    """If this fails, a pattern has changed: look at what scripts/draw_patterns.py makes of it, and commit that."""
    assert (DOCS / f"img/{pattern}.svg").read_text() == DRAW.drawing(pattern)


@pytest.mark.parametrize("pattern", DRAWN)
def test_drawing_is_complete_and_deterministic(pattern: str) -> None:
    text = DRAW.drawing(pattern)
    assert text == DRAW.drawing(pattern)
    root = ElementTree.fromstring(text)
    nodes, rails, *_ = DRAW.DRAWN[pattern]
    circles = [element for element in root.iter() if element.tag.endswith("circle")]
    assert len(circles) % (nodes * rails) == 0
    assert len(circles) > 0


def test_another_schedule_makes_another_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = DRAW.drawing("same_rail")
    monkeypatch.setattr(load("patterns", "same_rail"), "offsets", lambda _domains, _wanted, _seed: [2])
    assert DRAW.drawing("same_rail") != before


def test_page_shows_every_pattern_and_drawing() -> None:
    page = (DOCS / "patterns.md").read_text()
    assert re.findall(r"!\[(\w+)\]\(img/\1\.svg\)", page) == re.findall(r"^### (\w+)$", page, re.MULTILINE)
    assert set(re.findall(r"^### (\w+)$", page, re.MULTILINE)) == set(DRAWN)
    planned = {item.case.pattern for item in read_plan("cross-rail").cases}
    assert planned == set(DRAWN) - {"pairs"}  # its rounds grow with the machine
    for pattern in DRAWN:
        assert f"| `{pattern}` |" in page
        for name in load("patterns", pattern).Params.__struct_fields__:
            assert name in page or name in ("seed", "offsets", "rounds", "cuts", "target")


def test_the_plan_has_every_mode_of_cross_rail() -> None:
    cases = [item.case for item in read_plan("cross-rail").cases if item.case.pattern == "cross_rail"]
    assert {case.params.get("mode", "spine") for case in cases} == {"spine", "pxn", "crossnic0"}
