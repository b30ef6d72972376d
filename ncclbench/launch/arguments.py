"""Our own command line, made into that of a rank or of the next start: options added, options left out.

Behind ``--`` there are patterns only, whatever they look like; options end before it.
"""

from collections.abc import Sequence


def with_options(arguments: Sequence[str], more: Sequence[str]) -> list[str]:
    """`arguments` and `more` options, which come last, but before a ``--``."""
    options, patterns = _parted(arguments)
    return [*options, *more, *patterns]


def without_option(arguments: Sequence[str], flag: str) -> list[str]:
    """`arguments` without the option `flag` and its value, in both of its spellings."""
    options, patterns = _parted(arguments)
    kept: list[str] = []
    words = iter(options)
    for word in words:
        if word == flag:
            next(words, None)
        elif not word.startswith(f"{flag}="):
            kept.append(word)
    return [*kept, *patterns]


def _parted(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    return words[:end], words[end:]
