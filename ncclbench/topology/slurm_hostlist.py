"""Slurm's short form of a list of nodes."""

import re

_MOST = 1_000_000


def expand_nodes(text: str) -> list[str]:
    """Slurm's short form of a list of nodes, in full: ``n[01-03,7],login`` is n01, n02, n03, n7 and login.

    Raises:
        ValueError: if it is empty or its brackets do not close.
    """
    # A comma outside brackets parts two names.
    names = [name for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text) for name in _expand(part)]
    if not names or text.count("[") != text.count("]"):
        raise ValueError(f"not a list of nodes: {text!r}")
    return names


def _expand(name: str) -> list[str]:
    """One name; each of its brackets stands for several."""
    head, bracket, rest = name.partition("[")
    if not bracket:
        return [name]
    inside, _, tail = rest.partition("]")
    numbers: list[str] = []
    for item in inside.split(","):
        low, _, high = item.partition("-")
        span = range(int(low), int(high or low) + 1)
        if len(span) > _MOST:
            raise ValueError(f"{len(span)} names in one pair of brackets")
        numbers += [f"{k:0{len(low)}d}" for k in span]
    return [head + number + end for number in numbers for end in _expand(tail)]
