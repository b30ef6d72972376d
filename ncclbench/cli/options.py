"""Shared by the options of several commands: ``-h``, and shell completion of names.

Completion imports what it needs only when a shell calls it.
"""

from collections.abc import Callable

import click

# The context settings of every command.
HELP = {"help_option_names": ["-h", "--help"]}

# click calls it with the context, the parameter and the incomplete word.
Completer = Callable[[click.Context, click.Parameter, str], list[str]]


def complete(kind: str) -> Completer:
    """Completion of the names of `kind`: a kind of `ncclbench list`, ``dtypes`` or ``timings``."""

    def names(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
        return [name for name in _known(kind) if name.startswith(incomplete)]

    return names


def _known(kind: str) -> list[str]:
    from ncclbench.config import plugins as registry
    from ncclbench.config.shipped_files import PLANS, PROFILES

    if kind == "plans":
        return PLANS.names()
    if kind == "profiles":
        return PROFILES.names()
    if kind == "dtypes":
        from ncclbench.schedule.dtypes import DTYPES

        return list(DTYPES)
    if kind == "timings":
        from ncclbench.schedule.case import Timing

        return ["all", *(timing.value for timing in Timing)]
    return registry.names(kind)
