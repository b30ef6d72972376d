"""Numbers as text, and text from outside made visible, the same in every format that a person reads."""

import re

# Controls, and marks that turn the direction of text or have no width: a name could hide behind them.
_INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u115f\u1160\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
)


def visible(text: object, limit: int = 0) -> str:
    """`text` with controls and marks of direction written out as ``\\u202e``; cut to `limit` characters if given."""
    shown = _INVISIBLE.sub(lambda found: f"\\u{ord(found.group()):04x}", str(text))
    shown = shown.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is no text
    return shown if not limit or len(shown) <= limit else f"{shown[: limit - 1]}…"


def whole(value: float | None) -> str:
    """A whole number, or a dash."""
    return "-" if value is None else f"{int(value)}"


def microseconds(value: float | None) -> str:
    """Microseconds with four significant digits, and never an exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def interval(low: float | None, high: float | None) -> str:
    """An interval in microseconds, or a dash."""
    return "-" if low is None else f"{microseconds(low)}..{microseconds(high)}"


def rate(value: float | None) -> str:
    """GB/s with three decimals, and more where they would all be zeros."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.01 or value == 0 else f"{value:.6f}"


def wrong_elements(value: int | None) -> str:
    """The number of wrong elements; N/A where nothing was checked."""
    return "N/A" if value is None else str(value)
