"""From a page to a file: the templates, with plotly.js, our own script and style, and the data, all inlined.

The browser is told by a Content-Security-Policy to fetch nothing at all: a report shows what is in its file, or fails
visibly.
"""

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ncclbench import __version__
from ncclbench.errors import EnvironmentFault
from ncclbench_reports.html_page.figures import Figure
from ncclbench_reports.html_page.tables import DataTable

_TEMPLATES = Path(__file__).parents[1] / "templates"
# What the server side writes of a table; the browser has all of it, and draws as much at first.
ROWS_AT_FIRST = 100


def render_page(template: str, *, figures: Sequence[Figure], tables: Sequence[DataTable], **context: Any) -> str:
    """A document from one of the templates.

    Raises:
        EnvironmentFault: if plotly is not installed.
    """
    environment = _environment()
    specs = {figure.id: {"data": figure.data, "layout": figure.layout} for figure in figures}
    rows = {table.id: table.rows for table in tables if len(table.rows) > ROWS_AT_FIRST}
    return environment.get_template(template).render(
        **context,
        version=__version__,
        style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup((_TEMPLATES / "report.js").read_text(encoding="utf-8")),
        plotly=Markup(_plotly_js()) if figures else "",
        specs=island(specs),
        rows=island(rows),
        rows_at_first=ROWS_AT_FIRST,
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def island(data: Any) -> Markup:
    """`data` as JSON that can stand inside a script element, whatever text is in it."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _plotly_js() -> str:
    try:
        return (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError):
        raise EnvironmentFault("the html report needs plotly, which is not installed: pip install plotly") from None
