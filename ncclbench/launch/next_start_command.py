"""The command line of the next process start, which the user must run because ranks cannot start ranks.

It is the user's own command line with options added and removed. Arguments after ``--`` are always patterns, so options
end before it.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ncclbench.launch.launcher_detection import job_size, slurm_step_nodes

_LAUNCHERS = ("torchrun", "mpirun", "mpiexec", "mpiexec.hydra", "prterun", "orterun", "srun", "flux")
_MOST_PARENTS = 8


def next_command(
    launcher: str, arguments: Sequence[str], out: Path, environ: Mapping[str, str], start: int | None = None
) -> str:
    """The command line that makes the next process start.

    It begins with the launcher's own command line if that is visible, or else with a rebuilt one.

    Args:
        launcher: its name, as in the manifest.
        arguments: the user's arguments after ``ncclbench``.
        out: the run directory, which the next process start must name.
        environ: the variables of this process, for a launcher whose command line is not visible.
        start: the number of the next process start, from 0, for nodes that do not see the run directory.
    """
    ours = _without_option(arguments, "--process-start")  # it named the previous process start
    more: list[str] = []
    options, _ = _split_at_dashes(ours)
    if not any(word in ("-o", "--out") or word.startswith(("--out=", "-o")) for word in options):
        more += ["-o", str(out)]
    if "--resume" not in options:
        more.append("--resume")
    more += ["--process-start", str(start + 1)] if start is not None else []
    ours = _with_options(ours, more)
    visible = _visible_launcher(arguments)
    if visible is not None:
        return shlex.join([*visible, *ours])
    program = shlex.join(["ncclbench", *ours])
    if launcher == "slurm":
        return f"srun --nodes={slurm_step_nodes(environ) or '?'} --ntasks={job_size(environ)} {program}"
    return f"{'mpiexec' if launcher in ('openmpi', 'mpich') else launcher} (with the options of this start) {program}"


def _visible_launcher(arguments: Sequence[str]) -> list[str] | None:
    """The command line of the launcher above this process, without `arguments`; None if it is not visible.

    A launcher on another node, or behind a daemon, is not an ancestor of this process.
    """
    for words in _command_lines_above():
        starts_us = any(Path(word).name in _LAUNCHERS for word in words[:2]) or "torch.distributed.run" in words[:4]
        if starts_us and arguments and list(arguments) == words[-len(arguments) :]:
            return command_as_typed(words[: -len(arguments)])
    return None


def _command_lines_above() -> Iterator[list[str]]:
    """The command lines of the ancestors of this process, the nearest first; other users' may be hidden."""
    import psutil

    with suppress(psutil.Error):  # a process ended in the meantime
        for process in psutil.Process().parents()[:_MOST_PARENTS]:
            with suppress(psutil.AccessDenied):
                yield process.cmdline()


def command_as_typed(words: list[str]) -> list[str]:
    """Replace prterun, which Open MPI 5's mpirun executes, by mpirun; prterun alone starts no MPI job."""
    return [
        str(Path(word).with_name("mpirun")) if Path(word).name == "prterun" else word for word in words[:2]
    ] + words[2:]


def _with_options(arguments: Sequence[str], more: Sequence[str]) -> list[str]:
    """Add `more` options to `arguments`, before any ``--``."""
    options, patterns = _split_at_dashes(arguments)
    return [*options, *more, *patterns]


def _without_option(arguments: Sequence[str], flag: str) -> list[str]:
    """Remove the option `flag` and its value, as ``flag value`` and as ``flag=value``."""
    options, patterns = _split_at_dashes(arguments)
    kept: list[str] = []
    words = iter(options)
    for word in words:
        if word == flag:
            next(words, None)
        elif not word.startswith(f"{flag}="):
            kept.append(word)
    return [*kept, *patterns]


def _split_at_dashes(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    return words[:end], words[end:]
