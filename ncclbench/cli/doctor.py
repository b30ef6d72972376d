"""``ncclbench doctor``: examine this machine."""

import click

from ncclbench.cli.options import HELP
from ncclbench.errors import Exit


@click.command("doctor", context_settings=HELP)
@click.option("--json", "as_json", is_flag=True, help="Print one compact JSON object.")
def command(as_json: bool) -> None:
    """Show the GPUs, NICs, libraries and settings of this machine, and what is missing or slow.

    Changes nothing. Exit code 0 if nothing is missing, else 1; warnings do not count.

    \b
    Examples:
      ncclbench doctor
      srun --ntasks-per-node 1 ncclbench doctor --json
    """
    import msgspec

    from ncclbench.launch.doctor import Machine, examine

    findings = examine(Machine())
    missing = [finding for finding in findings if finding.verdict == "missing"]
    if as_json:
        page = {"missing": len(missing), "findings": [finding._asdict() for finding in findings]}
        click.echo(msgspec.json.encode(page).decode())
    else:
        width = max(len(finding.name) for finding in findings)
        area = ""
        for finding in findings:
            if finding.area != area:
                area = finding.area
                click.echo(f"\n{area}")
            click.echo(f"  {finding.verdict:<7}  {finding.name:<{width}}  {finding.value}; {finding.why}")
        click.echo(f"\n{len(missing)} missing, {sum(f.verdict == 'warning' for f in findings)} warnings")
    click.get_current_context().exit(int(Exit.FAIL if missing else Exit.GOOD))
