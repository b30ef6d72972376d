"""Folders of the repository that tests read."""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
DOCS = ROOT / "docs"
SCRIPTS = ROOT / "scripts"
FIXTURES = TESTS / "fixtures"  # logs of other programs
GOLDEN = TESTS / "golden"  # run directories of an earlier version

# Where Python finds the packages of this checkout, for processes that tests start.
PYTHONPATH = os.pathsep.join(str(ROOT / part) for part in ("", "patterns", "reports"))
