"""``ncclbench verify``: check the files and the verdict of an accepted run."""

from pathlib import Path

import click

from ncclbench.cli.options import HELP
from ncclbench.errors import Exit


@click.command("verify", context_settings=HELP)
@click.argument("run", type=click.Path(path_type=Path))
def command(run: Path) -> None:
    """Check that an accepted run is unchanged, and that its verdict follows from its records.

    Checks the checksums, the hash chain of the event log, records and samples against it, the schema, and the declared
    process starts. Then computes the verdict again and compares it.

    Exit code 0 if everything is sound, else 1.

    \b
    Example:
      ncclbench verify runs/rack7
    """
    from ncclbench.accept.verify import read_document, verify

    findings = verify(run)
    wrong = [finding for finding in findings if finding.wrong]
    click.echo(f"{'NOT SOUND' if wrong else 'SOUND'}  {run}")
    for finding in findings:
        note = f"  ({finding.note})" if finding.note else ""
        click.echo(f"{'wrong' if finding.wrong else 'ok':<6}{finding.part}{note}")
        for line in finding.wrong:
            click.echo(f"      {line}")
    if not wrong:
        document = read_document(run)
        click.echo(f"the verdict is {document.verdict}, and it follows from the records")
    click.get_current_context().exit(int(Exit.FAIL if wrong else Exit.GOOD))
