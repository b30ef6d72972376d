"""Text made safe for CSV, XML and Prometheus; every writer of these formats uses it."""

import re

# A spreadsheet runs a cell that begins with one of these; OWASP lists them under "CSV injection".
_STARTS_A_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
# What XML 1.0 cannot hold, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def csv_cell(text: str) -> str:
    """`text` with an apostrophe in front if a spreadsheet would run it; carriage returns become line feeds.

    Only for text: a number must stay one. CSV readers take a lone carriage return for the end of the row.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{lines}" if text.startswith(_STARTS_A_FORMULA) else lines


def xml_text(value: object, substitute: str = "\ufffd") -> str:
    """`value` as text, with `substitute` for each character that XML 1.0 cannot hold."""
    return _NOT_XML.sub(substitute, str(value))


def prometheus_label(value: object) -> str:
    """`value` as the text of a label between its quotation marks."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
