"""``ncclbench report``: show run directories."""

import os
from pathlib import Path

import click

from ncclbench.errors import UsageError


@click.command("report", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--format", "fmt", default="table", show_default=True, metavar="NAME", help="See `ncclbench list reports`."
)
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write here instead of to stdout.")
def command(runs: tuple[Path, ...], fmt: str, out: Path | None) -> None:
    """Show one or more run directories, finished or cut off.

    \b
    Examples:
      ncclbench report runs/first
      ncclbench report runs/first runs/second -o both.txt
    """
    from ncclbench.registry import load
    from ncclbench.store.directory import read_run

    text = load("reports", fmt).render([read_run(run) for run in runs])
    if out is None:
        click.echo(text)
        return
    try:
        target = out.resolve()  # a link stays a link
        if target.exists() and not target.is_file():
            raise UsageError(f"-o {out} is no regular file")
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write -o {out}: {error}") from None
