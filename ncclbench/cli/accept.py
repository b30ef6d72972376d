"""``ncclbench accept``: measure a rack as its profile asks, or take a run that is there, and say whether it is good."""

import datetime
import os
from pathlib import Path
from typing import Any

import click

from ncclbench.cli.completion import complete
from ncclbench.errors import Exit, UsageError, worst
from ncclbench.units import counted

_MOST_LINES = 40


@click.command("accept", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option(
    "--profile",
    metavar="NAME|FILE",
    shell_complete=complete("profiles"),
    help="What must be reached; see `ncclbench list profiles`.",
)
@click.option(
    "--plan",
    metavar="NAME|FILE",
    shell_complete=complete("plans"),
    help="What to measure.  [default: the profile's own]",
)
@click.option("--baseline", type=click.Path(path_type=Path), metavar="RUN", help="Compare with an earlier run as well.")
@click.option("--force", is_flag=True, help="Compare with a baseline that is unlike; every document is stamped.")
@click.option(
    "--make-profile",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Make a profile of a golden run; -o FILE.toml, or else it goes to stdout.",
)
@click.option("--nproc", type=int, help="Ranks to start here, when no launcher has.")
@click.option(
    "--transport",
    default="auto",
    metavar="NAME",
    shell_complete=complete("transports"),
    help="Who moves the data.  [default: auto]",
)
@click.option("--topology", type=click.Path(path_type=Path), metavar="FILE", help="Where ranks sit, as of `run`.")
@click.option(
    "--launcher",
    metavar="COMMAND",
    help="Start the ranks by this, once for each process start: 'srun --ntasks-per-node 8', 'mpirun -n 16', 'torchrun "
    "--nproc-per-node 8'. Given once, outside of the ranks.",
)
@click.option(
    "--dry-run", is_flag=True, help="Show the plan's cases, their memory and a guess of the time; start nothing."
)
@click.option("--resume", is_flag=True, help="Go on with the run in -o: the next process start, or what was cut off.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="The run directory.  [default: runs/PROFILE-TIME]",
)
@click.option("--redact", is_flag=True, help="Also make RUN-redacted, with hashes for host names, addresses, serials.")
@click.option("--json", "as_json", is_flag=True, help="The last line of stdout is one compact JSON object.")
def command(**options: Any) -> None:
    """Measure and judge a rack; or, given RUN, judge what was measured already.

    Makes all process starts that the plan declares, one after the other. In a batch script or on the head node,
    --launcher says how ranks are started there, and each start is a launcher call; called inside of ranks that
    torchrun, mpirun or srun has started, it makes one start and prints the command for the next. The verdict comes
    first; the run directory then holds verdict.json, SHA256SUMS and accept/ (checks.csv, junit.xml, metrics.prom).

    \b
    Examples:
      ncclbench accept --profile cpu-gloo --nproc 4
      ncclbench accept --profile h100-hgx-ib --launcher 'srun --ntasks-per-node 8' -o runs/rack7
      torchrun --nproc-per-node 8 -m ncclbench accept --profile h100-hgx-ib -o runs/rack7
      ncclbench accept runs/rack7 --profile h100-hgx-ib --baseline runs/rack6
      ncclbench accept --make-profile runs/golden -o ours.toml
    """
    click.get_current_context().exit(int(_accept(options)))


def _accept(options: dict[str, Any]) -> Exit:
    if options["make_profile"] is not None:
        return _make_profile(options)
    if options["profile"] is None:
        raise UsageError("accept needs --profile NAME; see `ncclbench list profiles`")
    if options["force"] and options["baseline"] is None:
        raise UsageError("--force goes with --baseline: nothing else is ever forced")
    from ncclbench.accept.profile import load_profile

    rules = load_profile(options["profile"])
    if options["run"] is not None:
        given = [
            name for name in ("plan", "out", "nproc", "topology", "launcher", "dry_run", "resume") if options[name]
        ]
        if given:
            raise UsageError(f"--{given[0].replace('_', '-')} is for a new run; {options['run']} was measured already")
        return _judge(options["run"], rules, options)
    return _measure_and_judge(rules, options)


def _measure_and_judge(rules: Any, options: dict[str, Any]) -> Exit:
    """Make the process starts, then judge; under a launcher rank 0 judges."""
    from ncclbench.launch.launcher_detection import detect

    if options["dry_run"]:
        return _measure(rules, options, Path())
    seat = detect(os.environ)
    name = rules.profile.name
    out = options["out"] or Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    _baseline(options["baseline"], out)  # what is wrong with it is said before hours are spent
    code = _measure(rules, options, out)
    if seat is not None and seat.rank != 0:
        return code
    if code is Exit.USAGE:
        return _not_run(rules, code, "what was asked for was refused; why stands above", options)
    if not (out / "manifest.json").exists():
        return _not_run(rules, worst([code, Exit.ENVIRONMENT]), "no process start came so far as to measure", options)
    return worst([code, _judge(out, rules, options)])


def _not_run(rules: Any, code: Exit, reason: str, options: dict[str, Any]) -> Exit:
    """The verdict on what was not measured; what is in -o, if anything, is another run."""
    error = f"profile {rules.profile.name}: nothing was measured, since {reason}"
    click.echo(f"NOT_RUN  {error}")
    if options["as_json"]:
        import json

        summary: dict[str, Any] = {
            "run": None,
            "verdict": "NOT_RUN",
            "checks": [],
            "exit_code": int(code),
            "error": error,
        }
        click.echo(json.dumps(summary))
    return code


def _measure(rules: Any, options: dict[str, Any], out: Path) -> Exit:
    """As ``ncclbench run`` would, but for the table at its end."""
    from ncclbench.cli import run

    arguments = ["--plan", str(options["plan"] or rules.profile.plan)]
    arguments += ["--dry-run"] if options["dry_run"] else ["-o", str(out)]
    arguments += ["--json"] if options["dry_run"] and options["as_json"] else []
    arguments += ["--transport", _transport(rules, options["transport"])]
    arguments += ["--nproc", str(options["nproc"])] if options["nproc"] is not None else []
    arguments += ["--topology", str(options["topology"])] if options["topology"] is not None else []
    arguments += ["--launcher", options["launcher"]] if options["launcher"] is not None else []
    arguments += ["--resume"] if options["resume"] else []
    with run.command.make_context("run", list(arguments)) as context:
        return run.execute({**context.params, "arguments": ["run", *arguments]})


def _transport(rules: Any, asked: str) -> str:
    """The one that was asked for, or the profile's first."""
    return str(rules.profile.fabric.transports[0]) if asked == "auto" else asked


def _baseline(path: Path | None, run: Path) -> Any:
    """The baseline as a run; the run itself would always agree with itself, and is refused."""
    from ncclbench.store.run_directory import read_run

    if path is None:
        return None
    base = read_run(path)
    same_file = path.resolve() == run.resolve()
    copied = (run / "manifest.json").exists() and _same_records(path, run)
    if same_file or copied:
        raise UsageError(f"--baseline {path} is the run itself, which proves nothing; name an earlier run")
    return base


def _same_records(one: Path, other: Path) -> bool:
    files = [path / "results.jsonl" for path in (one, other)]
    return all(file.exists() for file in files) and files[0].read_bytes() == files[1].read_bytes() != b""


def _judge(path: Path, rules: Any, options: dict[str, Any]) -> Exit:
    from ncclbench.accept.bundle import write_bundle
    from ncclbench.accept.check_context import Subject
    from ncclbench.store.run_directory import read_run

    run = read_run(path)
    baseline = _baseline(options["baseline"], path)
    document = write_bundle(Subject(run, rules, baseline, options["force"]))
    redacted = _redacted(path, rules, baseline, options) if options["redact"] else None
    _show(document, path, redacted)
    if options["as_json"]:
        import msgspec

        summary = {"run": str(path), "redacted": str(redacted) if redacted else None, **msgspec.to_builtins(document)}
        click.echo(msgspec.json.encode(summary).decode())
    return Exit(document.exit_code)


def _redacted(path: Path, rules: Any, baseline: Any, options: dict[str, Any]) -> Path:
    """The bundle again, in a directory of its own, without names."""
    import msgspec

    from ncclbench.accept.bundle import StoredBaseline, write_bundle
    from ncclbench.accept.check_context import Subject
    from ncclbench.accept.profile import parse_profile
    from ncclbench.accept.redact import KEY, redact, redact_profile, redactor_for
    from ncclbench.store.run_directory import read_run

    target = path.with_name(path.name + "-redacted")
    run = read_run(path)
    redactor = redactor_for([run.manifest, *([baseline.manifest] if baseline else [])], os.environ.get(KEY, ""))
    redact(path, target, redactor)
    rules = parse_profile(redact_profile(rules.text, redactor), rules.profile.name)
    if baseline is not None:
        stored = StoredBaseline(
            name=baseline.path.name, manifest=dict(baseline.manifest), records=list(baseline.records)
        )
        plain = redactor.data(msgspec.to_builtins(stored))
        baseline = msgspec.convert(plain, StoredBaseline).as_run()
    write_bundle(Subject(read_run(target), rules, baseline, options["force"]))
    return target


def _show(document: Any, path: Path, redacted: Path | None) -> None:
    """The verdict, then a line for each check that did not pass, then where the rest is."""
    from ncclbench.accept.verdict import Verdict

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
        click.echo(f"to hand on: {redacted}")


def _make_profile(options: dict[str, Any]) -> Exit:
    from ncclbench.accept.bundle import write
    from ncclbench.accept.profile_from_run import make_profile
    from ncclbench.store.run_directory import read_run

    others = [name for name in ("profile", "plan", "baseline", "run", "launcher", "resume", "redact") if options[name]]
    if others:
        raise UsageError(f"--make-profile does not go with --{others[0]}")
    out: Path | None = options["out"]
    if out is not None and out.suffix != ".toml":
        raise UsageError(f"-o {out}: a profile is a .toml file")
    text = make_profile(read_run(options["make_profile"]), out.stem if out else options["make_profile"].name)
    if out is None:
        click.echo(text, nl=False)
        return Exit.GOOD
    try:
        write(out, text.encode())
    except OSError as error:
        raise UsageError(f"cannot write -o {out}: {error}") from None
    click.echo(f"{out}: {text.count('[[floor]]')} floors", err=True)
    return Exit.GOOD
