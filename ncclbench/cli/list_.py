"""``ncclbench list``: names of patterns, plans, profiles, checks and plug-ins."""

import inspect

import click

from ncclbench.cli.options import HELP
from ncclbench.errors import NcclbenchError

_KINDS = ("patterns", "plans", "profiles", "checks", "transports", "reports", "importers", "models")


@click.command("list", context_settings=HELP)
@click.argument("kind", type=click.Choice(_KINDS))
def command(kind: str) -> None:
    """List all names of a kind, with one line each.

    \b
    Examples:
      ncclbench list patterns
      ncclbench list plans
    """
    from ncclbench.config.plugins import load, names
    from ncclbench.config.shipped_files import MODELS, PLANS, PROFILES
    from ncclbench.transports.capabilities import capabilities_of

    if kind == "plans":
        rows = list(PLANS.titles().items())
    elif kind == "models":
        from ncclbench.moe.model_presets import model_line

        rows = [(name, model_line(name)) for name in MODELS.names()]
    elif kind == "profiles":
        rows = list(PROFILES.titles().items())
    else:
        rows = []
        for name in names(kind):
            try:
                module = load(kind, name)
                if kind == "transports":
                    capabilities_of(name).import_libraries()
                rows.append((name, (inspect.getdoc(module) or "").partition("\n")[0]))
            except (NcclbenchError, ImportError) as error:
                rows.append((name, f"not usable here: {error}"))
    width = max(len(name) for name, _ in rows)
    for name, line in rows:
        click.echo(f"{name:<{width}}  {line}".rstrip())
