"""The logs of other tools that the importers' tests start from, and a reader of nccl-tests' rows that owes us nothing."""

from pathlib import Path

FIXTURES = Path(__file__).parents[1] / "fixtures"
NCCL_TESTS = sorted((FIXTURES / "nccl-tests").iterdir())
ALL = sorted(path for folder in ("nccl-tests", "osu", "imb") for path in (FIXTURES / folder).iterdir())


def rows_of(text: str) -> list[list[str]]:
    """The cells of each row, as awk would have them: every line that begins with a number."""
    return [line.split() for line in text.splitlines() if line.split() and line.split()[0].isdecimal()]


def comments_of(text: str) -> list[str]:
    """What stands around the rows: settings, devices, footers."""
    kept = ("# nThread", "# Collective", "#  Rank", "# Out of", "# Avg")
    return [line.rstrip() for line in text.splitlines() if line.startswith(kept)]
