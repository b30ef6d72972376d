"""From a page to one file: the template with plotly.js, the script, the style and the data, all inlined.

A Content-Security-Policy forbids the browser to fetch anything: a report shows what is in its file, or fails visibly.
"""

import json
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ncclbench import __version__
from ncclbench.errors import EnvironmentFault
from ncclbench_reports.html_page.page_model import Page

_TEMPLATES = Path(__file__).parents[1] / "templates"
# Rows of a table that are written as HTML; a longer table has all rows as data, for the browser.
ROWS_AT_FIRST = 100


def render_page(page: Page) -> str:
    """The whole document.

    Raises:
        EnvironmentFault: if plotly is not installed.
    """
    figures = {figure.id: {"data": figure.data, "layout": figure.layout} for figure in page.figures}
    rows = {table.id: table.rows for table in page.tables if len(table.rows) > ROWS_AT_FIRST}
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            page=page,
            version=__version__,
            style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
            script=Markup((_TEMPLATES / "report.js").read_text(encoding="utf-8")),
            plotly=Markup(_plotly_js()) if figures else "",
            specs=inline_json(figures),
            rows=inline_json(rows),
            rows_at_first=ROWS_AT_FIRST,
        )
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


def inline_json(data: object) -> Markup:
    """`data` as JSON that can be inside a script element, whatever text is in it."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _plotly_js() -> str:
    try:
        return (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError):
        raise EnvironmentFault("the html report needs plotly, which is not installed: pip install plotly") from None
