"""``ncclbench accept``: measure a rack as its profile requires, or take an existing run, and judge it."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ncclbench import api
from ncclbench.cli.options import HELP, complete
from ncclbench.errors import Exit, UsageError
from ncclbench.units import counted

if TYPE_CHECKING:
    from ncclbench.accept.request import AcceptRequest
    from ncclbench.store.verdict import RunVerdict

_MOST_LINES = 40


@click.command("accept", context_settings=HELP)
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option(
    "--profile",
    metavar="NAME|FILE",
    shell_complete=complete("profiles"),
    help="The required figures; see `ncclbench list profiles`.",
)
@click.option(
    "--plan",
    metavar="NAME|FILE",
    shell_complete=complete("plans"),
    help="The plan to measure.  [default: the plan of the profile]",
)
@click.option("--baseline", type=click.Path(path_type=Path), metavar="RUN", help="Also compare with an earlier run.")
@click.option("--force", is_flag=True, help="Compare with an unlike baseline; every document is stamped `forced`.")
@click.option(
    "--make-profile",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Make a profile from a golden run, to -o FILE.toml or to stdout.",
)
@click.option("--nproc", type=int, help="Number of ranks to start on this host without a launcher.")
@click.option(
    "--transport",
    default="auto",
    metavar="NAME",
    shell_complete=complete("transports"),
    help="The transport.  [default: auto]",
)
@click.option(
    "--topology",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Topology file that places the ranks, as in `run`.",
)
@click.option(
    "--launcher",
    metavar="COMMAND",
    help="Command that starts the ranks, called once for each process start: 'srun --ntasks-per-node 8', "
    "'mpirun -n 16', 'torchrun --nproc-per-node 8'. For use outside of the ranks.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan's cases with estimates of memory and time; start nothing.")
@click.option("--resume", is_flag=True, help="Continue the run in -o: an interrupted process start, or the next one.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="The run directory.  [default: runs/PROFILE-TIME]",
)
@click.option(
    "--redact", is_flag=True, help="Also write RUN-redacted, with hashes for host names, addresses and serials."
)
@click.option("--json", "as_json", is_flag=True, help="Print one compact JSON object as the last line of stdout.")
def command(
    *,
    run: Path | None,
    profile: str | None,
    plan: str | None,
    baseline: Path | None,
    force: bool,
    make_profile: Path | None,
    nproc: int | None,
    transport: str,
    topology: Path | None,
    launcher: str | None,
    dry_run: bool,
    resume: bool,
    out: Path | None,
    redact: bool,
    as_json: bool,
) -> None:
    """Measure a rack and judge it; with RUN, judge an existing run.

    Makes all process starts that the plan declares, one after the other. In a batch script or on the head node,
    --launcher names the command that starts ranks there; it is called once for each process start. Inside ranks that
    torchrun, mpirun or srun has started, it makes one process start and prints the command for the next. The output
    begins with the verdict. The run directory then has verdict.json, SHA256SUMS and accept/ (checks.csv, junit.xml,
    metrics.prom).

    \b
    Examples:
      ncclbench accept --profile cpu-gloo --nproc 4
      ncclbench accept --profile h100-hgx-ib --launcher 'srun --ntasks-per-node 8' -o runs/rack7
      torchrun --nproc-per-node 8 -m ncclbench accept --profile h100-hgx-ib -o runs/rack7
      ncclbench accept runs/rack7 --profile h100-hgx-ib --baseline runs/rack6
      ncclbench accept --make-profile runs/golden -o ours.toml
    """
    from ncclbench.accept.request import AcceptRequest

    context = click.get_current_context()
    if make_profile is not None:
        given = {
            "profile": profile,
            "plan": plan,
            "baseline": baseline,
            "run": run,
            "launcher": launcher,
            "resume": resume,
            "redact": redact,
        }
        others = [name for name, value in given.items() if value]
        if others:
            raise UsageError(f"--make-profile does not go with --{others[0]}")
        context.exit(int(_make_profile(make_profile, out)))
    if profile is None:
        raise UsageError("accept needs --profile NAME; see `ncclbench list profiles`")
    request = AcceptRequest(
        profile=profile,
        run=run,
        baseline=baseline,
        force=force,
        redact=redact,
        plan=plan,
        transport=transport,
        nproc=nproc,
        topology=topology,
        out=out,
        launcher=launcher,
        resume=resume,
        command=tuple(sys.argv[1:]),
    )
    if dry_run:
        from ncclbench.cli.run import print_forecast

        context.exit(int(print_forecast(api.forecast_accept(request), as_json=as_json)))
    context.exit(int(_accept(request, as_json=as_json)))


def _accept(request: "AcceptRequest", *, as_json: bool) -> Exit:
    """Print the verdict if this process judges the run."""
    from ncclbench.cli.progress import progress_listener

    accepted = api.accept(request, progress_listener(shows_results=False))
    if accepted.not_run is not None:
        click.echo(f"NOT_RUN  {accepted.not_run}")
    if accepted.document is not None and accepted.path is not None:
        _show(accepted.document, accepted.path, accepted.redacted)
    if as_json and (accepted.not_run or accepted.document):
        click.echo(_summary(accepted))
    return accepted.exit_code


def _summary(accepted: api.Acceptance) -> str:
    """The JSON line: the verdict of the bundle, or why there is none."""
    import msgspec

    if accepted.document is None:
        code, reason = int(accepted.exit_code), accepted.not_run
        return json.dumps({"run": None, "verdict": "NOT_RUN", "checks": [], "exit_code": code, "error": reason})
    redacted = str(accepted.redacted) if accepted.redacted else None
    document = msgspec.to_builtins(accepted.document)
    return msgspec.json.encode({"run": str(accepted.path), "redacted": redacted, **document}).decode()


def _show(document: "RunVerdict", path: Path, redacted: Path | None) -> None:
    """Print the verdict, a line for each check that did not pass, and where the details are."""
    from ncclbench.store.verdict import Verdict

    stamped = f"  [{', '.join(document.stamps)}]" if document.stamps else ""
    starts = f"{document.starts.present} of {counted(document.starts.declared, 'process start')}"
    click.echo(f"{document.verdict}  profile {document.profile.name}, {starts}{stamped}")
    for reason in document.reasons:
        click.echo(f"  {reason}")
    order = {Verdict.FAIL: 0, Verdict.INCONCLUSIVE: 1}
    shown = [r for r in document.checks if r.verdict in order or (r.verdict is Verdict.NOT_RUN and r.required)]
    shown.sort(key=lambda result: order.get(result.verdict, 2))
    for result in shown[:_MOST_LINES]:
        action = f"  -> {result.action}" if result.action else ""
        click.echo(f"{result.verdict:<12}  {result.check:<10}  {result.subject}: {result.reason}{action}")
    if len(shown) > _MOST_LINES:
        click.echo(f"and {len(shown) - _MOST_LINES} more, all in {path}/accept/checks.csv")
    click.echo(f"details: {path}/verdict.json, {path}/accept/; check them with: ncclbench verify {path}")
    if redacted:
        click.echo(f"redacted copy: {redacted}")


def _make_profile(golden: Path, out: Path | None) -> Exit:
    if out is not None and out.suffix != ".toml":
        raise UsageError(f"-o {out}: a profile is a .toml file")
    text = api.make_profile(golden, out.stem if out else None)
    if out is None:
        click.echo(text, nl=False)
        return Exit.GOOD
    from ncclbench.store.files import write_whole

    try:
        write_whole(out, text.encode())
    except OSError as error:
        raise UsageError(f"cannot write -o {out}: {error}") from None
    click.echo(f"{out}: {text.count('[[floor]]')} floors", err=True)
    return Exit.GOOD
