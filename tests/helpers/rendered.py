"""Runs rendered by the report formats, and what a browser would get of a page."""

import json
import re
from pathlib import Path
from typing import Any

from ncclbench.config.plugins import load
from ncclbench.store.run_directory import Run, read_run


def rendered(fmt: str, *runs: Run) -> Any:
    """The runs in a format; bytes of Parquet, text of all others."""
    return load("reports", fmt).render(list(runs))


def html(*runs: Path) -> str:
    """The page of the runs in these directories."""
    text = rendered("html", *(read_run(run) for run in runs))
    assert isinstance(text, str)
    return text


def without_plotly(page: str) -> str:
    """The page without plotly.js."""
    return re.sub(r"<script>/\*\*.*?</script>", "", page, flags=re.DOTALL)


def inline_data(page: str, key: str) -> Any:
    """The JSON that a page holds under an id."""
    match = re.search(rf'<script type="application/json" id="{key}">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    return json.loads(match[1])
