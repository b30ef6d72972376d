"""The command line: one file per command, loaded when it is called, so that ``--help`` loads next to nothing."""

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
from ncclbench.cli.output import discard, outlive_readers
from ncclbench.errors import EnvironmentFault, Exit, NcclbenchError
from ncclbench.launch.launcher_detection import own_rank
from ncclbench.launch.signals import RANK_0_SAYS_IT_SECONDS, rank_0_is_still_there, wait_for_rank_0, wants_json

# Command -> its line in `ncclbench --help`. The command is in the module of the same name. Two differ: `list` would
# hide the built-in from this package, and `import` is no possible name.
_COMMANDS = {
    "run": "Measure patterns or a plan, and store a run directory.",
    "accept": "Measure a rack and judge it by a profile, or judge a run.",
    "verify": "Check that an accepted run was not changed, and that its verdict follows.",
    "report": "Show one or more run directories.",
    "compare": "Compare two runs, or two sets of runs, case by case.",
    "topo": "Show this host's GPUs, NICs and NVLink domain, or what a topology file says.",
    "import": "Make a run directory of another tool's logs.",
    "doctor": "Show what this machine has, what it lacks, and why that matters.",
    "list": "List patterns, plans, profiles, checks, transports and report formats.",
}
# What a command that has --json says besides the error when it could not even begin.
_NOTHING: dict[str, dict[str, object]] = {
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
        """All commands, in the order in which people need them."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in _COMMANDS:
            return None
        command = import_module(f"ncclbench.cli.{_MODULES.get(cmd_name, cmd_name)}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """An unknown command names the nearest one."""
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
    """Run the command line; every error of ours is one line, and every exit code is one of ours."""
    _open_what_was_closed()
    outlive_readers()
    try:
        _refuse_lost_directory()
        code = cli(standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Abort:
        code = _complain("interrupted", Exit.ENVIRONMENT)
    except click.ClickException as error:
        code = _complain(error.format_message().replace("\n", " "), Exit.USAGE)
    except NcclbenchError as error:
        code = _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = _complain("interrupted", Exit.ENVIRONMENT)
    except OSError as error:
        code = _not_written(error)
    except Exception:
        traceback.print_exc()  # a defect of ours, and 1 would mean that a rack has failed
        code = _complain("this is a defect in ncclbench; please report it with the lines above", Exit.ENVIRONMENT)
    sys.exit(int(code or 0))


def _open_what_was_closed() -> None:
    """Put /dev/null where the caller has closed stdin, stdout or stderr: the next socket would become it."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:  # stays open until the process ends
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115, PTH123


def _refuse_lost_directory() -> None:
    """Libraries fail in ways of their own where the current directory has been removed.

    Raises:
        EnvironmentFault: if it has.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise EnvironmentFault("the current directory does not exist any more: cd to one that does") from None


def _not_written(error: OSError) -> Exit:
    """Stdout is on a disk that is full, or fails. The run directory's own failures never come here as an OSError."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) or error.filename is not None:
        traceback.print_exc()
        return _complain("this is a defect in ncclbench; please report it with the lines above", Exit.ENVIRONMENT)
    discard(sys.stdout.fileno())  # or what is still in Python's buffers fails once more at exit
    return _complain(f"could not write to stdout: {error.strerror}", Exit.ENVIRONMENT)


def _complain(message: str, code: Exit) -> Exit:
    """One line on stderr.

    A usage error is the same on all ranks, and is said by rank 0 alone: in a job of 8,192 it would otherwise be said
    as often. Where rank 0 goes on, it is that of this rank alone, which says it, as it says what is wrong with its own
    surroundings. The job ends with either.
    """
    from ncclbench.launch.mpiexec import end_job

    rank = own_rank()
    if rank == "0":
        click.echo(f"ncclbench: error: {message}", err=True)
        nothing = _NOTHING.get(sys.argv[1]) if wants_json(sys.argv[2:]) else None
        if nothing is not None:
            click.echo(json.dumps({**nothing, "exit_code": int(code), "error": message}))
    else:
        wait_for_rank_0(*([RANK_0_SAYS_IT_SECONDS] if code is Exit.USAGE else []))
        if code is not Exit.USAGE or rank_0_is_still_there():
            click.echo(f"ncclbench: error: rank {rank}: {message}", err=True)
    sys.stdout.flush()
    end_job(code)
    return code
