"""The command line: one module per command, imported when the command is called, so that ``--help`` is fast."""

import errno
import json
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path

import click

from ncclbench import __version__
from ncclbench.cli.options import HELP
from ncclbench.cli.output import discard, tolerate_closed_pipes
from ncclbench.errors import EnvironmentFault, Exit, NcclbenchError
from ncclbench.launch.launcher_detection import own_rank
from ncclbench.launch.signals import RANK_0_REPORT_SECONDS, rank_0_still_runs, wait_for_rank_0, wants_json

# Command -> its line in `ncclbench --help`. The module has the name of the command, with two exceptions in _MODULES:
# `list` would hide the built-in in this package, and `import` is a keyword.
_COMMANDS = {
    "run": "Measure patterns or a plan, and store a run directory.",
    "accept": "Measure a rack and judge it by a profile, or judge an existing run.",
    "verify": "Check that an accepted run is unchanged and its verdict is reproducible.",
    "report": "Show one or more run directories.",
    "compare": "Compare two runs, or two sets of runs, case by case.",
    "topo": "Show this host's GPUs, NICs and NVLink domain, or a topology file.",
    "import": "Convert logs of other tools to a run directory.",
    "doctor": "Show the GPUs, NICs, libraries and settings of this machine, and problems.",
    "list": "List patterns, plans, profiles, checks, transports and report formats.",
}
# The JSON fields that a command with --json prints beside the error if it fails before it starts.
_EMPTY_RESULT: dict[str, dict[str, object]] = {
    "run": {"run": None, "records": []},
    "accept": {"run": None, "verdict": "NOT_RUN", "checks": []},
    "import": {"run": None, "records": []},
    "topo": {},
    "doctor": {},
}
_MODULES = {"list": "list_", "import": "import_"}


class _LazyGroup(click.Group):
    """A group that imports a command's module only to run it or to print its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the usual order of use."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command."""
        if cmd_name not in _COMMANDS:
            return None
        command = import_module(f"ncclbench.cli.{_MODULES.get(cmd_name, cmd_name)}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Print the list of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Refuse an unknown command, naming the nearest one."""
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            from ncclbench.config.refusals import unknown

            raise click.UsageError(unknown("command", args[0], _COMMANDS))
        return super().resolve_command(ctx, args)


@click.group(cls=_LazyGroup, context_settings=HELP)
@click.version_option(__version__, prog_name="ncclbench")
def cli() -> None:
    """Measure collectives, MoE dispatch and cross-rail traffic on a GPU cluster, or on a laptop's CPU.

    \b
    Examples:
      ncclbench run all_reduce -b 1K -e 16M --nproc 4
      ncclbench run --plan quick --nproc 4 -o runs/first
      torchrun --nproc-per-node 8 -m ncclbench run all_reduce -b 8 -e 4G -f 4
      ncclbench report runs/first -o first.html
      ncclbench compare runs/base runs/new

    \b
    Exit codes: 0 good, 5 inconclusive, 1 FAIL or regression,
    3 environment (could not start, lost rank, timeout), 4 wrong data,
    2 usage error.
    """


def main() -> None:
    """Run the command line; an `NcclbenchError` is printed as one line, and the exit code is one of `Exit`."""
    _open_closed_streams()
    tolerate_closed_pipes()
    try:
        _refuse_lost_directory()
        code = cli(standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Abort:
        code = _report_error("interrupted", Exit.ENVIRONMENT)
    except click.ClickException as error:
        code = _report_error(error.format_message().replace("\n", " "), Exit.USAGE)
    except NcclbenchError as error:
        code = _report_error(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = _report_error("interrupted", Exit.ENVIRONMENT)
    except OSError as error:
        code = _report_write_error(error)
    except Exception:
        traceback.print_exc()  # Python would end in 1, which means that a rack has failed
        code = _report_error("this is a defect in ncclbench; please report it with the lines above", Exit.ENVIRONMENT)
    sys.exit(int(code or 0))


def _open_closed_streams() -> None:
    """Open /dev/null for a closed stdin, stdout or stderr; otherwise the next socket gets its descriptor."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # uses the lowest free descriptor, which is this one
        if getattr(sys, name) is None:  # stays open until the process ends
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115, PTH123


def _refuse_lost_directory() -> None:
    """Refuse to run in a directory that was removed, because libraries fail there with unclear errors.

    Raises:
        EnvironmentFault: if the current directory does not exist.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise EnvironmentFault("the current directory no longer exists: cd to another one") from None


def _report_write_error(error: OSError) -> Exit:
    """Report a failed write to stdout, such as a full disk. Errors of the run directory are never an OSError here."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) or error.filename is not None:
        traceback.print_exc()
        return _report_error("this is a defect in ncclbench; please report it with the lines above", Exit.ENVIRONMENT)
    discard(sys.stdout.fileno())  # otherwise Python's buffers fail again at exit
    return _report_error(f"could not write to stdout: {error.strerror}", Exit.ENVIRONMENT)


def _report_error(message: str, code: Exit) -> Exit:
    """Print the error as one line on stderr, end the job where the launcher does not, and return `code`.

    A usage error is usually the same on all ranks, so only rank 0 prints it. Any rank prints an error of its
    environment. If rank 0 still runs after a usage error of another rank, that rank prints it too.
    """
    from ncclbench.launch.mpiexec import end_job

    rank = own_rank()
    if rank == "0":
        click.echo(f"ncclbench: error: {message}", err=True)
        empty = _EMPTY_RESULT.get(sys.argv[1]) if wants_json(sys.argv[2:]) else None
        if empty is not None:
            click.echo(json.dumps({**empty, "exit_code": int(code), "error": message}))
    else:
        wait_for_rank_0(*([RANK_0_REPORT_SECONDS] if code is Exit.USAGE else []))
        if code is not Exit.USAGE or rank_0_still_runs():
            click.echo(f"ncclbench: error: rank {rank}: {message}", err=True)
    sys.stdout.flush()
    end_job(code)
    return code
